"""What an undistillable pair does to a student, seen from outside: pure functions of texts,
confidences, answers and grades.

    overconfident hallucination   wrong, and sure of it
    self-correction collapse      an error in the prefix is not recovered from (the prefixes for it
                                  are made here)
    local decoding degradation    repetition, loops, broken characters, texts cut at the limit
    votes                         a confidence that does not look at probabilities: how many of n
                                  samples agree on the answer
    format breaks                 finished texts in which the grader found no answer
    sampling gap                  accuracy of the most likely text - accuracy at temperature 1
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import MAX_EMAX, Context, Decimal

import numpy as np

from reflux.trainer.runs.stats import Estimate, mean_over_prompts

from .measure import TokenStats

CONFIDENT = 0.9
REVISIONS = re.compile(
    r"\b(wait|actually|hold on|let me (re)?check|correction|mistake|on second thought)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Confidence:
    """How well confidence agrees with being correct, over all prompts."""

    accuracy: float
    mean: float
    confident_wrong: float  # fraction of all prompts answered wrong with confidence >= CONFIDENT
    ece: float  # expected calibration error over equally filled bins
    # chance that a correct answer is held with more confidence than a wrong one; NaN without both
    auroc: float
    overconfidence: float  # mean - accuracy


@dataclass(frozen=True)
class SamplingGap:
    """Accuracy greedy, at temperature 1, and their difference."""

    greedy: Estimate
    sampled: Estimate
    gap: Estimate


@dataclass(frozen=True)
class Correction:
    """Correct texts cut short and continued, as they are and with one error at the cut."""

    cuts: int
    correct_after_clean: float
    correct_after_error: float
    recovery: float
    revises: float  # fraction of the texts after an error that revise themselves
    correct_if_revised: float
    student_gain: float  # log p(correcting) - log p(going on), nats
    teacher_gain: float
    gains: int  # cuts that these are means over


@dataclass(frozen=True)
class OwnError:
    """Half of the student's own wrong text, continued; the same prompts from the start."""

    texts: int
    correct_after: Estimate
    correct_from_the_start: Estimate


@dataclass(frozen=True)
class Symptoms:
    """Of the student's texts. Numbers are fractions of texts or tokens; None: not measured."""

    repeated_4grams: float | None = None
    looping: float | None = None
    truncated: float | None = None
    broken_text: float | None = None
    off_nucleus: float | None = None
    confidence: Confidence | None = None
    sampling: SamplingGap | None = None
    format_breaks: float | None = None
    vote_confidence: Confidence | None = None
    correction: Correction | None = None
    cuts_without_room: int | None = None  # left out of `correction`
    own_error: OwnError | None = None


def text_symptoms(students: Sequence[TokenStats]) -> Symptoms:
    """What the student's sampled texts and their probabilities say."""
    if not students:
        return Symptoms()
    ids = [s.rollout.content_ids for s in students]
    outside = [s.outside_n for s in students if s.outside_n is not None]
    off_nucleus = None
    if outside:
        tokens = sum(map(len, outside))
        off_nucleus = float(sum(int(x.sum()) for x in outside) / tokens) if tokens else math.nan
    graded = [(s, s.correct) for s in students if s.correct is not None and len(s.student_logp_n)]
    confidence = [math.exp(float(s.student_logp_n.sum()) / s.tokens) for s, _ in graded]
    return Symptoms(
        repeated_4grams=float(np.mean([repeated_ngrams(i) for i in ids])),
        looping=float(np.mean([loops(i) for i in ids])),
        truncated=float(np.mean([not s.rollout.ended for s in students])),
        broken_text=float(np.mean(["\ufffd" in s.rollout.text for s in students])),
        off_nucleus=off_nucleus,
        confidence=confidence_report(confidence, [c for _, c in graded]) if graded else None,
    )


