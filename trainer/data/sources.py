"""Sources of rows: files, folders, generators and functions; each gives rows and their locations.

Rows are read on access. A source that cannot be read is a ValueError that names the file and line.
"""

import ast
import importlib
import json
import mmap
import os
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from reflux.trainer.config.explain import explain
from reflux.trainer.config.fit import nearest

from .prompt import GeneratedEntry

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST = 2**25  # bytes of a line, characters of a text: more is no prompt, but a mistake
FORMS = (
    "a .jsonl or .parquet file, a folder of a data set, reasoning_gym:NAME?size=1000&seed=7 "
    "or package.module:function"
)


class Rows(Protocol):
    """Rows of a source, each read on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


Location = Callable[[int], str]  # row number -> where it comes from, for error messages


def open_source(source: str, split: str, limit: int | None) -> tuple[Rows, Location]:
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".parquet"):
        table = _table(path, split)
        return table.select(range(min(limit or len(table), len(table)))), partial(_row_of, source)
    if path.is_file():
        lines = Lines(path, limit)
        return lines, lines.location
    name, _, query = source.partition("?")
    if name.startswith("reasoning_gym:"):
        entries = _Generated(name.partition(":")[2], _options(source, query), limit)
        return entries, partial(_entry_of, source)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        function, options = load_function(name), _options(source, query)
        try:
            rows = function(**options)
            if not isinstance(rows, Sequence) or limit is not None:
                rows = list(islice(rows, limit))
        except Exception as error:
            raise ValueError(f"{source}: the function failed with {explain(error)}") from error
        return rows, partial(_row_of, source)
    hint = ""
    if HUB_ID.fullmatch(source):
        hint = (
            f". Data sets of the hub are not downloaded: hf download {source} --repo-type dataset"
        )
        hint += f" --local-dir {source}"
    raise ValueError(f"{source}: no such file or folder; want {FORMS}{hint}")


def _row_of(source: str, i: int) -> str:
    return f"{source}, row {i} (from 0)"


def _entry_of(source: str, i: int) -> str:
    return f"{source}, entry {i}"


class Lines:
    """The rows of a JSONL file, parsed on access; the ranks of a machine share its pages."""

    def __init__(self, path: Path, limit: int | None):
        self._path, self._number, self._start = path, array("Q"), array("Q")
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), 1):
                if len(line) > LONGEST:
                    raise ValueError(
                        f"{path}, line {number}: more than {LONGEST:,} bytes; want one JSON object "
                        "a line. A JSON array of all rows has to be written as lines"
                    )
                if line.removeprefix(b"\xef\xbb\xbf").strip():
                    self._number.append(number)
                    self._start.append(start)
                start += len(line)
                if len(self._number) == limit:
                    break
            self._bytes: mmap.mmap | bytes = b""
            if self._number:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._number)

    def location(self, i: int) -> str:
        return f"{self._path}, line {self._number[i]}"

    def __getitem__(self, i: int) -> dict:
        end = self._bytes.find(b"\n", self._start[i])
        line = self._bytes[self._start[i] : end if end >= 0 else None]
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
            raise ValueError(
                f"{self.location(i)}: {error}; want one JSON object a line, in UTF-8"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.location(i)}: {show(row)}; want one JSON object a line")
        return row


def _table(path: Path, split: str) -> Any:
    """Memory-mapped Arrow rows; a Parquet file is converted once into the cache of `datasets`."""
    import datasets  # here: it takes 1.5 s to import

    _check_parquet(path)
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    try:
        if path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        table = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # of datasets, pyarrow, and what they are built on
        cause = error.__cause__ or error
        what = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
        raise ValueError(
            f"{path}: no data set that can be read ({what}); want {FORMS}. Is it whole?"
        ) from error
    if isinstance(table, datasets.Dataset):
        return table
    if split not in table:
        raise ValueError(
            f"{path}: no split {split!r}{nearest(split, table)} There are: {', '.join(table)}"
        )
    return table[split]


def _check_parquet(path: Path) -> None:
    """ValueError for a file that is cut, and where there are no rows."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    rows = 0
    for file in files:
        try:
            rows += read_metadata(file).num_rows
        except (ArrowException, OSError) as error:
            raise ValueError(
                f"{file}: no Parquet file, or a cut one ({str(error).splitlines()[0]}); copy or "
                "download it again"
            ) from None
    if files and not rows:
        raise ValueError(f"{path}: no rows")


class _Generated:
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
            raise ValueError(f"reasoning_gym:{name}: {options} is not accepted: {error}") from error
        self._name, self._options = name, options
        self._length = min(limit or len(self._entries), len(self._entries))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict:
        entry = self._entries[i]
        return {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "reasoning_gym": GeneratedEntry(self._name, self._options, entry),
        }


def _options(source: str, query: str) -> dict[str, Any]:
    """The Python values of `size=1000&ops=["+"]&easy=true`; what is no literal stays text."""
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


def load_function(name: str) -> Callable:
    """The function of `package.module:function`; modules in the working directory count, too."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script has its own folder on the path instead
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{name}: cannot import {module_name} ({error}); is it installed, or in {os.getcwd()}?"
        ) from error
    except Exception as error:  # of the module's own lines
        raise ValueError(f"{name}: cannot import {module_name}: {explain(error)}") from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(
            f"{name}: {module_name} has no function {attribute!r}{nearest(attribute, vars(module))}"
        )
    return getattr(module, attribute)


def show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
