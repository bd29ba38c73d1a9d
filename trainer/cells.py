"""Runs the cells of a matrix: some at a time, prerequisites first, each in a process of its own.

No cell outlives the runner. A stop signal is passed on to every cell, which finishes its step and
saves it; what has not ended after STOP_S is killed. A runner that is killed itself is missed by its
cells, which then stop by themselves. Cells are forked from one server process that has imported
everything; the runner knows them by process id and start time, so that the end of that server hides
none. A terminal's Ctrl-C goes to that server, too, which gets no stop signals: they are held back
there, and in a cell until it can answer them.

No folder has two writers: a cell owns its folder (runs/lock.py) before it writes there. One whose
folder is in use, by a cell that an earlier runner left behind or by another runner, waits.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from reflux.trainer.runs import commands, signals
from reflux.trainer.runs.cell_progress import CellProgress, Item, show_cells, steps_done
from reflux.trainer.runs.files import read_object, write_whole
from reflux.trainer.runs.lock import InUse, hold, process_start, refuse_if_held
from reflux.trainer.runs.run_folder import CHECKPOINTS_REMOVED

PRELOAD = ["reflux.trainer.loop"]  # saves each cell the seconds of `import torch`
POLL_S = 0.1
LOOK_S = 2.0  # between two looks at a folder that is in use
STOP_S = 60.0  # how long a stop waits for cells that save their step
STOP_AT_ONCE_S = 5.0  # the same after a second signal
IN_USE, INTERRUPTED = 75, 130  # exit codes; the first as EX_TEMPFAIL of sysexits.h
NAMED = 3  # cells in a sentence
STOPPED_BY_GUARD = 4  # a result, not a failure


@dataclass(frozen=True, eq=False)
class Cell:
    """One command and the cells that have to be done before it."""

    name: str  # unique in the matrix, seed included
    folder: Path
    arguments: tuple[str, ...]  # of main, or of the module
    module: str  # "" for trainer/main.py
    after: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    cost: float = 1.0  # seconds of one idle core, roughly: for the time left
    says: str = ""  # what it does, in words; printed when it starts
    keep_checkpoints: bool = True  # once it is done; without an export they stay in any case

    @property
    def done(self) -> bool:
        """It has left a whole summary.json."""
        return read_object(self.folder / "summary.json") is not None

    @property
    def exit_code(self) -> int:
        """With which the done cell ended: 0, 3 (an [accept] rule does not hold) or 4 (a guard)."""
        return self._summary().get("exit_code", 0)

    @property
    def stopped(self) -> str | None:
        """Why a guard ended the done cell; its export holds the accepted weights."""
        return self._summary().get("stopped")

    def _summary(self) -> Mapping[str, Any]:
        return read_object(self.folder / "summary.json") or {}

    @property
    def command(self) -> str:
        """Works as printed, in the folder where the matrix was started."""
        if self.module:
            return commands.module(self.module, *self.arguments)
        return commands.script(*self.arguments)


# --- in the process of a cell


def run_cell(cell: Cell, take_over: bool, notes: Sequence[str] = ()) -> None:
    """Runs the cell in this process, a child of its own, with its output in console.log of its
    folder, behind the notes. Ends the process.
    """
    with signals.handled_by(signals.raise_interrupt):
        _end_with_runner()
        sys.exit(_own_and_run(cell, take_over, notes))


def _own_and_run(cell: Cell, take_over: bool, notes: Sequence[str]) -> int:
    try:
        signals.let_through()
        with hold(cell.folder, take_over=take_over):
            # another runner may have done it while this process was started
            return cell.exit_code if cell.done else _run_logged(cell, notes)
    except InUse:
        return IN_USE
    except KeyboardInterrupt:
        return INTERRUPTED


def _run_logged(cell: Cell, notes: Sequence[str]) -> int:
    with open(cell.folder / "console.log", "a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print("\n".join([f"$ {cell.command}", *notes]), flush=True)
    code = (_run_module(cell) if cell.module else _run_main(cell)) or 0
    if code == 0 and not cell.keep_checkpoints:
        _remove_checkpoints(cell.folder)
    return code


def _remove_checkpoints(folder: Path) -> None:
    """Where an export holds the weights. What is left says so to whoever resumes the run."""
    home = folder / "checkpoint"
    if not home.is_dir() or home.is_symlink():
        return
    if not (folder / "export").is_dir():
        print(f"{home} stays: there is no export, and it alone holds the weights", flush=True)
        return
    (folder / CHECKPOINTS_REMOVED).touch()
    shutil.rmtree(home, ignore_errors=True)


def _run_module(cell: Cell) -> int:
    code = importlib.import_module(cell.module).main(list(cell.arguments))
    if not code:  # a module writes no summary of its own
        write_whole(cell.folder / "summary.json", json.dumps({"command": cell.command}) + "\n")
    return code


def _run_main(cell: Cell) -> int:
    from . import main

    return main.main(list(cell.arguments))


def _end_with_runner() -> None:
    """Stops this process, as a scheduler would, when the runner's has ended without a word."""
    runner = multiprocessing.parent_process()
    assert runner is not None, "a cell is a child of the runner"

    def watch() -> None:
        wait([runner.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# --- in the process of the runner


@contextlib.contextmanager
def _deaf_server() -> Iterator[None]:
    """Inside, the process that forks the cells may be started: it will get no stop signals."""
    with signals.held_back():
        resource_tracker.ensure_running()  # where it starts one, it lets signals through again
        with signals.held_back():
            yield


def _start_server(context: ForkServerContext, caught: Sequence[int]) -> None:
    """Starts the process that forks the cells and waits until it has imported PRELOAD. If a signal
    is caught meanwhile it is killed: it has no cell yet.
    """
    with _deaf_server():
        forkserver.ensure_running()
    # in a thread, for nothing ends the wait for an answer
    starter = threading.Thread(target=_fork_once, args=(context,), daemon=True)
    starter.start()
    while starter.is_alive() and not caught:
        starter.join(POLL_S)
    server = getattr(forkserver, "_forkserver", None)
    pid = getattr(server, "_forkserver_pid", None)
    if starter.is_alive() and pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        starter.join(STOP_AT_ONCE_S)


def _fork_once(context: ForkServerContext) -> None:
    with _deaf_server(), contextlib.suppress(EOFError, OSError):  # the server was killed
        context.Process(target=_do_nothing).start()


def _do_nothing() -> None:
    pass


class _Child:
    """The process of a cell."""

    def __init__(self, process: ForkServerProcess):
        self._process = process
        with _deaf_server():
            process.start()
        self._start = process_start(process.pid) if process.pid else None

    @property
    def ended(self) -> bool:
        """Its own end, not only that of the server between it and the runner."""
        return not self._process.is_alive() and not self._exists()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def send(self, number: int) -> None:
        if self._process.pid is not None and (self._process.is_alive() or self._exists()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _exists(self) -> bool:
        start, pid = self._start, self._process.pid
        return start is not None and pid is not None and process_start(pid) == start


@dataclass
class _Schedule:
    """Which cells wait, run, are done and have failed, while a matrix runs."""

    waiting: list[Cell]
    parallel: int
    take_over: bool
    done: set[str]
    show: CellProgress
    running: dict[Cell, _Child] = field(default_factory=dict)
    held: dict[Cell, float] = field(default_factory=dict)  # in use elsewhere; time of the next look
    failed: list[str] = field(default_factory=list)  # cells behind a failed one among them
    stopped: dict[str, str] = field(default_factory=dict)  # done cells that a guard ended -> reason
    owner_unknown: bool = False  # of the folder of a failed cell

    def drop_blocked(self) -> None:
        """Cells behind a failed one fail without a start."""
        for cell in [c for c in self.waiting if set(c.after) & set(self.failed)]:
            self._fail(cell, "not started, for a cell before it failed")

    def start_ready(self, context: ForkServerContext) -> None:
        for cell in [c for c in self.waiting if set(c.after) <= self.done]:
            looked_at = cell in self.held
            # a cell of another runner is on this machine too and takes a place
            if not looked_at and len(self.running) + len(self.held) >= self.parallel:
                continue
            if time.monotonic() < self.held.get(cell, 0.0) or not self._is_free(cell):
                continue
            self.held.pop(cell, None)
            self.waiting.remove(cell)
            if cell.done:  # by another runner
                self._close(cell, "done elsewhere")
            else:
                self._start(cell, context)

    def _start(self, cell: Cell, context: ForkServerContext) -> None:
        notes = self._notes(cell)
        arguments = (cell, self.take_over, notes)
        process = context.Process(target=run_cell, args=arguments, name=cell.name)
        try:
            self.running[cell] = _Child(process)
        except (EOFError, ConnectionError):
            self._fail(cell, "not started: the process that forks cells was killed; out of memory?")
            return
        self.show.started(cell.name)
        for note in notes:
            self.show.said(f"{cell.name}: {note}")

    def _notes(self, cell: Cell) -> list[str]:
        """What its user should know of an earlier start, and of the cells that it builds on."""
        summary = cell.folder / "summary.json"
        again = f"{summary} is not whole, for its writer was killed: the cell is run again"
        return [again] * summary.exists() + [
            f"{name}, which comes before, was ended by a guard ({self.stopped[name]}); its export "
            "holds the accepted weights, and these are used"
            for name in cell.after
            if name in self.stopped
        ]

    def _is_free(self, cell: Cell) -> bool:
        """Whether nobody owns the cell's folder. A cell that nobody here may own fails."""
        try:
            refuse_if_held(cell.folder, take_over=self.take_over)
            return True
        except InUse as error:
            if error.state == "alive":
                if cell not in self.held:
                    self.show.said(f"{cell.name}: waits: {error}")
                self.held[cell] = time.monotonic() + LOOK_S
                return False
            self.owner_unknown = True
            self._fail(cell, str(error))
        except ValueError as error:
            self._fail(cell, str(error))
        return False

    def collect(self) -> None:
        """Sorts the cells whose process has ended into done and failed."""
        for cell, child in [(c, child) for c, child in self.running.items() if child.ended]:
            del self.running[cell]
            if child.exit_code == IN_USE:  # another process was faster
                self.waiting.append(cell)
                self.held[cell] = 0.0
            elif cell.done and child.exit_code in (0, STOPPED_BY_GUARD):
                self._close(cell, "done")
            else:
                log = cell.folder / "console.log"
                self._fail(cell, f"failed (exit {child.exit_code}), see {log}")

    def take_done(self, cells: Sequence[Cell]) -> None:
        """Cells that earlier runners have done: with what they ended then."""
        for cell in cells:
            self._close(cell)
            has_export = (cell.folder / "export").is_dir()
            if has_export and cell.exit_code == 0 and not cell.keep_checkpoints:
                _remove_checkpoints(cell.folder)  # it was killed before it did

    def _close(self, cell: Cell, result: str = "") -> None:
        """Sorts a done cell by the exit code in its summary; says so if it is news."""
        if cell.exit_code not in (0, STOPPED_BY_GUARD):
            self._fail(cell, f"ended with exit code {cell.exit_code}, see {cell.folder}")
            return
        if cell.stopped:
            self.stopped[cell.name] = cell.stopped
            result = f"ended by a guard ({cell.stopped})"
        self.done.add(cell.name)
        if result:
            self.show.ended(cell.name, result)

    def _fail(self, cell: Cell, reason: str) -> None:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self.held.pop(cell, None)
        self.failed.append(cell.name)
        self.show.ended(cell.name, reason, succeeded=False)


def run_matrix(
    cells: Sequence[Cell], parallel: int, take_over: bool = False, grid: Sequence[str] = ()
) -> list[str]:
    """Runs what is not done, `parallel` cells at a time, prerequisites first. Returns the names
    of the cells that failed or could not start. KeyboardInterrupt after a stop signal.

    take_over: also folders whose owner may be alive on another host (runs/lock.py). grid: two
    labels, for a table of accuracies on the way.
    """
    items = [Item(c.name, c.folder, c.cost, c.says, c.labels) for c in cells]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    caught: list[int] = []
    with (
        signals.handled_by(lambda number, frame: caught.append(number)),
        show_cells(items, grid, [c.name for c in cells if c.done]) as show,
    ):
        schedule = _Schedule(
            waiting=[c for c in cells if not c.done],
            parallel=parallel,
            take_over=take_over,
            done=set(),
            show=show,
        )
        schedule.take_done([c for c in cells if c.done])
        if words := _told_before(cells):
            show.said(words)
        if schedule.waiting:
            _start_server(context, caught)
        with _no_orphans(schedule.running, caught):
            while (schedule.waiting or schedule.running) and not caught:
                schedule.drop_blocked()
                schedule.start_ready(context)
                schedule.collect()
                time.sleep(POLL_S)
    if caught:
        raise KeyboardInterrupt(signal.Signals(caught[0]).name)
    if schedule.owner_unknown:
        print(
            "Once you know that the owners on other hosts have ended, take their folders over, in "
            f"{commands.directory()}:\n  {commands.again('--take-over-lock')}",
            file=sys.stderr,
        )
    return schedule.failed


def _told_before(cells: Sequence[Cell]) -> str:
    """What earlier runners have done of them, in words; "" for nothing."""
    done = sum(c.done for c in cells)
    if done == len(cells):
        return f"all {done} cells are done"
    begun = [(c.name, steps_done(c.folder)[0]) for c in cells if not c.done]
    left_off = [f"{name} (step {step})" for name, step in begun if step]
    more = f" and {len(left_off) - NAMED} more" if len(left_off) > NAMED else ""
    parts = [f"{done} of {len(cells)} cells are done"] * bool(done) + [
        f"begun before: {', '.join(left_off[:NAMED])}{more}"
    ] * bool(left_off)
    return "; ".join(parts)


@contextlib.contextmanager
def _no_orphans(running: Mapping[Cell, _Child], caught: Sequence[int]) -> Iterator[None]:
    """However the inside ends, afterwards no cell runs."""
    try:
        yield
    finally:
        children = list(running.values())
        if children:
            _stop(children, caught)


def _stop(children: Sequence[_Child], caught: Sequence[int]) -> None:
    """Passes the caught signals on, waits, and kills what is left. caught: grows meanwhile."""
    with contextlib.suppress(OSError):  # the terminal may be what has gone
        print(
            "\nstopping: the running cells finish their step and save it, which may take "
            f"{STOP_S:.0f} s; once more to stop them at once",
            file=sys.stderr,
            flush=True,
        )

    def all_ended() -> bool:
        return all(child.ended for child in children)

    def second_signal() -> bool:  # not the same one, sent to every process of a job
        return len(caught) > 1 and time.monotonic() > started + signals.SAME_SIGNAL_S

    started = time.monotonic()
    _send(children, caught[0] if caught else signal.SIGTERM)
    _wait_until(lambda: all_ended() or second_signal(), STOP_S)
    if second_signal():
        _send(children, caught[-1])
        _wait_until(all_ended, STOP_AT_ONCE_S)
    _send(children, signal.SIGKILL)
    _wait_until(all_ended, STOP_AT_ONCE_S)


def _send(children: Sequence[_Child], number: int) -> None:
    for child in children:
        child.send(number)


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(POLL_S)
