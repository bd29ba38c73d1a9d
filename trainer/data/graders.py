"""One grader per task, (prompt, text) -> Grade. They may raise and take long; tasks.py puts them
under limits. `cannot_hang` marks those whose time is linear in the text, `evaluates` those that may
run what it says, themselves or by a library.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .math_answers import (
    names_another_thing,
    read_answer,
    read_latex,
    read_reference,
    read_text,
    spelling,
)
from .option_letters import decided_letter
from .options import read_label
from .prompt import GeneratedEntry, Prompt, spell

NO_ANSWER = 'the prompt has no answer; name its column: columns = {answer = "..."}'


@dataclass(frozen=True)
class Grade:
    """What a grader says of a response."""

    reward: float
    correct: bool | None  # None: the task has no correct and incorrect (reward models)
    extracted: str | None = None  # the answer; None: the response has none
    error: str | None = None  # why grading failed; reward and correct mean nothing then
    graded: bool = True  # False: a truncated text that no grader saw

    @property
    def failed(self) -> bool:
        """It leaves its group: see failed_grades.py."""
        return self.error is not None


@dataclass(frozen=True)
class Answer:
    """The answer within a text: what follows the last `marker`, group 1 of the last match of the
    regular expression `pattern`, or, without either, the whole text.
    """

    evaluates: ClassVar[bool] = False  # may run what the text says
    marker: str | None = None
    pattern: str | None = None

    def __post_init__(self):
        if self.marker == "" or (self.marker is not None and self.pattern is not None):
            raise ValueError(
                f"marker = {self.marker!r}, pattern = {self.pattern!r}; want a marker, a pattern "
                "or neither"
            )
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern = {self.pattern!r}: {error}") from error
            if groups < 1:
                raise ValueError(
                    f"pattern = {self.pattern!r} has no group; put the answer in parentheses"
                )

    @property
    def cannot_hang(self) -> bool:
        return self.pattern is None  # a user's expression can take exponential time

    def extract(self, text: str) -> str | None:
        if self.pattern is not None:
            matches = list(re.finditer(self.pattern, text))
            return (matches[-1][1] or "").strip() or None if matches else None
        if self.marker is not None:
            before, marker, text = text.rpartition(self.marker)
            if not marker:
                return None
        return text.strip() or None

    def gold(self, prompt: Prompt) -> str:
        """The prompt's answer, or what follows the last marker in it: a worked solution, as GSM8K
        has it ("... #### 42").
        """
        answer = _answer(prompt)
        if self.marker is None or self.marker not in answer:
            return answer.strip()
        gold = answer.rpartition(self.marker)[2].strip()
        if not gold:
            raise ValueError(
                f"the prompt's answer ends with the marker {self.marker!r}: {answer[-60:]!r}; want "
                "the answer behind it"
            )
        return gold


@dataclass(frozen=True)
class Exact(Answer):
    """Correct if the extracted text is the prompt's answer, or one of its other accepted ones, all
    stripped. A marker is applied to the text and to the answer.
    """

    ignore_case: bool = False
    aliases: str | None = None  # the column with a list of other accepted answers of the row

    def __call__(self, prompt: Prompt, text: str) -> Grade:
        extracted, accepted = self.extract(text), (self.gold(prompt), *self._others(prompt))
        if extracted is None:
            return Grade(0.0, False)
        correct = self._folded(extracted) in map(self._folded, accepted)
        return Grade(float(correct), correct, extracted)

    def _folded(self, text: str) -> str:
        """One letter may be written as one character, or with a combining mark behind it."""
        text = unicodedata.normalize("NFC", text)
        return text.casefold() if self.ignore_case else text

    def _others(self, prompt: Prompt) -> list[str]:
        if self.aliases is None:
            return []
        given = prompt.extra.get(self.aliases)
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(
                f"column {self.aliases!r} has {given!r:.80}; want a list of accepted answers. The "
                f"row has: {', '.join(prompt.extra) or 'no other columns'}"
            )
        return [spell(other).strip() for other in given]


@dataclass(frozen=True)
class Math(Answer):
    """Correct if the expressions are equal by math_verify, or the texts are. The prompt's answer,
    and what a marker or a pattern finds, is read as LaTeX or as the one number among its words
    (math_answers.py). A prompt's answer that cannot be read is a failed grade.
    """

    evaluates: ClassVar[bool] = True
    cannot_hang: ClassVar[bool] = False  # simplification of a hostile expression has no bound

    def warm_up(self) -> None:
        """Imports what grading needs."""
        read_text("$1$")

    def __call__(self, prompt: Prompt, text: str) -> Grade:
        from math_verify import verify

        answer = self.gold(prompt)
        wanted = read_reference(answer)
        extracted = self.extract(text)
        if extracted is None:
            return Grade(0.0, False)
        if extracted == answer:
            return Grade(1.0, True, extracted)
        whole_text = self.marker is None and self.pattern is None
        readings = [read_text(extracted)] if whole_text else read_answer(extracted)
        if not whole_text and names_another_thing(extracted, answer):
            readings, wanted = [read_latex(extracted)], [read_latex(answer)]
        for reading in filter(None, readings):
            spelled = spelling(reading) or extracted
            # Its own timeouts are off: they are whole seconds, share SIGALRM with ours and work in
            # no other thread.
            if spelled == answer or any(
                verify(gold, reading, timeout_seconds=None) for gold in wanted
            ):
                return Grade(1.0, True, spelled)
        if not any(readings):
            return Grade(0.0, False, None if whole_text else extracted)
        return Grade(0.0, False, spelling(readings[0]) or extracted)


@dataclass(frozen=True)
class MultipleChoice:
    """Correct if the letter that the text decides for is the answer's (option_letters.py)."""

    evaluates: ClassVar[bool] = False
    cannot_hang: ClassVar[bool] = True
    # the column with the options: a list of texts, or {"label": [...], "text": [...]}
    choices: str = "choices"
    # what the answer column holds: letter | index (from 0) | text (of the option)
    answer_is: str = "letter"

    def __post_init__(self):
        if self.answer_is not in ("letter", "index", "text"):
            raise ValueError(f"answer_is = {self.answer_is!r}; want letter, index or text")

    def __call__(self, prompt: Prompt, text: str) -> Grade:
        letters, texts = self._options(prompt)
        answer = _answer(prompt).strip()
        names: Sequence[str] = letters
        if self.answer_is != "letter":
            names = texts if self.answer_is == "text" else [str(i) for i in range(len(texts))]
        else:
            answer = read_label(answer)
        # a list: "BC" is a part of "ABCD", and -1, as of hidden labels, is no last option
        if answer not in list(names):
            raise ValueError(
                f"answer {answer!r} is none of {', '.join(names)}; set answer_is to letter, index "
                "or text"
            )
        letter = decided_letter(text, letters)
        correct = letter == letters[list(names).index(answer)]
        return Grade(float(correct), correct, letter)

    def _options(self, prompt: Prompt) -> tuple[str, list[str]]:
        given = prompt.extra.get(self.choices)
        if given is None:
            if self.answer_is != "letter":
                raise ValueError(
                    f"no column {self.choices!r} with the options; there are: "
                    f"{', '.join(prompt.extra)}"
                )
            return "ABCDEFGHIJ", []
        if isinstance(given, Mapping):
            labels = list(map(read_label, given["label"]))
            if any(len(label) != 1 for label in labels):
                raise ValueError(
                    f"labels {', '.join(labels)}; want one letter or digit each, to be found in a "
                    "text. By likelihood (eval.by) they may be longer"
                )
            return "".join(labels), list(map(spell, given["text"]))
        return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(given)], list(map(spell, given))


