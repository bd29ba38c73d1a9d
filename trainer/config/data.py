"""Where prompts come from: the table [data], and what [eval] shares with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .checks import positive_limit


@dataclass(frozen=True)
class SourceSection:
    """A source of prompts, and how its rows become prompts."""

    # files (.jsonl, .json, .csv, .tsv, .parquet, .txt; .gz and .zst of them), a pattern or a list
    # of them, a `datasets` folder, an id of the hub, reasoning_gym:NAME?size=..&seed=.., or
    # package.module:function
    source: str | tuple[str, ...] = ""
    split: str = "train"
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
    # write the options of a multiple-choice row under its question, in an order drawn from `seed`;
    # left out: where the shape is `choices` and an answer is generated
    list_options: bool | None = None

    def __post_init__(self):
        positive_limit(self)

    @property
    def name(self) -> str:
        """Of the source, for messages."""
        return self.source if isinstance(self.source, str) else ", ".join(self.source)


@dataclass(frozen=True)
class DataSection(SourceSection):
    """The prompts of training and of a diagnosis."""

    shuffle: bool = True  # a new order each epoch, from `seed`
    # a prompt that leaves no room for its response in a row of training.seq_len: end the run before
    # its first step, leave the row out, or drop the oldest tokens of what its user wrote
    too_long: Literal["error", "drop", "truncate_left"] = "error"
