"""What a phase without steps is doing: bars on a terminal; elsewhere a line now and then, and one
at the end of each stage.

    with progress(engine.is_main) as stage:
        with stage("texts by the student", 80) as advance:
            advance(4)
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

EVERY_S = 30.0  # between two lines of one stage

Advance = Callable[[int], None]
Stage = Callable[[str, int], AbstractContextManager[Advance]]


def ignore(count: int) -> None:
    """An `advance` that nobody looks at."""


@contextlib.contextmanager
def progress(show: bool, console=None) -> Iterator[Stage]:
    """Yields stage(name, total). show: false on all ranks but the main one, and in quiet runs.
    console: rich's, for tests.
    """
    if not show:
        yield lambda name, total: contextlib.nullcontext(ignore)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda name, total: _lines(console.print, name, total)
        return
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    ) as bars:
        yield lambda name, total: _bar(bars, name, total)


@contextlib.contextmanager
def _bar(bars, name: str, total: int) -> Iterator[Advance]:
    task = bars.add_task(name, total=total)
    yield lambda count: bars.advance(task, count)
    bars.stop_task(task)


@contextlib.contextmanager
def _lines(write: Callable[[str], None], name: str, total: int) -> Iterator[Advance]:
    done, started = 0, time.monotonic()
    told = started

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if done < total and time.monotonic() - told >= EVERY_S:
            told = time.monotonic()
            write(f"{name}: {done} of {total} after {told - started:.0f} s")

    yield advance
    write(f"{name}: {done} done after {time.monotonic() - started:.0f} s")
