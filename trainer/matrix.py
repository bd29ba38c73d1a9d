"""Many runs as one table: python -m reflux.trainer.matrix configs/quickstart.toml [--set folder=...
seeds=[0,1]]

A matrix file names cells; every cell is one `trainer/main.py --config FILE --set ...` or one
`python -m MODULE ...`.

    folder = "runs/quickstart"      # of the whole matrix; {folder} below is <folder>/seed-<seed>
    seeds = [0]
    parallel = 2                    # cells at a time

    [[cell]]
    name = "student-{teacher}-{attack}"
    each = { teacher = ["original", "distillable"], attack = ["seq_kd", "kd"] }     # one cell per
        combination
    after = ["teacher-{teacher}"]   # names of cells that must be done first
    config = "attacks/{attack}.toml"                                                # relative to
        the matrix file
    set = { "teacher.path" = "{folder}/teacher-{teacher}/export" }
    labels = { role = "student", teacher = "{teacher}", attack = "{attack}" }       # for the report

`base = "other.toml"` (or a list of them) puts this file's cells behind another matrix's (in the
same folder: what is done there is done here), and its other keys over that one's. A cell that
several bases share is one cell.

Cells are resumed one by one: a cell is done when its folder holds summary.json. A cell that fails
does not stop cells that do not depend on it. Children are forked from one process that has imported
everything, which saves the seconds of `import torch`.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from reflux.trainer.config.loader import deep_merge, toml_value

POLL_S = 0.1


@dataclass(frozen=True, eq=False)
class Cell:
    """One command and what has to be done before it."""

    name: str  # unique in the matrix, seed included
    folder: Path
    arguments: tuple[str, ...]  # of main, or of the module
    module: str  # "" for trainer/main.py
    after: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def command(self) -> str:
        start = f"python -m {self.module}" if self.module else "torchrun trainer/main.py"
        return f"{start} {shlex.join(self.arguments)}"


def read_matrix(path: Path, overrides: Mapping[str, Any]) -> tuple[dict, list[Cell]]:
    """The matrix table and its cells, every combination and seed written out. Raises ValueError for
    a broken one.
    """
    table = deep_merge(_read(path), overrides)
    known = {"folder", "seeds", "parallel", "cell", "styles", "title"}
    if strangers := set(table) - known:
        raise ValueError(
            f"{path}: unknown key {sorted(strangers)[0]}. Known there: {', '.join(sorted(known))}"
        )
    cells = [
        cell
        for seed in table["seeds"]
        for row in table["cell"]
        for cell in _expand(row, int(seed), table)
    ]
    names = [c.name for c in cells]
    for cell in cells:
        if missing := set(cell.after) - set(names):
            raise ValueError(
                f"{path}: {cell.name} waits for {sorted(missing)[0]}, which is no cell of this "
                "matrix"
            )
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}: two cells are called {next(n for n in names if names.count(n) > 1)}"
        )
    return table, cells


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """The file over its base, cells behind the base's; each cell remembers which folder its config
    is relative to.
    """
    with open(path, "rb") as f:
        table = tomllib.load(f)
    for row in table.get("cell", []):
        row["from"] = path.parent.resolve()
    bases = table.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    above = (*above, path.resolve())
    if not isinstance(bases, list) or any(
        not isinstance(b, str) or (path.parent / b).resolve() in above for b in bases
    ):
        raise ValueError(
            f"{path}: base = {bases!r}; want the name of another matrix file, or several, none "
            "that leads back here"
        )
    low: dict = {}
    for table_below in [*(_read(path.parent / b, above) for b in bases), table]:
        shared = low.get("cell", [])
        cells = [*shared, *(row for row in table_below.get("cell", []) if row not in shared)]
        low = deep_merge(low, table_below) | ({"cell": cells} if cells else {})
    return low


def _expand(row: Mapping[str, Any], seed: int, table: Mapping[str, Any]) -> Iterator[Cell]:
    base = Path(os.path.relpath(table["folder"])) / f"seed-{seed}"
    each = row.get("each", {})
    for values in itertools.product(*each.values()):
        names = dict(zip(each, values)) | {"folder": str(base), "seed": str(seed)}
        put = lambda x: _put(x, names)  # noqa: B023
        name = put(row["name"])
        folder = base / name
        if "module" in row:
            arguments = (*map(put, row.get("arguments", [])), "--out", str(folder))
            module = row["module"]
        else:
            sets = {"folder": str(folder), "seed": seed, "on_existing_run": "resume"} | row.get(
                "set", {}
            )
            config = Path(os.path.relpath(row["from"] / put(row["config"])))
            flags = [
                x
                for key, value in sets.items()
                for x in ("--set", f"{key}={toml_value(put(value))}")
            ]
            arguments, module = ("--config", str(config), *flags), ""
        after = tuple(f"{put(a)}@{seed}" for a in row.get("after", []))
        labels = {k: str(put(v)) for k, v in row.get("labels", {}).items()} | {"seed": str(seed)}
        yield Cell(f"{name}@{seed}", folder, arguments, module, after, labels)


def _put(x: Any, names: Mapping[str, Any]) -> Any:
    """Names filled in, lists entry by entry; a string that is nothing but one name becomes what
    that name stands for.
    """
    if isinstance(x, list):
        return [_put(y, names) for y in x]
    if not isinstance(x, str):
        return x
    return (
        names[x[1:-1]]
        if x[:1] == "{" and x[1:-1] in names and x[-1:] == "}"
        else x.format_map(names)
    )


def run_cell(cell: Cell) -> None:
    """In a child of its own: runs the cell with its output in <folder>/console.log."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / "console.log", "a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        print(f"$ {cell.command}", flush=True)
        if cell.module:
            import importlib

            code = importlib.import_module(cell.module).main(list(cell.arguments))
            if not code:
                (cell.folder / "summary.json").write_text(
                    json.dumps({"command": cell.command}) + "\n"
                )
        else:
            from . import main

            code = main.main(list(cell.arguments))
    sys.exit(code or 0)