@dataclass(frozen=True)
class Instructions:
    """Reward: the fraction of a row's verifiable instructions that the text follows
    (instructions.py); correct where it follows all of them.
    """

    evaluates: ClassVar[bool] = False
    cannot_hang: ClassVar[bool] = True
    # columns: names of the instructions, and a table of options for each
    kinds: str = "instruction_id_list"
    options: str = "kwargs"

    def __call__(self, prompt: Prompt, text: str) -> Grade:
        from .instructions import follows

        kinds, options = prompt.extra.get(self.kinds), prompt.extra.get(self.options)
        if not kinds or options is None or len(options) != len(kinds):
            raise ValueError(
                f"columns {self.kinds!r} and {self.options!r}: {kinds!r:.80}, {options!r:.80}; "
                "want names of instructions, and as many tables of options"
            )
        followed = [follows(kind, text, given or {}) for kind, given in zip(kinds, options)]
        names = ", ".join(kind for kind, ok in zip(kinds, followed) if ok)
        return Grade(sum(followed) / len(followed), all(followed), names or None)


@dataclass(frozen=True)
class ReasoningGym(Answer):
    """Reward: the data set's score of the answer, in [0, 1]; correct from `threshold` on. The
    answer is extracted by marker or pattern, else from the last <answer>...</answer>, or is the
    whole text.
    """

    evaluates: ClassVar[bool] = True
    cannot_hang: ClassVar[bool] = False
    whole_text: bool = False  # True: no tags, the text is the answer
    threshold: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}; want 0 < threshold <= 1")

    def warm_up(self) -> None:
        """Imports what grading needs."""
        import reasoning_gym.factory  # noqa: F401

    def __call__(self, prompt: Prompt, text: str) -> Grade:
        from .reasoning_gym_scorers import score_answer

        generated = prompt.extra.get("reasoning_gym")
        if not isinstance(generated, GeneratedEntry):
            raise ValueError(
                "the prompt is no reasoning_gym entry; load it from reasoning_gym:NAME?size=..."
            )
        tagged = self.marker is None and self.pattern is None and not self.whole_text
        extracted = self._tagged(text) if tagged else self.extract(text)
        if extracted is None:
            return Grade(0.0, False)
        reward = score_answer(_source(generated), extracted, generated.entry)
        return Grade(reward, reward >= self.threshold, extracted)

    @staticmethod
    def _tagged(text: str) -> str | None:
        _, opening, behind = text.rpartition("<answer>")
        inside, closing, _ = behind.partition("</answer>")
        return (inside.strip() or None) if opening and closing else None


