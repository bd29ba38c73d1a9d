"""Where prompts come from: the table [data], and what [eval] shares with it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .checks import above_zero, positive_limit
from .sections import TaskSection

PART = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class SourceSection:
    """A source of prompts, and how its rows become prompts."""

    # files (.jsonl, .json, .csv, .tsv, .parquet, .txt; .gz and .zst of them), a pattern or a list
    # of them, a `datasets` folder, an id of the hub, reasoning_gym:NAME?size=..&seed=.., or
    # package.module:function
    source: str | tuple[str, ...] = ""
    split: str = "train"  # of a Hugging Face data set
    subset: str = ""  # of a data set of the hub that has several
    revision: str = ""  # of a data set of the hub: a commit or tag
    # what its columns mean (data/shapes.py); auto: told by their names
    shape: Literal[
        "auto",
        "plain",
        "messages",
        "sharegpt",
        "preference",
        "completion",
        "instruction",
        "choices",
        "question",
        "text",
    ] = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> the source's column
    limit: int | None = None  # first rows only
    system: str = ""  # a system message for conversations that have none
    # write the options of a multiple-choice row under its question, in an order drawn from `seed`,
    # or as given where they name each other ("All of the above"); "given": always as given. Left
    # out: true where the shape is `choices` and an answer is generated
    list_options: bool | Literal["given"] | None = None

    def __post_init__(self):
        positive_limit(self)

    @property
    def name(self) -> str:
        """Of the source, for messages; of all parts where there are some."""
        parts: Mapping[str, SourceSection] = getattr(self, "parts", {})
        if parts:
            return ", ".join(part.name for part in parts.values())
        return self.source if isinstance(self.source, str) else ", ".join(self.source)


@dataclass(frozen=True)
class PartSection(SourceSection):
    """One part of a mixture, [data.parts.NAME]."""

    weight: float = 1.0  # of a step's prompts, against the other parts'
    task: TaskSection = TaskSection()  # its own grader; without a name that of [task]

    def __post_init__(self):
        super().__post_init__()
        above_zero(self, "weight")
        if not self.source:
            raise ValueError("source is missing; want the prompts of this part")


@dataclass(frozen=True)
class EvalPartSection(SourceSection):
    """One part of an evaluation, [eval.parts.NAME]."""

    split: str = "test"  # of a Hugging Face data set
    # without a name that of the part of [data] that is called alike, else that of [task]
    task: TaskSection = TaskSection()

    def __post_init__(self):
        super().__post_init__()
        if not self.source:
            raise ValueError("source is missing; want the questions of this part")


def check_parts(section: "DataSection | SourceSection", parts: Mapping[str, SourceSection]) -> None:
    """ValueError for a source beside parts, and for names that cannot stand in a metric's name."""
    if parts and section.source:
        raise ValueError(
            f"source = {section.name!r} beside parts {', '.join(parts)}; want one of them: make "
            "the source a part, too"
        )
    for name in parts:
        if not PART.fullmatch(name):
            raise ValueError(f"parts: the name {name!r}; want letters, digits, - and _")


@dataclass(frozen=True)
class DataSection(SourceSection):
    """The prompts of training and of a diagnosis."""

    # a mixture instead of one source: [data.parts.NAME] with source, weight and task
    parts: Mapping[str, PartSection] = field(default_factory=dict)

    shuffle: bool = True  # a new order each epoch, from `seed`
    # a prompt that leaves no room for its response in a row of training.seq_len: end the run before
    # its first step, leave the row out, or drop the oldest tokens of what its user wrote
    too_long: Literal["error", "drop", "truncate_left"] = "error"

    def __post_init__(self):
        super().__post_init__()
        check_parts(self, self.parts)
