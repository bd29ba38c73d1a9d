"""What a matrix says while it runs: a live table on a terminal, lines elsewhere.

    with show_cells(items, ("attack", "teacher"), done_before) as show:
        show.started("student-a")
        show.ended("student-a", "done")     # [1/9] student-a: done, accuracy 0.82, after ...

The time left is that of the cells that wait and run, by their `cost`, at the pace of those that
this process has finished: other work on the machine counts.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .logger import LOG
from .progress import duration, stdout_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

ACCURACIES = ("sampled", "greedy")  # of an evaluation; the first that it has is shown
TAIL_BYTES = 1 << 16  # of a log: more than its last line
PER_SECOND = 1.0  # how often a terminal is drawn
LINES = 24  # of a terminal that does not say how high it is
MISSING = "·"
KNOWN = 0.05  # of all work: before, the start of a process weighs more than what it does


@dataclass(frozen=True)
class Item:
    """A cell, as it is shown."""

    name: str
    folder: Path
    cost: float = 1.0  # seconds of one idle core, roughly; only ratios between cells matter
    says: str = ""  # what it does, in words
    labels: Mapping[str, str] = field(default_factory=dict)


# --- what a run folder tells on the way


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines at the end of a log that is still written; none where there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read()
    except OSError:
        return []
    found = []
    for line in text.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):  # cut at the beginning
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def steps_done(folder: Path) -> tuple[int, int]:
    """(the last step, steps in all); (0, 0) where a run has not begun or counts no steps."""
    lines = last_lines(folder / LOG)
    done = max(
        (line["step"] for line in lines if "event" not in line and "step" in line), default=0
    )
    if not done:
        return 0, 0
    with open(folder / LOG, "rb") as file:
        head = json.loads(file.readline())
    return done, int(head.get("config", {}).get("steps", 0))


def accuracy(folder: Path) -> float | None:
    """Of the last evaluation in a run's log: sampled answers, else greedy ones."""
    for line in reversed(last_lines(folder / LOG)):
        for name in ACCURACIES if line.get("event") == "eval" else ():
            if isinstance(value := line.get(f"eval/{name}"), int | float):
                return float(value)
    return None


# --- state


@dataclass
class Cells:
    """Which cells wait, run and have ended. `clock` in seconds."""

    items: Sequence[Item]
    done: set[str]  # names; before this process among them
    clock: Callable[[], float] = time.monotonic
    running: dict[str, float] = field(default_factory=dict)  # name -> time of its start
    failed: set[str] = field(default_factory=set)
    took: dict[str, float] = field(default_factory=dict)  # seconds, of those that ended here
    begun: dict[str, float] = field(default_factory=dict)  # fractions done before they started here

    def __post_init__(self) -> None:
        self.by_name = {item.name: item for item in self.items}
        self.started_at = self.clock()

    def start(self, name: str) -> None:
        self.begun[name] = self.fraction(name)
        self.running[name] = self.clock()

    def end(self, name: str, succeeded: bool) -> None:
        if (begin := self.running.pop(name, None)) is not None:
            self.took[name] = self.clock() - begin
        self.done.discard(name)  # one that was done before and ended badly
        (self.done if succeeded else self.failed).add(name)

    def seconds_left(self) -> float | None:
        """At the pace so far; None while less than KNOWN of all costs is done."""
        reached = {name: 1.0 for name in self.took}
        reached |= {name: self.fraction(name) for name in self.running}
        cost = {name: self.by_name[name].cost for name in reached}
        part = sum(cost[name] * reached[name] for name in self.running)
        ended = self.done | self.failed
        all_left = sum(item.cost for item in self.items if item.name not in ended) - part
        elapsed = self.clock() - self.started_at
        # what an earlier process has done, of cells and of steps, is in neither
        done = sum(cost[n] * (fraction - self.begun.get(n, 0.0)) for n, fraction in reached.items())
        return all_left * elapsed / done if done > 0 and done >= KNOWN * (all_left + done) else None

    def fraction(self, name: str) -> float:
        """Of its steps that a running cell has done."""
        done, steps = steps_done(self.by_name[name].folder)
        return min(done / steps, 1.0) if steps else 0.0

    def after(self) -> str:
        return duration(self.clock() - self.started_at)

    def left(self) -> str:
        seconds = self.seconds_left()
        return f"; about {duration(seconds)} left" if seconds else ""