@dataclass(frozen=True)
class Function:
    """A user's f(prompt, text). bool: correct or not. float: a reward, correct from `threshold` on
    if that is set.
    """

    function: Callable[[Prompt, str], "bool | float | Grade"]
    threshold: float | None = None

    def __call__(self, prompt: Prompt, text: str) -> Grade:
        return read_grade(self.function(prompt, text), self.threshold)


def has_answer(prompt: Prompt) -> bool:
    return prompt.answer is not None and bool(prompt.answer.strip())


def _answer(prompt: Prompt) -> str:
    if not has_answer(prompt):
        raise ValueError(NO_ANSWER)
    assert prompt.answer is not None
    return prompt.answer


_sources: dict[str, Any] = {}  # the data sets that entries came from, of which a run has few


def _source(generated: GeneratedEntry) -> Any:
    key = repr((generated.dataset, generated.options))
    if key not in _sources:
        from reasoning_gym.factory import create_dataset

        _sources[key] = create_dataset(generated.dataset, **generated.options)
    return _sources[key]


def read_grade(result: Any, threshold: float | None = None) -> Grade:
    """The result of a user's function or of a reward model as a Grade of a finite reward."""
    if isinstance(result, Exception):
        raise result
    if isinstance(result, Grade):
        grade = result
    elif isinstance(result, bool | np.bool_):
        grade = Grade(float(result), bool(result))
    else:
        grade = Grade(float(result), None if threshold is None else float(result) >= threshold)
    if not math.isfinite(grade.reward):
        raise ValueError(f"reward {grade.reward}; want a finite number")
    return grade
