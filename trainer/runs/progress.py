"""How far something is: bars on a terminal, lines elsewhere. And the one way in which durations are
written.

    with progress(engine.is_main) as stage:                 # phases without steps
        with stage("texts by the student", 80) as advance:
            advance(4)

    with shown_stages(console):                             # inside the steps of a run: one line of
        with inside_step("scoring", 12) as advance:         # a terminal, which is gone afterwards
            advance(1)
"""

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EVERY_S = 30.0  # between two lines of one stage
DRAW_S = 0.25  # between two drawings inside a step; a stage that is over before is not shown
CLEAR = "\r\x1b[2K"  # back to the start of the terminal's line, and empties it

T = TypeVar("T")
Advance = Callable[[int], None]  # is called with the number of items done since the last call
Stage = Callable[[str, int], AbstractContextManager[Advance]]


def moment(written: object) -> str:
    """A time in ISO 8601 as people write it, in UTC; "unknown" for anything else."""
    try:
        return datetime.fromisoformat(str(written)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return "unknown"


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
    with shown_stages(None), _bars(console) as bars:  # one thing at a time draws
        yield lambda name, total: _bar(bars, name, total)


_terminal: "Console | None" = None  # where inside_step draws; None: nowhere


@contextlib.contextmanager
def shown_stages(console: "Console | None") -> Iterator[None]:
    """What inside_step does inside is shown on `console`, if that is a terminal."""
    global _terminal
    before = _terminal
    _terminal = console if console is not None and console.is_terminal else None
    try:
        yield
    finally:
        _terminal = before


@contextlib.contextmanager
def inside_step(name: str, total: int, unit: str = "", at_most: bool = False) -> Iterator[Advance]:
    """A part of a step, on one line of the terminal while it lasts: name, done of total, seconds,
    seconds left at the pace so far. at_most: the total is a bound, and so is what is left. Costs an
    addition and a look at the clock a call; nothing where nothing is shown.
    """
    if _terminal is None or threading.current_thread() is not threading.main_thread():
        yield ignore
        return
    line = _StageLine(_terminal, name, total, f" {unit}" if unit else "", "at most " * at_most)
    try:
        yield line.advance
    finally:
        line.clear()


def counted(name: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """The items one by one, each shown as done when the next is asked for."""
    with inside_step(name, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)


class _StageLine:
    """Draws at most every DRAW_S seconds."""

    def __init__(self, console: "Console", name: str, total: int, unit: str, bound: str):
        self._console, self._name, self._total = console, name, total
        self._unit, self._bound, self._done, self._drawn = unit, bound, 0, False
        self._started = self._drawn_at = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._drawn_at >= DRAW_S:
            self._drawn_at, self._drawn = now, True
            self._write(CLEAR + self._text(now)[: self._console.width - 1])

    def clear(self) -> None:
        if self._drawn:
            self._write(CLEAR)

    def _text(self, now: float) -> str:
        took = now - self._started
        total = max(self._total, self._done)
        left = duration(took * (total - self._done) / self._done) if self._done else "?"
        return (
            f"  {self._name}: {self._done:,} of {self._bound}{total:,}{self._unit}, "
            f"{duration(took)}, left {self._bound}{left}"
        )

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


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
