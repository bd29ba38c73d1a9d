"""One row of a source, read column by column: what is wrong is a ValueError with file, row, column,
the value, and what is wanted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reflux.trainer.config.fit import nearest

from .prompt import spell
from .sources import LONGEST, show

Message = Mapping[str, str]
EXACT = 2.0**53  # below it every whole number is a float
SPEAKERS = {  # names that ShareGPT files use -> the roles of chat templates
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Row:
    """values: column -> value. location: of the row, for messages. names: what a user calls a
    column -> the source's own name of it.
    """

    values: Mapping[str, Any]
    location: str
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise ValueError(
                f"{self.location}: {show(self.values)}; want a row, a mapping of columns"
            )

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def value(self, column: str) -> Any:
        """None where there is none."""
        return self.values.get(self.name(column))

    def where(self, column: str) -> str:
        return f"{self.location}, column {self.name(column)}"

    def text(self, column: str) -> str | None:
        """None where there is none."""
        return read_text(self.value(column), self.where(column))

    def answer(self, column: str) -> str | None:
        """As `text`; numbers are texts, of all their digits. A column of whole numbers comes as
        floats where one of them is missing: 42.0 is 42, and NaN is none.
        """
        value = self.value(column)
        if isinstance(value, float) and (math.isnan(value) or abs(value) < EXACT):
            value = None if math.isnan(value) else int(value) if value.is_integer() else value
        if isinstance(value, int | float):
            value = spell(value)
        return read_text(value, self.where(column))

    def require(self, column: str) -> None:
        """ValueError where the row has no such column."""
        name = self.name(column)
        if name not in self.values:
            raise ValueError(
                f"{self.location}: no column {name!r}{nearest(name, self.values)} "
                f"There are: {', '.join(map(str, self.values))}"
            )

    def question(self, column: str) -> str:
        """A text that is not empty."""
        self.require(column)
        text = self.text(column)
        if not text:
            raise ValueError(f"{self.where(column)}: {show(text)}; want a text")
        return text

    def conversation(self, column: str) -> tuple[tuple[Message, ...], str | None]:
        """The messages up to the last one of the user, and the assistant's message behind it."""
        self.require(column)
        return read_conversation(self.value(column), self.where(column))

    def turns(self, column: str) -> list[dict[str, str]]:
        """Messages in the form of ShareGPT, {"from": ..., "value": ...}, or of OpenAI."""
        self.require(column)
        value, where = self.value(column), self.where(column)
        if not isinstance(value, list) or not value:
            raise ValueError(
                f'{where}: {show(value)}; want a list of turns, {{"from": ..., "value": ...}}'
            )
        return [_turn(turn, f"{where}, turn {k}") for k, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f'{where}: {show(turn)}; want {{"from": ..., "value": ...}}')
    speaker = turn.get("from", turn.get("role"))
    if speaker not in SPEAKERS:
        raise ValueError(f"{where}: from {show(speaker)}; want one of {', '.join(SPEAKERS)}")
    content = turn.get("value", turn.get("content"))
    return {"role": SPEAKERS[speaker], "content": _content(content, where)}


def read_text(value: Any, where: str) -> str | None:
    """A text that a tokenizer takes; None stays None."""
    if value is None:
        return None
    if not isinstance(value, str):
        fix = ' Is it a list of messages? Then columns = {messages = "..."}'
        fix = fix if isinstance(value, list) else ""
        raise ValueError(f"{where}: {show(value)}; want a text.{fix}")
    if len(value) > LONGEST:
        raise ValueError(f"{where}: {len(value):,} characters; want at most {LONGEST:,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # half of a \ud83d\ude00 pair: no tokenizer takes it, and a run would fail hours later
        raise ValueError(
            f"{where}: a lone surrogate at character {error.start}, which is no valid Unicode; "
            "repair the text"
        ) from None
    return value


def read_conversation(value: Any, where: str) -> tuple[tuple[Message, ...], str | None]:
    """Messages of the OpenAI form; contents may be lists of text parts. An assistant's last message
    that is not to be trained on is no response. ValueError for tool calls and for parts that are no
    text.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{where}: {show(value)}; want a list of messages, {{"role": ..., "content": ...}}'
        )
    messages = tuple(_message(message, where, k) for k, message in enumerate(value))
    last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    messages = messages if last is None else messages[:-1]
    last = None if last is not None and is_left_out(value[-1]) else last
    if not messages or messages[-1]["role"] != "user":
        whose = f"the {messages[-1]['role']}'s" if messages else "missing"
        raise ValueError(f"{where}: the message to answer is {whose}; want the user's")
    return messages, last


def is_left_out(message: Mapping[str, Any]) -> bool:
    """From training: "train": false, as axolotl's files have it, or "weight": 0, as OpenAI's."""
    marks = message.get("train"), message.get("training"), message.get("weight")
    return any(mark is not None and not mark for mark in marks)


def _message(message: Any, where: str, k: int) -> dict[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f'{where}: message {k} is {show(message)}; want {{"role": ..., "content": ...}}'
        )
    if message.get("tool_calls") or message.get("function_call") or message["role"] == "tool":
        raise ValueError(
            f"{where}: message {k} calls a tool or answers for one; conversations with tools "
            "cannot be trained on. Leave such rows out"
        )
    if message.get("content") is None:
        raise ValueError(
            f"{where}: message {k} has no content; it has {', '.join(map(str, message))}"
        )
    kept = {key: v for key, v in message.items() if v is not None}
    return {**kept, "content": _content(message["content"], f"{where}, message {k}")}


def _content(value: Any, where: str) -> str:
    """A text, or the texts of a list of parts, joined."""
    if isinstance(value, list):
        value = "".join(_part(part, where) for part in value)
    text = read_text(value, where)
    if text is None:
        raise ValueError(f"{where}: no content; want a text")
    return text


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else show(part)
        raise ValueError(
            f"{where}: a part of its content is {kind}; only text can be trained on. Leave rows "
            "with images, sound or tools out"
        )
    return text
