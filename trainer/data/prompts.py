"""Prompts from files, folders, procedural generators or a user's function; the batch of a step as a
function of seed and step.

A row has a `prompt` (text: one user message) or `messages` ([{"role", "content"}, ...]; a last
message of the assistant becomes the response), and optionally `answer` and `response`. Every other
column goes to Prompt.extra; those that mostly are part of what is asked are named in a warning.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar, overload

import numpy as np

from reflux.trainer.config.fit import nearest

from .prompt import Prompt
from .sources import LONGEST, Lines, Location, Rows, open_source, show

log = logging.getLogger(__name__)

Item = TypeVar("Item")
ROLES = ("prompt", "messages", "answer", "response")  # what a column can be; the rest is extra
# columns without which a row asks for something else
ASKING = ("instruction", "input", "context", "passage", "document", "system", "history", "schema")
ALPACA = ("instruction", "input", "output")


class Prompts(Sequence[Prompt]):
    """Rows as prompts, each read on access."""

    def __init__(self, rows: Rows, columns: Mapping[str, str], location: Location):
        self._rows, self._columns, self._location = rows, columns, location

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...

    @overload
    def __getitem__(self, i: slice) -> list[Prompt]: ...

    def __getitem__(self, i: int | slice) -> Prompt | list[Prompt]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"prompt {i} of {len(self)}")
        i = i % len(self)
        return _prompt(i, self._rows[i], self._columns, self._location(i))

    def location(self, row: int) -> str:
        """Where a row of the source, a Prompt's `index`, comes from."""
        return self._location(row)

    def of_row(self, row: int) -> Prompt:
        """The prompt of a row of the source, its `index`."""
        return self[row]

    def batch(self, step: int, count: int, *, seed: int, shuffle: bool = True) -> list[Prompt]:
        """The global batch of a step (from 0); see `epoch_indices`. A prompt that is in it twice is
        numbered, so that its rollouts differ.
        """
        seen: Counter[int] = Counter()
        prompts = []
        for i in epoch_indices(len(self), step, count, seed=seed, shuffle=shuffle):
            prompts.append(replace(self[i], repeat=seen[i]) if seen[i] else self[i])
            seen[i] += 1
        return prompts


def epoch_indices(
    length: int, step: int, count: int, *, seed: int, shuffle: bool = True
) -> list[int]:
    """Rows of the global batch of a step (from 0): entries step*count ... (step+1)*count - 1 of the
    endless sequence epoch 0, epoch 1, ..., each epoch its own permutation of all `length` rows. A
    pure function of its arguments: nothing to checkpoint, and the same on every rank of any number
    of ranks.
    """
    if step < 0 or count < 1:
        raise ValueError(f"batch: step = {step}, count = {count}; want step >= 0 and count >= 1")
    entries = (divmod(k, length) for k in range(step * count, (step + 1) * count))
    return [_permutation(length, seed, epoch)[k] if shuffle else k for epoch, k in entries]


@lru_cache(maxsize=4)  # a batch can touch two epochs
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    # RandomState's stream is frozen by numpy's policy (NEP 19). The newer generators may change in
    # a release: a run resumed after an upgrade would repeat some prompts and skip others.
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch]
    return np.random.RandomState(words).permutation(length).tolist()


