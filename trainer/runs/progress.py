"""How far something is: bars on a terminal, lines elsewhere. And the one way in which durations are
written.

    with progress(engine.is_main) as stage:                 # phases without steps
        with stage("texts by the student", 80) as advance:
            advance(4)
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EVERY_S = 30.0  # between two lines of one stage

Advance = Callable[[int], None]  # is called with the number of items done since the last call
Stage = Callable[[str, int], AbstractContextManager[Advance]]


def duration(seconds: float) -> str:
    """9 s, 3m 05s, 1h 42m."""
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {int(seconds) % 60:02d}s" if minutes else f"{int(seconds)} s"


def time_left(last_s: Sequence[float], items: int) -> str:
    """Of `items` that take the median of the last ones, which lasted `last_s` seconds each."""
    return duration(items * statistics.median(last_s))


def ignore(count: int) -> None:
    """An `advance` that shows nothing."""


@contextlib.contextmanager
def progress(show: bool, console: "Console | None" = None) -> Iterator[Stage]:
    """Yields stage(name, total). show: false on all ranks but the main one, and in quiet runs.
    console: for tests.
    """
    if not show:
        yield lambda name, total: contextlib.nullcontext(ignore)
        return
    console = console or stdout_console()
    if not console.is_terminal:
        yield lambda name, total: _lines(console.print, name, total)
        return
    with _bars(console) as bars:
        yield lambda name, total: _bar(bars, name, total)


def stdout_console() -> "Console":
    """Plain text: no markup, no line breaks."""
    from rich.console import Console

    return Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False)


def _bars(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def _bar(bars: "Progress", name: str, total: int) -> Iterator[Advance]:
    task = bars.add_task(name, total=total)
    yield lambda count: bars.advance(task, count)
    bars.stop_task(task)


@contextlib.contextmanager
def _lines(write: Callable[[str], None], name: str, total: int) -> Iterator[Advance]:
    done, started = 0, time.monotonic()
    written = started

    def advance(count: int) -> None:
        nonlocal done, written
        done += count
        now = time.monotonic()
        if done < total and now - written >= EVERY_S:
            written = now
            write(f"{name}: {done} of {total} after {duration(now - started)}")

    yield advance
    write(f"{name}: {done} done after {duration(time.monotonic() - started)}")
