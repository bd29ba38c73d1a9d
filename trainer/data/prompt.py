"""One question of a data set. Imports no torch: the process that grades starts with it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NoReturn


class FrozenDict(dict):
    """A dict that cannot be changed. Still a dict, for json and for chat templates."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a prompt is frozen; make another one with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


@dataclass(frozen=True)
class Prompt:
    """One question. `index` is its row in the data set: with `repeat` it identifies the prompt in a
    step and seeds its rollouts.
    """

    index: int
    # [{"role": ..., "content": ...}], the last one is the user's; none: the response is a document
    messages: tuple[Mapping[str, str], ...]
    answer: str | None = None  # what the grader compares with
    response: str | None = None  # a given text (SFT, KD on given text)
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns
    repeat: int = 0  # how often the step's batch had it before
    part: str = ""  # of a mixture: the name in [data.parts] or [eval.parts]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(map(FrozenDict, self.messages)))
        object.__setattr__(self, "extra", FrozenDict(self.extra))

    @property
    def question(self) -> str:
        """The last message."""
        return self.messages[-1]["content"] if self.messages else ""


def fill_template(template: str, **texts: str) -> str:
    """`template` with {name} replaced by the text of that name, in one pass: a {name} inside a text
    stays as it is, and so do other braces.
    """
    names = "|".join(map(re.escape, texts))
    return re.sub(rf"\{{({names})\}}", lambda found: texts[found[1]], template)


def spell(value: Any) -> str:
    """A cell of a row as a text. A number has all its digits: no one answers "1e-05"."""
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(float.__repr__(value)), "f")  # NumPy's own repr names its type
    return str(value)


@dataclass(frozen=True)
class GeneratedEntry:
    """What a scorer of reasoning_gym needs, in Prompt.extra["reasoning_gym"]. A type of its own: a
    row of a file cannot pose as one.
    """

    dataset: str
    options: Mapping[str, Any]
    entry: Mapping[str, Any]
