"""Prompts from files, folders, procedural generators or a user's function; the batch of a step
without any state.

A row has a `prompt` (text: one user message) or `messages` ([{"role", "content"}, ...]; a last
message of the assistant becomes the response), and optionally `answer` and `response`. Every other
column goes to Prompt.extra.
"""

import ast
import importlib
import json
import mmap
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from .batch import Prompt

ROLES = ("prompt", "messages", "answer", "response")  # what a column can be; the rest is extra
FORMS = (
    "a .jsonl or .parquet file, a folder of a data set, reasoning_gym:NAME?size=1000&seed=7 "
    "or package.module:function"
)


class Prompts(Sequence):
    """Rows seen as prompts, each read when it is asked for. `location(i)` says in words where row i
    comes from.
    """

    def __init__(
        self, rows: Sequence[Mapping], columns: Mapping[str, str], location: Callable[[int], str]
    ):
        self._rows, self._columns, self._location = rows, columns, location

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Prompt:
        if not -len(self) <= i < len(self):
            raise IndexError(f"prompt {i} of {len(self)}")
        i = i % len(self)
        return _prompt(i, self._rows[i], self._columns, self._location(i))

    def batch(self, step: int, count: int, *, seed: int, shuffle: bool = True) -> list[Prompt]:
        """The global batch of a step (from 0); see `epoch_indices`."""
        return [self[i] for i in epoch_indices(len(self), step, count, seed=seed, shuffle=shuffle)]


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
    spots = (divmod(k, length) for k in range(step * count, (step + 1) * count))
    return [_permutation(length, seed, epoch)[row] if shuffle else row for epoch, row in spots]


@lru_cache(maxsize=4)  # a batch can touch two epochs
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    # RandomState's stream is frozen by numpy's policy (NEP 19); the newer generators may change
    # with a release, and a run resumed after an upgrade would then repeat some prompts and skip
    # others.
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch]
    return np.random.RandomState(words).permutation(length).tolist()


def shard(prompts: Sequence[Prompt], rank: int, world: int) -> list[Prompt]:
    """The contiguous part of a global batch that belongs to `rank`; parts are equal, so ranks stay
    in step.
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
) -> Prompts:
    """Open a source of prompts.

    source: a JSONL or Parquet file; a folder written by `datasets.save_to_disk` or readable by
    `datasets.load_dataset`;
      `reasoning_gym:NAME?size=1000&seed=7&key=value`; or `package.module:function?key=value`, which
      returns rows (an endless generator needs `limit`).
    split: the part of a folder that has parts; files and generators have none.
    columns: where a role is kept under another name, {"prompt": "question"}. A row set with both
    `prompt` and
      `messages` is read by `messages` unless `columns` names the prompt.
    limit: only the first rows.

    JSONL rows are all checked here. Tables have a schema, so their columns are checked here and a
    row when it is read. Raises ValueError naming file, row and column, what was found and what is
    wanted.
    """
    columns = dict(columns or {})
    for role in columns:
        if role not in ROLES:
            raise ValueError(
                f"columns: unknown role {role!r}{nearest(role, ROLES)} Known: {', '.join(ROLES)}"
            )
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}; want at least 1, or none")
    rows, location = _open(source, split, limit)
    if not len(rows):
        raise ValueError(f"{source}: no rows")
    first = rows.column_names if hasattr(rows, "column_names") else _row(rows[0], location(0))
    prompts = Prompts(rows, _resolve(columns, list(first), source), location)
    if isinstance(rows, _Lines):
        for _ in prompts:
            pass
    return prompts


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: `, did you mean X?` or a full stop."""
    near = get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else "."