class Grid:
    """Accuracies by two labels, rows and columns, as far as cells have ended."""

    def __init__(self, cells: Cells, labels: Sequence[str]):
        self._cells, self._labels = cells, tuple(labels)
        members = [i for i in cells.items if all(label in i.labels for label in self._labels)]
        self.items = members if self._labels else []
        self.rows = list(dict.fromkeys(self._key(item)[0] for item in self.items))
        self.columns = list(dict.fromkeys(self._key(item)[1] for item in self.items))

    def _key(self, item: Item) -> tuple[str, str]:
        row, column = (item.labels[label] for label in self._labels)
        return row, column

    def values(self, row: str) -> list[list[float]]:
        """Column by column, of every seed that has one."""
        found: dict[str, list[float]] = {column: [] for column in self.columns}
        for item in self.items:
            if self._key(item)[0] == row and item.name in self._cells.done:
                value = accuracy(item.folder)
                found[self._key(item)[1]] += [] if value is None else [value]
        return [found[column] for column in self.columns]

    def completed_by(self, item: Item) -> str:
        """A line on the row that this cell completes; "" for any other cell."""
        if item not in self.items:
            return ""
        row = self._key(item)[0]
        if {i.name for i in self.items if self._key(i)[0] == row} - self._cells.done:
            return ""
        cells = zip(self.columns, self.values(row))
        return f"{row}: " + ", ".join(f"{column} {_mean(values)}" for column, values in cells)

    def table(self) -> "Table":
        from rich.table import Table

        table = Table(f"accuracy by {self._labels[0]}", *self.columns, box=None)
        for row in self.rows:
            table.add_row(row, *map(_mean, self.values(row)))
        return table


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else MISSING


# --- shown


class CellProgress:
    """Told what happens, it prints lines, and draws a table where somebody sees it."""

    def __init__(self, cells: Cells, grid: Grid, console: "Console"):
        self._cells, self._grid, self._console = cells, grid, console

    def started(self, name: str) -> None:
        self._cells.start(name)
        if says := self._cells.by_name[name].says:
            self._console.print(f"{name}: {says}")

    def ended(self, name: str, words: str, succeeded: bool = True) -> None:
        """words: how it ended."""
        item = self._cells.by_name[name]
        self._cells.end(name, succeeded)
        value = accuracy(item.folder) if succeeded else None
        score = "" if value is None else f", accuracy {value:.3f},"
        line = f"{name}: {words}{score} after {self._cells.after()}"
        count = f"[{len(self._cells.done)}/{len(self._cells.items)}]"
        self._console.print(f"{count} {line}{self._cells.left()}")
        if row := self._grid.completed_by(item):
            self._console.print(f"    {row}")

    def said(self, line: str) -> None:
        self._console.print(f"[{len(self._cells.done)}/{len(self._cells.items)}] {line}")

    def __rich__(self) -> "RenderableType":
        """Every second anew."""
        from rich.console import Group

        height = (self._console.size.height or LINES) - 4
        parts: list[RenderableType] = [self._head(), self._running()]
        if self._grid.rows and len(self._grid.rows) + len(self._cells.running) + 4 <= height:
            parts.insert(0, self._grid.table())
        return Group(*parts)

    def _head(self) -> str:
        cells = self._cells
        failed = f", {len(cells.failed)} failed" if cells.failed else ""
        return (
            f"{len(cells.done)} of {len(cells.items)} done{failed}, {cells.after()}{cells.left()}"
        )

    def _running(self) -> "Table":
        from rich.table import Table

        table = Table(box=None, show_header=False)
        for name, begin in list(self._cells.running.items()):
            done, steps = steps_done(self._cells.by_name[name].folder)
            took = duration(self._cells.clock() - begin)
            table.add_row("running", name, f"step {done} of {steps}" if steps else "", took)
        return table


@contextlib.contextmanager
def show_cells(
    items: Sequence[Item],
    grid: Sequence[str] = (),
    done: Collection[str] = (),
    console: "Console | None" = None,
) -> Iterator[CellProgress]:
    """grid: two labels, for a table of accuracies. done: names of the items that are done before
    the start.
    """
    console = console or stdout_console()
    cells = Cells(items, set(done))
    shown = CellProgress(cells, Grid(cells, grid), console)
    if not console.is_terminal:
        yield shown
        return
    from rich.live import Live

    with Live(shown, console=console, refresh_per_second=PER_SECOND, redirect_stderr=False):
        yield shown
    sys.stdout.flush()
