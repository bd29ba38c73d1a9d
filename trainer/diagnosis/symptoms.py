"""What a student looks like from outside when a trap has worked: pure functions of texts,
confidences and grades.

    overconfident hallucination   wrong, and sure of it
    self-correction collapse      an error in the prefix is not recovered from (the prompts for it
                                  are made here)
    local decoding degradation    repetition, loops, broken characters, texts cut at the limit
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REVISIONS = re.compile(
    r"\b(wait|actually|hold on|let me (re)?check|correction|mistake|on second thought)\b",
    re.IGNORECASE,
)


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that have occurred before in the text; 0 for texts shorter than n +
    1.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int], window: int = 64, longest: int = 16) -> bool:
    """Is the end of the text periodic? True if its last `window` tokens repeat with a period of at
    most `longest`.
    """
    end = list(ids[-window:])
    return len(end) == window and any(end[p:] == end[:-p] for p in range(1, longest + 1))


@dataclass(frozen=True)
class Confidence:
    """How well confidence agrees with being right, over all prompts."""

    accuracy: float
    mean: float
    confident_wrong: float  # share of all prompts answered wrong with confidence >= 0.9
    ece: float  # expected calibration error over equally filled bins
    # chance that a right answer is held with more confidence than a wrong one; NaN if all are equal
    auroc: float

    @property
    def overconfidence(self) -> float:
        return self.mean - self.accuracy


def confidence_report(
    confidence: Sequence[float], right: Sequence[bool], *, sure: float = 0.9, bins: int = 15
) -> Confidence:
    """confidence: 0 to 1 per prompt, e.g. the geometric mean of the answer's token probabilities,
    or a vote share.
    """
    c, r = np.asarray(confidence, float), np.asarray(right, bool)
    if len(c) != len(r) or not len(c):
        raise ValueError(
            f"confidence_report: {len(c)} confidences and {len(r)} grades; want one of each per "
            "prompt, at least one"
        )
    order = np.argsort(c, kind="stable")
    ece = sum(
        len(b) * abs(c[b].mean() - r[b].mean()) for b in np.array_split(order, min(bins, len(c)))
    ) / len(c)
    return Confidence(
        float(r.mean()),
        float(c.mean()),
        float((~r & (c >= sure)).mean()),
        float(ece),
        auroc(c[r], c[~r]),
    )


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(positive > negative) + half of ties; NaN when one side is empty. Mann-Whitney by ranks."""
    a, b = np.asarray(positive, float), np.asarray(negative, float)
    if not len(a) or not len(b):
        return float("nan")
    values, inverse, count = np.unique(
        np.concatenate([a, b]), return_inverse=True, return_counts=True
    )
    rank = np.cumsum(count) - (count - 1) / 2
    return float((rank[inverse[: len(a)]].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def insert_error(text: str, draw: np.random.Generator) -> str | None:
    """The text with one controlled error at its end: its last number off by one, or else its last
    operator or option swapped.

    None where there is nothing to break.
    """
    if numbers := list(re.finditer(r"\d+", text)):
        m = numbers[-1]
        wrong = int(m[0]) + (1 if draw.random() < 0.5 or int(m[0]) == 0 else -1)
        return text[: m.start()] + str(wrong).zfill(len(m[0])) + text[m.end() :]
    swap = {"+": "-", "-": "+", "*": "+", "<": ">", ">": "<"}
    if operators := list(re.finditer(r"[-+*<>]", text)):
        m = operators[-1]
        return text[: m.start()] + swap[m[0]] + text[m.end() :]
    if options := list(re.finditer(r"\b[A-D]\b", text)):
        m = options[-1]
        others = [o for o in "ABCD" if o != m[0]]
        return text[: m.start()] + others[int(draw.integers(3))] + text[m.end() :]
    return None


def recovery(after_error: Sequence[bool], clean: Sequence[bool]) -> float:
    """acc(prefix with an error) / acc(the same prefix clean); NaN when the clean prefixes lead
    nowhere.
    """
    return (
        float(np.mean(after_error) / np.mean(clean))
        if len(clean) and np.mean(clean) > 0
        else float("nan")
    )


def revises(text: str) -> bool:
    return REVISIONS.search(text) is not None