def load_function(name: str) -> Callable:
    """`package.module:function` -> the function; modules in the working directory are found too."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        # a script's own folder is on the path, where it was started is not
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{name}: cannot import {module_name} ({error}); is it installed, or in {os.getcwd()}?"
        ) from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(
            f"{name}: {module_name} has no function {attribute!r}{nearest(attribute, vars(module))}"
        )
    return getattr(module, attribute)


# --- sources: each gives rows (len, [i] -> Mapping) and says where row i is


def _open(
    source: str, split: str, limit: int | None
) -> tuple[Sequence[Mapping], Callable[[int], str]]:
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".parquet"):
        rows = _table(path, split)
        return rows.select(
            range(min(limit or len(rows), len(rows)))
        ), lambda i: f"{source}, row {i} (from 0)"
    if path.is_file():
        lines = _Lines(path, limit)
        return lines, lambda i: f"{source}, line {lines.number[i]}"
    name, _, query = source.partition("?")
    if name.startswith("reasoning_gym:"):
        return _Generated(
            name.partition(":")[2], _options(source, query), limit
        ), lambda i: f"{source}, entry {i}"
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        rows = load_function(name)(**_options(source, query))
        if not isinstance(rows, Sequence) or limit is not None:
            rows = list(islice(rows, limit))
        return rows, lambda i: f"{source}, row {i} (from 0)"
    raise ValueError(f"{source}: no such file or folder; want {FORMS}")


class _Lines(Sequence):
    """The rows of a JSONL file, parsed on access; the ranks of a machine share its pages."""

    def __init__(self, path: Path, limit: int | None):
        self.path, self.number, self._start = path, array("Q"), array("Q")
        at = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(b"\xef\xbb\xbf").strip():
                    self.number.append(number)
                    self._start.append(at)
                at += len(line)
                if len(self.number) == limit:
                    break
            self._bytes = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.number else b""
            )

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, i: int) -> dict:
        end = self._bytes.find(b"\n", self._start[i])
        line = self._bytes[self._start[i] : end if end >= 0 else None]
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # not UTF-8, or not JSON
            raise ValueError(
                f"{self.path}, line {self.number[i]}: {error}; want one JSON object a line, in "
                "UTF-8"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path}, line {self.number[i]}: {_show(row)}; want one JSON object a line"
            )
        return row


def _table(path: Path, split: str):
    """Memory-mapped Arrow rows; a Parquet file is converted once into the cache of `datasets`."""
    import datasets  # 1.5 s to import: only who needs it pays

    if path.is_file():
        return datasets.Dataset.from_parquet(str(path))
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ValueError(
            f"{path}: no split {split!r}{nearest(split, found)} There are: {', '.join(found)}"
        )
    return found[split]


class _Generated(Sequence):
    """Entries of a reasoning_gym data set, made on access from (seed, index), with what its scorer
    needs.
    """

    def __init__(self, name: str, options: dict, limit: int | None):
        from reasoning_gym.factory import DATASETS, create_dataset

        if name not in DATASETS:
            raise ValueError(f"reasoning_gym has no data set {name!r}{nearest(name, DATASETS)}")
        known = [f.name for f in fields(DATASETS[name][1])]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"reasoning_gym:{name}: unknown option {key}{nearest(key, known)} Known: "
                    f"{', '.join(known)}"
                )
        options = {"seed": 0, **options}  # its own default draws a seed, another one on every rank
        if not isinstance(options["seed"], int):
            raise ValueError(
                f"reasoning_gym:{name}: seed = {options['seed']!r}; want an integer, the same on "
                "every rank"
            )
        try:
            self._entries = create_dataset(name, **options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"reasoning_gym:{name}: {options} was refused: {error}") from error
        self._name, self._options = name, options
        self._length = min(limit or len(self._entries), len(self._entries))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict:
        entry = self._entries[i]
        return {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "reasoning_gym": {"dataset": self._name, "options": self._options, "entry": entry},
        }


def _options(source: str, query: str) -> dict[str, Any]:
    """`size=1000&ops=["+"]&easy=true` -> Python values; what is no literal stays text."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError(
            f"{source}: cannot read the options {query!r}; want key=value&key=value"
        ) from None
    return {key: _literal(value) for key, value in pairs}


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


# --- rows


def _resolve(columns: Mapping[str, str], existing: list[str], source: str) -> dict[str, str]:
    """Role -> column. Roles that nobody renamed keep their own name."""
    asked = [role for role in ("prompt", "messages") if role in columns]
    if len(asked) == 2:
        raise ValueError(
            f"columns: both prompt and messages are named; {source} is read by one of them"
        )
    body = asked[0] if asked else "messages" if "messages" in existing else "prompt"
    roles = {role: columns.get(role, role) for role in (body, "answer", "response")}
    for role, column in roles.items():
        if column not in existing and (role == body or role in columns):
            raise ValueError(
                f"{source}: no column {column!r}{nearest(column, existing)} There are: "
                f'{", ".join(existing)}. Name the right one: columns = {{{role} = "..."}}'
            )
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
            raise ValueError(f"{where}: {_show(text)}; want a text")
        messages = ({"role": "user", "content": text},)
    else:
        messages, said = _conversation(row[columns[body]], where)
        if said is not None and response is not None:
            raise ValueError(
                f"{where}: its last message is the assistant's, and column {columns['response']} "
                "holds a response too; want one of them"
            )
        response = said if response is None else response
    answer = row.get(columns["answer"])
    answer = (
        str(answer)
        if isinstance(answer, int | float)
        else _text(answer, f"{location}, column {columns['answer']}")
    )
    extra = {key: value for key, value in row.items() if key not in columns.values()}
    return Prompt(index, messages, answer, response, extra)


def _row(row: Any, location: str) -> Mapping:
    if not isinstance(row, Mapping):
        raise ValueError(f"{location}: {_show(row)}; want a row, a mapping of columns")
    return row


def _text(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        fix = (
            ' Is it a list of messages? Then columns = {messages = "..."}'
            if isinstance(value, list)
            else ""
        )
        raise ValueError(f"{where}: {_show(value)}; want a text.{fix}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # half of a \ud83d\ude00 pair: every tokenizer refuses it, but hours later
        raise ValueError(
            f"{where}: a lone surrogate at character {error.start}, no valid Unicode; repair the "
            "text"
        ) from None
    return value


def _conversation(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    """The messages up to the last one of the user, and what the assistant answered to it."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{where}: {_show(value)}; want a list of messages, {{"role": ..., "content": ...}}'
        )
    for k, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'{where}: message {k} is {_show(message)}; want {{"role": ..., "content": ...}}'
            )
        if _text(message.get("content"), f"{where}, message {k}") is None:
            raise ValueError(
                f"{where}: message {k} has no content; it has {', '.join(map(str, message))}"
            )
    messages = tuple({key: v for key, v in message.items() if v is not None} for message in value)
    said = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    messages = messages if said is None else messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        last = f"the {messages[-1]['role']}'s" if messages else "missing"
        raise ValueError(f"{where}: the message to answer is {last}; want the user's")
    return messages, said


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
