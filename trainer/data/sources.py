"""Sources of rows: files, folders, generators and functions; each gives rows and their locations.

Rows are read on access. A source that cannot be read is a ValueError that names the file and line.
"""

import ast
import glob
import importlib
import json
import mmap
import os
import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.explain import explain
from reflux.trainer.config.fit import nearest

from .prompt import GeneratedEntry
from .tables import FORMS, builder_of, check_parquet, from_hub, read_files, read_folder

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST = 2**25  # bytes of a line, characters of a text: more is no prompt, but a mistake


class Rows(Protocol):
    """Rows of a source, each read on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


Location = Callable[[int], str]  # row number -> where it comes from, for error messages


@dataclass(frozen=True)
class OpenSource:
    """name: as messages call it."""

    name: str
    rows: Rows
    location: Location


def open_source(section: SourceSection, limit: int | None) -> OpenSource:
    """section.source: a file of BUILDERS, several of one kind or a pattern of them; a folder
    written by `datasets.save_to_disk` or readable by `datasets.load_dataset`; an id of the hub,
    with its subset and revision; `reasoning_gym:NAME?size=1000&seed=7&key=value`; or
    `package.module:function?key=value`, which returns rows (an endless generator needs `limit`).
    split: of a folder or of the hub. Tables of `datasets` are mapped from the disk: they may be
    larger than memory.
    """
    source = section.source
    files = source_files(source)
    if files:
        return _open_files(files, limit, tuple(section.columns.values()))
    if not isinstance(source, str):
        raise ValueError(f"source = {list(source)}: no files; want {FORMS}")
    path = Path(source)
    if path.is_dir():
        check_parquet(path)
        table = read_folder(path, section.split, tuple(section.columns.values()))
        return _of_table(source, table, limit)
    name, _, query = source.partition("?")
    if name.startswith("reasoning_gym:"):
        entries = _Generated(name.partition(":")[2], _options(source, query), limit)
        return OpenSource(source, entries, partial(_entry_of, source))
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return _call(source, name, _options(source, query), limit)
    check_file(source)
    if HUB_ID.fullmatch(source):
        return _of_table(source, from_hub(source, section), limit)
    raise ValueError(f"{source}: no such file or folder; want {FORMS}")


def source_files(source: str | Sequence[str]) -> list[Path]:
    """The files that a source names, in order; none where it is something else. ValueError for a
    list with one that is missing.
    """
    if not isinstance(source, str):
        files = [file for entry in source for file in source_files(entry) or [Path(entry)]]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{missing[0]}: no such file; a list of sources holds files")
        return files
    if Path(source).is_file():
        return [Path(source)]
    if glob.has_magic(source) and ":" not in source:
        found = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
        files = [file for file in found if file.is_file()]
        if not files:
            raise ValueError(f"{source}: no file matches this pattern")
        return files
    return []


def has_splits(source: str | Sequence[str]) -> bool:
    """Whether `split` chooses among its rows: of a folder and of the hub, not of files, generators
    and functions.
    """
    if not isinstance(source, str):
        return False
    return Path(source).is_dir() or not source_files(source) and ":" not in source


def check_file(source: str) -> None:
    """ValueError for what ends like a file of rows and is not there: no hub is asked for it."""
    path = Path(source)
    if builder_of(path) and ":" not in source and not path.exists():
        beside = [p.name for p in path.parent.glob("*") if builder_of(p)]
        guess = nearest(path.name, beside, "" if path.parent == Path() else f"{path.parent}/")
        raise ValueError(f"{source}: no such file{guess} Want {FORMS}")


def _open_files(files: Sequence[Path], limit: int | None, texts: Sequence[str]) -> OpenSource:
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    if all(map(_has_plain_lines, files)):
        rows = _Joined([Lines(file, limit) for file in files], limit)
        return OpenSource(name, rows, rows.location) if len(files) > 1 else _only(name, rows)
    builders = {builder_of(file) for file in files}
    if len(builders) > 1:
        raise ValueError(f"{name}: files of several kinds; want one kind in a source: {FORMS}")
    for file in files:
        check_parquet(file) if builders == {"parquet"} else None
    table = read_files(next(iter(builders)), files, texts)
    return _of_table(name, table, limit)


def _only(name: str, rows: "_Joined") -> OpenSource:
    lines = rows.parts[0]
    return OpenSource(name, lines, lines.location)


def _has_plain_lines(file: Path) -> bool:
    """JSON lines that can be mapped; also the default for a suffix that is not known."""
    if file.suffix == ".json":  # lines, or one array of all rows
        with open(file, "rb") as content:
            return not content.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return file.suffix in (".jsonl", ".ndjson") or builder_of(file) is None


def _of_table(name: str, table: Any, limit: int | None) -> OpenSource:
    rows = table.select(range(min(limit or len(table), len(table))))
    return OpenSource(name, rows, partial(_row_of, name))


def _call(source: str, name: str, options: dict[str, Any], limit: int | None) -> OpenSource:
    function = load_function(name)
    try:
        rows = function(**options)
        if not isinstance(rows, Sequence) or limit is not None:
            rows = list(islice(rows, limit))
    except Exception as error:
        raise ValueError(f"{source}: the function failed with {explain(error)}") from error
    return OpenSource(source, rows, partial(_row_of, source))


def _row_of(source: str, i: int) -> str:
    return f"{source}, row {i} (from 0)"


def _entry_of(source: str, i: int) -> str:
    return f"{source}, entry {i}"


class _Joined:
    """Several files of lines, one behind the other."""

    def __init__(self, parts: Sequence["Lines"], limit: int | None):
        self.parts, self._starts, rows = parts, [], 0
        for part in parts:
            self._starts.append(rows)
            rows += len(part)
        self._length = min(rows, limit or rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict:
        part, row = self._at(i)
        return part[row]

    def location(self, i: int) -> str:
        part, row = self._at(i)
        return part.location(row)

    def _at(self, i: int) -> tuple["Lines", int]:
        k = bisect_right(self._starts, i) - 1
        return self.parts[k], i - self._starts[k]


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
            where = str(error)
            if isinstance(error, json.JSONDecodeError):
                where = f"{error.msg}, character {error.pos + 1}"
            raise ValueError(
                f"{self.location(i)}: {where}; want one JSON object a line, in UTF-8"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.location(i)}: {show(row)}; want one JSON object a line")
        return row


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