def with_answers(
    symptoms: Symptoms,
    students: Sequence[TokenStats],
    greedy: Mapping[int, bool],
    *,
    names_answers: Callable[[TokenStats], bool],
) -> Symptoms:
    """Adds the sampling gap, format breaks and votes of the student's graded texts.

    greedy: prompt -> is the most likely text correct? names_answers: does the grader of a text say
    what it took for the answer?
    """
    of_prompt: dict[int, list[TokenStats]] = {}
    for s in students:
        if s.correct is not None:
            of_prompt.setdefault(s.prompt, []).append(s)
    if of_prompt and greedy:
        grades = {i: [bool(s.correct) for s in rows] for i, rows in of_prompt.items()}
        symptoms = replace(symptoms, sampling=sampling_gap(greedy, grades))
    of_prompt = {i: rows for i, rows in of_prompt.items() if names_answers(rows[0])}
    if of_prompt:
        breaks = [
            s.rollout.ended and not s.correct and s.answer is None
            for rows in of_prompt.values()
            for s in rows
        ]
        votes = [
            vote([s.answer for s in rows], [bool(s.correct) for s in rows])
            for rows in of_prompt.values()
        ]
        symptoms = replace(
            symptoms,
            format_breaks=float(np.mean(breaks)),
            vote_confidence=confidence_report([v for v, _ in votes], [c for _, c in votes]),
        )
    return symptoms


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> float:
    """Fraction of the n-grams that have occurred before in the text; 0 for texts shorter than
    n + 1.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int], window: int = 64, longest: int = 16) -> bool:
    """Is the end of the text periodic? True if its last `window` tokens repeat with a period of at
    most `longest`.
    """
    end = list(ids[-window:])
    return len(end) == window and any(end[p:] == end[:-p] for p in range(1, longest + 1))


def confidence_report(
    confidence: Sequence[float], correct: Sequence[bool], *, bins: int = 15
) -> Confidence:
    """confidence: 0 to 1 per prompt, e.g. the geometric mean of the answer's token probabilities,
    or the fraction of votes. ValueError unless there is one grade for each, at least one.
    """
    c, is_correct = np.asarray(confidence, float), np.asarray(correct, bool)
    if len(c) != len(is_correct) or not len(c):
        raise ValueError(
            f"confidence_report: {len(c)} confidences and {len(is_correct)} grades; want one of "
            "each per prompt, at least one"
        )
    order = np.argsort(c, kind="stable")
    binned = np.array_split(order, min(bins, len(c)))
    return Confidence(
        accuracy=float(is_correct.mean()),
        mean=float(c.mean()),
        confident_wrong=float((~is_correct & (c >= CONFIDENT)).mean()),
        ece=float(sum(len(b) * abs(c[b].mean() - is_correct[b].mean()) for b in binned) / len(c)),
        auroc=auroc(c[is_correct], c[~is_correct]),
        overconfidence=float(c.mean()) - float(is_correct.mean()),
    )


def auroc(positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray) -> float:
    """P(positive > negative) + half of ties; NaN when one side is empty. Mann-Whitney by ranks."""
    a, b = np.asarray(positive, float), np.asarray(negative, float)
    if not len(a) or not len(b):
        return float("nan")
    _, inverse, count = np.unique(np.concatenate([a, b]), return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    return float((rank[inverse[: len(a)]].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def vote(answers: Sequence[str | None], correct: Sequence[bool]) -> tuple[float, bool]:
    """(fraction of the samples that gave the most frequent answer, is it correct?); of equally
    frequent ones the first.

    None is no answer and gets no votes; without any answer (0.0, False).
    """
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0, False
    winner, count = votes.most_common(1)[0]
    return count / len(answers), bool(correct[answers.index(winner)])


def sampling_gap(greedy: Mapping[int, bool], sampled: Mapping[int, Sequence[bool]]) -> SamplingGap:
    """Over the prompts that have both; intervals over prompts."""
    mean = {i: float(np.mean(sampled[i])) for i in greedy if sampled.get(i)}
    likeliest = {i: float(greedy[i]) for i in mean}
    return SamplingGap(
        mean_over_prompts(likeliest),
        mean_over_prompts(mean),
        mean_over_prompts({i: likeliest[i] - mean[i] for i in mean}),
    )


def own_error(continued: Mapping[int, bool], students: Sequence[TokenStats]) -> OwnError | None:
    """continued: prompt -> correct after half of the student's own wrong text? Beside it what the
    student gets on the same prompts from the start. None without any.
    """
    if not continued:
        return None
    graded = [s for s in students if s.correct is not None]
    from_the_start = {
        i: float(np.mean([bool(s.correct) for s in graded if s.prompt == i])) for i in continued
    }
    return OwnError(
        len(continued),
        mean_over_prompts({i: float(x) for i, x in continued.items()}),
        mean_over_prompts(from_the_start),
    )


@dataclass(frozen=True)
class CutOutcome:
    """What became of one cut text. gains: log p(correcting) - log p(going on) of student and
    teacher, nats; None: there is no room for the correction.
    """

    correct_after_clean: bool
    correct_after_error: bool
    revises: bool  # after the error
    gains: tuple[float, float] | None


def correction(cuts: Sequence[CutOutcome]) -> Correction | None:
    """Means over all cuts; None without any."""
    if not cuts:
        return None
    clean, wrong = [c.correct_after_clean for c in cuts], [c.correct_after_error for c in cuts]
    revised = [c.correct_after_error for c in cuts if c.revises]
    gains = [c.gains for c in cuts if c.gains is not None]
    student, teacher = np.mean(gains, 0) if gains else (math.nan, math.nan)
    return Correction(
        cuts=len(cuts),
        correct_after_clean=float(np.mean(clean)),
        correct_after_error=float(np.mean(wrong)),
        recovery=recovery(wrong, clean),
        revises=float(np.mean([c.revises for c in cuts])),
        correct_if_revised=float(np.mean(revised)) if revised else math.nan,
        student_gain=float(student),
        teacher_gain=float(teacher),
        gains=len(gains),
    )


def insert_error(text: str, draw: np.random.Generator) -> str | None:
    """The text with one controlled error at its end: its last number off by one, or else its last
    operator or option swapped. None where there is nothing to break.
    """
    if numbers := list(re.finditer(r"\d+", text)):
        m = numbers[-1]
        number = Decimal(m[0])  # exact; str() refuses an int of more than 4,300 digits
        by = 1 if draw.random() < 0.5 or number == 0 else -1
        wrong = Context(prec=len(m[0]) + 1, Emax=MAX_EMAX).add(number, by)
        return text[: m.start()] + f"{wrong:f}".zfill(len(m[0])) + text[m.end() :]
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
    """acc(prefix with an error) / acc(the same prefix clean); NaN when no clean prefix leads to a
    correct answer.
    """
    if not len(clean) or np.mean(clean) <= 0:
        return math.nan
    return float(np.mean(after_error) / np.mean(clean))


def revises(text: str) -> bool:
    return REVISIONS.search(text) is not None