def run_matrix(cells: list[Cell], parallel: int) -> list[str]:
    """Runs what is not done, `parallel` at a time, prerequisites first. Returns the names that
    failed or could not start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reflux.trainer.loop"])
    waiting, done = [c for c in cells if not c.done], {c.name for c in cells if c.done}
    running: dict[Cell, ForkServerProcess] = {}
    failed: list[str] = []
    start = time.monotonic()
    with _stop_children(running), _progress(cells, done, running) as show:
        while waiting or running:
            for cell in [c for c in waiting if set(c.after) & set(failed)]:
                waiting.remove(cell)
                failed.append(cell.name)
            for cell in [c for c in waiting if set(c.after) <= done][
                : max(parallel - len(running), 0)
            ]:
                waiting.remove(cell)
                running[cell] = context.Process(target=run_cell, args=(cell,), name=cell.name)
                running[cell].start()
            for cell, process in list(running.items()):
                if not process.is_alive():
                    process.join()
                    del running[cell]
                    (done.add if cell.done and process.exitcode == 0 else failed.append)(cell.name)
                    show(cell, process.exitcode, time.monotonic() - start)
            time.sleep(POLL_S)
    return failed


@contextlib.contextmanager
def _stop_children(running: dict[Cell, ForkServerProcess]) -> Iterator[None]:
    """Ctrl-C lets every running cell finish its step and save it."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "\nstopping: the running cells finish their step and save; run the same command to go "
            "on",
            file=sys.stderr,
        )
        # the signal may have come while one was being started
        started = [p for p in running.values() if p.pid is not None]
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        for process in started:
            process.join(60)
        raise


@contextlib.contextmanager
def _progress(cells: list[Cell], done: set[str], running: dict) -> Iterator:
    """A bar on a terminal, a line per finished cell anywhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=len(cells), completed=len(done))

        def show(cell: Cell, code: int | None, seconds: float) -> None:
            result = (
                "done" if code == 0 else f"failed (exit {code}), see {cell.folder / 'console.log'}"
            )
            bar.update(
                task,
                completed=len(done),
                description=", ".join(c.name for c in running) or "waiting",
            )
            console.print(f"[{len(done)}/{len(cells)}] {cell.name}: {result} after {seconds:.0f} s")

        yield show


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.matrix", description="Run a table of runs, then report."
    )
    parser.add_argument("matrix", type=Path)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. folder='\"runs/x\"', seeds=[0,1,2]",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(arguments)
    try:
        overrides = tomllib.loads("\n".join(args.set))
        table, cells = read_matrix(args.matrix, overrides)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"{args.matrix}: {error}")
    if args.dry_run:
        print("\n".join(c.command for c in cells))
        return 0
    parallel = int(table.get("parallel", 1))
    # cells share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    folder = Path(table["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    rows = [
        {
            "name": c.name,
            "folder": os.path.relpath(c.folder, folder),
            "command": c.command,
            "labels": c.labels,
        }
        for c in cells
    ]
    (folder / "matrix.json").write_text(
        json.dumps(
            {"title": table.get("title", ""), "styles": table.get("styles", {}), "cells": rows},
            indent=1,
        )
        + "\n"
    )
    try:
        failed = run_matrix(cells, parallel)
    except KeyboardInterrupt:
        return 130
    _report(folder, {label for c in cells if c.done for label in c.labels})
    print(
        f"{len(cells) - len(failed)} of {len(cells)} cells done in {time.monotonic() - start:.0f} "
        f"s; report: {folder / 'report.md'}"
    )
    return 1 if failed else 0


def _report(folder: Path, labels: set[str]) -> None:
    from reflux.trainer.studies.ablations import write_ablations
    from reflux.trainer.studies.attack_report import write_report
    from reflux.trainer.studies.diagnosis_table import write_diagnoses
    from reflux.trainer.studies.eta_sweep import write_knob

    print(write_report(folder))
    for label, write in (
        ("eta", write_knob),
        ("ablation", write_ablations),
        ("pair", write_diagnoses),
    ):
        if label in labels:
            print(write(folder))


if __name__ == "__main__":
    sys.exit(main())
