"""The options of multiple-choice prompts, and the order in which they are shown.

A prompt has its options where graders.MultipleChoice looks for them: a list of texts, or
{"label": [...], "text": [...]}.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .prompt import Prompt, spell

ORDER_STREAM = 1 << 30  # the shuffle of a prompt's options has random numbers of its own
# "None of the above", "All of these", "Both of the other answers"
ABOVE = re.compile(
    r"\b(?:all|none|both|neither|either|any|each|some|one|two|three)(?: of)?"
    r"(?:(?: the)?(?: other)? (?:above|preceding|previous|foregoing|options|choices|answers|"
    r"alternatives)| (?:these|those|them))\b|以上(?:都|皆|全|均|各项|选项)|上述",
    re.I,
)


@dataclass(frozen=True)
class Options:
    """The options of one prompt in the order shown. Positions are from 0."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    correct: int  # position

    def position_of(self, label: str | None) -> int | None:
        return self.labels.index(label) if label is not None and label in self.labels else None


@dataclass(frozen=True)
class Listing:
    """That options are written under their questions, and how they are read."""

    seed: int
    column: str = "choices"
    answer_is: str = "letter"
    always: bool = False  # also where the options may stand in the prompts already
    shuffle: bool = True  # False: in the order given

    def shown(self, prompt: Prompt) -> Prompt:
        return list_options(prompt, self.seed, self.column, self.answer_is, self.shuffle)


def read_label(label: Any) -> str:
    """A label as it is written before an option, "a", "A." or 1, without what stands around it."""
    spelled = spell(label).strip()
    return (spelled.strip(".:()[]") or spelled).upper()


def read_options(prompt: Prompt, column: str = "choices", answer_is: str = "letter") -> Options:
    """`column`, `answer_is`: as in graders.MultipleChoice. ValueError where options, their texts or
    the correct one are missing.
    """
    labels, texts = _labels_and_texts(prompt, column)
    names = _names(labels, texts, answer_is)
    answer = (prompt.answer or "").strip()
    answer = read_label(answer) if answer_is == "letter" else answer
    if answer not in names:
        raise ValueError(
            f"prompt {prompt.index}: answer {answer!r} is none of {', '.join(names)}. Set "
            "task.options.answer_is"
        )
    return Options(labels, texts, names.index(answer))


def _labels_and_texts(prompt: Prompt, column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    given = prompt.extra.get(column)
    if given is None:
        raise ValueError(
            f"prompt {prompt.index}: no column {column!r} with the options; there are: "
            f"{', '.join(prompt.extra) or 'none'}. Set task.options.choices"
        )
    if isinstance(given, Mapping):
        texts = tuple(map(spell, given["text"]))
        labels = tuple(map(read_label, given["label"]))
    else:
        texts = tuple(map(spell, given))
        labels = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(texts)])
    if len(texts) < 2 or len(labels) != len(texts) or not all(texts):
        raise ValueError(
            f"prompt {prompt.index}: options {list(texts)}; want two or more (26 at most), none "
            "empty, one label each"
        )
    return labels, texts


def _names(labels: Sequence[str], texts: Sequence[str], answer_is: str) -> Sequence[str]:
    """What an answer may be, by position."""
    known = {"letter": labels, "index": tuple(map(str, range(len(texts)))), "text": texts}
    return known[answer_is]


def name_each_other(labels: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether an option says something of other options, "Both A and B" or "None of the above":
    in another order it would say something else. In doubt it does: an order kept harms no key.
    """
    one = f"(?:{'|'.join(map(re.escape, labels))})"
    capital = rf"\(?(?<!\w){one}(?!\w)\)?"  # alone; a small one is an article: "only a fool"
    small = rf"\(?(?<!\w)(?i:{one})(?!\w)\)?"
    letters = rf"(?:(?!\(?\d){capital})"  # 1/2 is a number
    named = re.compile(
        rf"{small},? (?i:and|or|nor|but not|and/or) {small}|{letters} ?[,/&+] ?{letters}|"
        rf"{capital} (?i:only|alone)\b|\b(?i:only|options?|choices?|answers?|same as) {capital}"
    )
    return any(ABOVE.search(text) or named.search(text) for text in texts)


def _order(prompt: Prompt, seed: int, labels: Sequence[str], texts: Sequence[str]) -> list[int]:
    if name_each_other(labels, texts):
        return list(range(len(texts)))
    key = np.array([(seed << 32) ^ ORDER_STREAM, prompt.index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(len(texts)).tolist()


def list_options(
    prompt: Prompt,
    seed: int,
    column: str = "choices",
    answer_is: str = "letter",
    shuffle: bool = True,
) -> Prompt:
    """The prompt with its options written under the question, "A) text" a line, in an order drawn
    from (seed, prompt); in the order given without `shuffle`, and where they name each other.

    Labels stay in order and texts move, so a preference for a position or a letter is seen; answer
    (where there is one) and column follow.
    """
    labels, given = _labels_and_texts(prompt, column)
    order = _order(prompt, seed, labels, given) if shuffle else list(range(len(given)))
    texts = [given[i] for i in order]
    answer = prompt.answer
    if answer is not None:
        correct = order.index(read_options(prompt, column, answer_is).correct)
        answer = _names(labels, texts, answer_is)[correct]
    shown = "\n".join(f"{label}) {text}" for label, text in zip(labels, texts))
    *before, last = prompt.messages
    return replace(
        prompt,
        messages=(*before, {**last, "content": f"{last['content']}\n{shown}"}),
        answer=answer,
        extra={**prompt.extra, column: {"label": list(labels), "text": texts}},
    )
