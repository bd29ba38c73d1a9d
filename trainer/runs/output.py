"""Output may lose its reader: `| head` ends, a terminal is closed. The run goes on without it."""

import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parents[1])
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)  # no reader of a pipe, no terminal


class _Output(io.FileIO):
    """A file descriptor that becomes /dev/null once nobody reads it any more."""

    def __init__(self, descriptor: int, when_gone: Callable[[], None]):
        super().__init__(descriptor, "w", closefd=False)
        self._when_gone = when_gone

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            self._when_gone()
            return len(data)


def survive_lost_reader(message: str = "") -> None:
    """From now on a closed standard output or error stream ends nothing: what follows is dropped.
    message: goes to the error stream when the other one is lost.
    """

    def report() -> None:
        if message:
            print(message, file=sys.stderr, flush=True)

    sys.stdout = _replaced(sys.stdout, 1, report)
    sys.stderr = _replaced(sys.stderr, 2, _nothing)


def _nothing() -> None:
    pass


def _replaced(stream: Any, descriptor: int, when_gone: Callable[[], None]) -> io.TextIOWrapper:
    if stream is None:  # closed from the start, as by `>&-`
        return open(os.devnull, "w")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, when_gone)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of this package as `warning: ...`, without the line of code that gave them."""
    default = warnings.formatwarning

    def told(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> str:
        ours = category is UserWarning and filename.startswith(PACKAGE)
        if ours:
            return f"warning: {message}\n"
        return default(message, category, filename, *rest, **more)

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = default
