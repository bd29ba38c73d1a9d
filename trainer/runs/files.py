"""How results reach the disk: JSON from dataclasses, and files that are the old one or the new one,
never a part.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def to_json(x: Any) -> Any:
    """JSON's own types: an object for a dataclass, NamedTuple or mapping, a list for a tuple or
    array, a number for numpy's and torch's scalars, null for a float that is not finite.
    """
    if is_dataclass(x) and not isinstance(x, type):
        return {f.name: to_json(getattr(x, f.name)) for f in fields(x)}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return {name: to_json(value) for name, value in zip(x._fields, x)}
    if isinstance(x, Mapping):
        return {key: to_json(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [to_json(value) for value in x]
    if hasattr(x, "tolist"):
        return to_json(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(path: Path, x: Any) -> None:
    """`to_json(x)`, the file whole."""
    write_whole(path, json.dumps(to_json(x), indent=1, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, the file whole."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_object(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote of an object; None where no file is, or one that is not whole: its
    writer was killed, or the disk was full.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_whole(path: Path, text: str, partial: str = ".partial") -> None:
    """UTF-8. The file has the old or the new content at every moment, also after a crash. partial:
    ending of the file that is written first; one of its own where two processes may write the same.
    """
    unfinished = path.with_name(path.name + partial)
    try:
        with named(path), open(unfinished, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # a full disk gets its space back
        raise


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the disk inside say which file they are about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