def shard(prompts: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The contiguous part of a global batch that belongs to `rank`. ValueError where the parts
    would not be equal.
    """
    if len(prompts) % world:
        raise ValueError(
            f"{len(prompts)} prompts a step cannot be shared equally by {world} ranks; set prompts "
            f"per step to a multiple of {world}, for instance {-(-len(prompts) // world) * world}"
        )
    each = len(prompts) // world
    return list(prompts[rank * each : (rank + 1) * each])


def load_prompts(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    check_rows: bool = True,
) -> Prompts:
    """Opens a source of prompts.

    source: a JSONL or Parquet file; a folder written by `datasets.save_to_disk` or readable by
    `datasets.load_dataset`; `reasoning_gym:NAME?size=1000&seed=7&key=value`; or
    `package.module:function?key=value`, which returns rows (an endless generator needs `limit`).
    split: the part of a folder that has parts; files and generators have none. columns: our name ->
    the source's, {"prompt": "question"}; a source with both `prompt` and `messages` is read by
    `messages` unless `columns` names the prompt. limit: only the first rows. In a source with the
    columns instruction, input and output (Alpaca) whose prompt is `instruction`, an input that is
    not empty is joined to it as in Alpaca's template: instruction, "### Input:", input.

    JSONL rows are all checked here, unless check_rows says that they will be or were. Tables have a
    schema: their columns are checked here, a row when it is read. Raises ValueError with file, row
    and column, their value, and what is wanted.
    """
    columns = dict(columns or {})
    for role in columns:
        if role not in ROLES:
            raise ValueError(
                f"columns: unknown role {role!r}{nearest(role, ROLES)} Known: {', '.join(ROLES)}"
            )
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}; want at least 1, or none")
    rows, location = open_source(source, split, limit)
    if not len(rows):
        raise ValueError(f"{source}: no rows")
    existing = getattr(rows, "column_names", None) or list(_row(rows[0], location(0)))
    roles = _resolve(columns, existing, source)
    unused = tuple(name for name in ASKING if name in existing and name not in roles.values())
    if unused:
        _warn_of_unused(source, unused, next(iter(roles.values())))
    prompts = Prompts(rows, roles, location)
    if isinstance(rows, Lines) and check_rows:
        for _ in prompts:
            pass
    return prompts


@lru_cache  # once each
def _warn_of_unused(source: str, columns: tuple[str, ...], body: str) -> None:
    log.warning(
        "%s: column%s not in the prompt, which is column %s alone; write what belongs to the "
        "question into one column",
        source,
        f"s {', '.join(columns)} are" if len(columns) > 1 else f" {columns[0]} is",
        body,
    )


# --- rows


def _resolve(columns: Mapping[str, str], existing: list[str], source: str) -> dict[str, str]:
    """Role -> column; a role that `columns` does not name keeps its own name."""
    named = [role for role in ("prompt", "messages") if role in columns]
    if len(named) == 2:
        raise ValueError(
            f"columns: both prompt and messages are named; {source} is read by one of them"
        )
    body = named[0] if named else "messages" if "messages" in existing else "prompt"
    roles = {role: columns.get(role, role) for role in (body, "answer", "response")}
    for role, column in roles.items():
        if column not in existing and (role == body or role in columns):
            raise ValueError(
                f"{source}: no column {column!r}{nearest(column, existing)} There are: "
                f'{", ".join(existing)}. Name it: columns = {{{role} = "..."}}'
            )
    if roles.get("prompt") == "instruction" and all(name in existing for name in ALPACA):
        roles["input"] = "input"
    return roles


def _prompt(index: int, row: Mapping, columns: Mapping[str, str], location: str) -> Prompt:
    body = next(iter(columns))
    if columns[body] not in _row(row, location):
        raise ValueError(
            f"{location}: no column {columns[body]!r}{nearest(columns[body], row)} "
            f"There are: {', '.join(map(str, row))}"
        )
    response = _text(row.get(columns["response"]), f"{location}, column {columns['response']}")
    where = f"{location}, column {columns[body]}"
    if body == "prompt":
        text = _text(row[columns[body]], where)
        if not text:
            raise ValueError(f"{where}: {show(text)}; want a text")
        if "input" in columns:
            more = _text(row.get(columns["input"]), f"{location}, column {columns['input']}")
            text += f"\n\n### Input:\n{more}" if more and more.strip() else ""
        messages: tuple[dict[str, str], ...] = ({"role": "user", "content": text},)
    else:
        messages, last = _conversation(row[columns[body]], where)
        if last is not None and response is not None:
            raise ValueError(
                f"{where}: its last message is the assistant's, and column {columns['response']} "
                "holds a response too; want one of them"
            )
        response = last if response is None else response
    answer = row.get(columns["answer"])
    if isinstance(answer, int | float):
        answer = str(answer)
    answer = _text(answer, f"{location}, column {columns['answer']}")
    extra = {key: value for key, value in row.items() if key not in columns.values()}
    return Prompt(index, messages, answer, response, extra)


def _row(row: Any, location: str) -> Mapping:
    if not isinstance(row, Mapping):
        raise ValueError(f"{location}: {show(row)}; want a row, a mapping of columns")
    return row


def _text(value: Any, where: str) -> str | None:
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


def _conversation(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    """The messages up to the last one of the user, and the assistant's message behind it."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{where}: {show(value)}; want a list of messages, {{"role": ..., "content": ...}}'
        )
    for k, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'{where}: message {k} is {show(message)}; want {{"role": ..., "content": ...}}'
            )
        if _text(message.get("content"), f"{where}, message {k}") is None:
            raise ValueError(
                f"{where}: message {k} has no content; it has {', '.join(map(str, message))}"
            )
    messages = tuple({key: v for key, v in message.items() if v is not None} for message in value)
    last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    messages = messages if last is None else messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        whose = f"the {messages[-1]['role']}'s" if messages else "missing"
        raise ValueError(f"{where}: the message to answer is {whose}; want the user's")
    return messages, last
