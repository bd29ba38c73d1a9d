"""What a full disk looks like to a program, and how to say so."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# EFBIG: a limit on the size of files (ulimit -f), which some clusters use as a quota
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WORDS = ("no space left on device", "disk quota exceeded", "file too large", "os error 28")
NEARLY_NONE = 64 * 1024  # bytes; a file system this full has refused something


def is_full(error: BaseException) -> bool:
    """Whether the error, or any that it came from, says that there is no space left."""
    return any(
        (isinstance(e, OSError) and e.errno in FULL)
        or any(words in str(e).lower() for words in WORDS)
        for e in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes, and what other ranks reported in it."""
    left, seen = [error], set()
    while left:
        e = left.pop()
        if id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        left += [x for x in (e.__cause__, e.__context__) if x]
        failures = getattr(e, "failures", None)  # torch's CheckpointException: rank -> (error, ...)
        if isinstance(failures, dict):
            left += [x[0] for x in failures.values() if isinstance(x, tuple)]


def has_none(folder: str | os.PathLike) -> bool:
    """Whether next to nothing fits on the file system of the folder."""
    return free_bytes(folder) < NEARLY_NONE


def remove_empty(folder: str | os.PathLike, name: str) -> None:
    """Removes folder/name if it is an empty folder inside; nothing happens to anything else."""
    inside = Path(folder) / str(name)
    with contextlib.suppress(OSError):
        if inside.resolve().is_relative_to(Path(folder).resolve()):
            inside.rmdir()


def free_bytes(folder: str | os.PathLike) -> int:
    """Of the file system that holds the folder, or the nearest folder above it that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size(n_bytes: float) -> str:
    """12 B, 3.4 MB, 5.6 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"


class DiskError(OSError):
    """An error of the disk in words: what, where, what is kept, what to do."""

    def __init__(self, number: int, message: str):
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


def no_space(folder: str | os.PathLike, what: str, kept: str) -> DiskError:
    """what: a clause on what did not fit. kept: what is still whole."""
    return DiskError(
        errno.ENOSPC,
        f"no space left in {folder}: {what}, {size(free_bytes(folder))} are free. Kept: {kept}. "
        "Make space, then go on",
    )
