"""Whether a done cell of a matrix is still the one that the matrix file describes: done with the
settings that it has there now, from the files that earlier cells have left there now.

Numbers of other settings under a cell's present name would be wrong without a word.
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.config.loader import as_table, load
from reflux.trainer.file_hash import file_sha256

from .hub import is_hub_id
from .run_folder import NO_RESULT, differences, seq_len

HUB_KEYS = ("model.path", "teacher.path", "proxy.path", "distill.more_teachers")


def changes(folder: Path, module: str, arguments: Sequence[str]) -> list[str]:
    """What a done cell was made from and would not be made from now, in words; empty where nothing
    has changed, or where the folder does not say what it was made from.

    module: of the cell, "" for trainer/main.py. arguments: of it. ValueError for a configuration
    that cannot be read now.
    """
    if module:
        return _changed_arguments(folder, module, arguments)
    return [*_changed_settings(folder, arguments), *_changed_files(folder)]


def _changed_settings(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Names of keys. The folder of the seed may lie elsewhere now: paths below it are the same."""
    saved = folder / "config.toml"
    if not saved.is_file():
        return []
    try:
        before = as_table(load(saved))
    except ValueError:  # of another version
        return []
    now = as_table(load(arguments[1], tuple(arguments[3::2])))
    longer = seq_len(now) > seq_len(before)
    found = differences(*(_without_folder(x, os.path.dirname(x["folder"])) for x in (before, now)))
    return [
        name
        for name in found
        if not {name, name.split(".")[0]} & set(NO_RESULT)
        and not (name == "training.seq_len" and longer)
        and not (name in HUB_KEYS and _names_the_hub(now, name))
    ]


def _names_the_hub(table: Mapping[str, Any], name: str) -> bool:
    """Of a run, the folder is saved that the hub's model was found in."""
    section, _, key = name.partition(".")
    value = table[section][key]
    return any(map(is_hub_id, [value] if isinstance(value, str) else value))


def _without_folder(value: Any, folder: str) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_folder(v, folder) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folder(v, folder) for v in value]
    return value.replace(folder, "{folder}") if isinstance(value, str) and folder else value


def _changed_arguments(folder: Path, module: str, arguments: Sequence[str]) -> list[str]:
    try:
        summary = json.loads((folder / "summary.json").read_text())
        words = shlex.split(summary.get("command", ""))
    except (OSError, ValueError, AttributeError):
        return []
    if "-m" not in words:
        return []
    before, now = words[words.index("-m") + 1 :], [module, *arguments]
    before, now = (_without_folder(x, os.path.dirname(x[-1])) for x in (before, now))
    return [] if before == now else [f"arguments ({shlex.join(before)})"]


def _changed_files(folder: Path) -> list[str]:
    """Inputs of the run that earlier cells have left, and that hold something else by now."""
    try:
        with open(folder / "run.jsonl", "rb") as log:
            inputs = json.loads(log.readline()).get("inputs", {})
        known = json.loads((folder / "inputs.json").read_text()).get("hashes", {})
    except (OSError, ValueError, AttributeError):
        return []
    matrix = os.path.realpath(folder.parent)
    found = []
    for name, entry in inputs.items():
        for file, digest in _files(entry):
            inside = os.path.realpath(file).startswith(matrix + os.sep)
            if inside and os.path.isfile(file) and _digest(file, known) != digest:
                found.append(f"{name} ({file})")
    return found


def _files(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, sha256) of an input's own files."""
    for name, digest in entry.get("files", {}).items():
        path = entry["path"]
        yield path if os.path.basename(path) == name else os.path.join(path, name), digest


def _digest(file: str, known: Mapping[str, Sequence[Any]]) -> str:
    """sha256; of a file that is as it was when it was hashed, the one that is known."""
    stat = os.stat(file)
    if known.get(file, [None])[:-1] == [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]:
        return known[file][-1]
    return file_sha256(file)
