"""Many runs as one table: python -m reflux.trainer.matrix FILE [--set seeds=[0,1]] [--dry-run]

`--only 'student-*'` runs the cells whose names match, and all that they wait for; reports say what
of the rest has not been run.

A matrix file lists cells. A cell is one `trainer/main.py --config FILE --set ...` or one
`python -m MODULE ...`.

    folder = "runs/quickstart"      # of the whole matrix; {folder} below is <folder>/seed-<seed>
    seeds = [0]
    parallel = 2                    # cells at a time
    # of done cells: those without an export, or that a cell names, stay. Default true
    keep_checkpoints = false

    [[cell]]
    name = "student-{teacher}-{attack}"
    # one cell per combination
    each = { teacher = ["original", "distillable"], attack = ["seq_kd", "kd"] }
    after = ["teacher-{teacher}"]   # cells that must be done first
    config = "attacks/{attack}.toml"    # relative to the matrix file
    set = { "teacher.path" = "{folder}/teacher-{teacher}/export" }
    labels = { role = "student", teacher = "{teacher}", attack = "{attack}" }   # for the reports
    cost = 30       # seconds of one idle core, roughly: weighs it in the time left
    says = "a student learns from the {teacher} teacher"    # printed when it starts

Two cells of one seed in one place of a report are refused (studies/labels.py); those of each value
of a label `family` have an attack report of their own.

`says` at the top is printed first; `grid = ["attack", "teacher"]` names two labels for a table of
accuracies that fills while cells end (runs/cell_progress.py).

FILE is a path, or the name of a recipe (config/recipes.py). `base = "other.toml"` (or recipe:NAME,
or a list of them) puts this file's cells behind another matrix's, in the same folder, and its other
keys over that one's. A cell that several bases share is one cell.

A cell is done when its folder holds summary.json; done cells are skipped. A matrix whose done cells
were made with other settings, or from files that earlier cells have replaced since, is refused
(runs/done_cells.py). A cell that fails stops
only the cells that depend on it. A cell that a guard ended (exit code 4) has not failed: what
depends on it uses the accepted weights that it exported, and the runner, the logs of these cells
and the reports say so. A cell whose folder another process is using waits (cells.py).

Exit code: 0; 1 where a cell failed, or a report that its labels ask for could not be written (the
others are); 4 where none failed but a guard ended one; 130 after a signal.

Reports are written at the end, one for each label in REPORTS that a finished cell carries. A new
report is one function, Path -> str, and one line there.
"""

import argparse
import fnmatch
import importlib
import json
import os
import sys
import time
import tomllib
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.cells import INTERRUPTED, STOPPED_BY_GUARD, Cell, run_matrix
from reflux.trainer.config.recipes import find
from reflux.trainer.matrix_file import Matrix, read_matrix
from reflux.trainer.runs import commands, output, signals
from reflux.trainer.runs.done_cells import changes
from reflux.trainer.runs.files import read_object, write_json
from reflux.trainer.runs.lock import hold
from reflux.trainer.runs.progress import duration

NAME = "reflux.trainer.matrix"
WRITE_S = 60.0  # how long to wait for another runner that writes reports
NAMED = 5  # cells that a message names

# label of a cell in the matrix file -> "module:function" that writes its report into the folder of
# the matrix and returns it as text. Imported when it is needed
REPORTS = {
    "role": "reflux.trainer.studies.attack_report:write_report",
    "eta": "reflux.trainer.studies.eta_sweep:write_eta_sweep",
    "ablation": "reflux.trainer.studies.ablations:write_ablations",
    "pair": "reflux.trainer.studies.diagnosis_table:write_diagnoses",
}


def main(arguments: list[str] | None = None, prog: str = f"python -m {NAME}") -> int:
    """Runs the matrix that the command line names. Returns the exit code."""
    parser, args = _parse(arguments, prog)
    commands.remember(arguments, name=NAME)
    if sys.stdout is sys.__stdout__:  # nobody captures it
        output.survive_lost_reader()
    try:
        matrix = read_matrix(find(args.matrix), _overrides(args.set))
        chosen = only(matrix.cells, args.only) if args.only else matrix.cells
    except (OSError, ValueError) as error:
        named = str(error).startswith(f"{args.matrix}:")
        parser.error(str(error) if named else f"{args.matrix}: {error}")
    if args.dry_run:
        print("\n".join(c.command for c in chosen))
        return 0
    # cells share the cores
    threads = max(1, (os.cpu_count() or 1) // matrix.parallel)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        with signals.handled_by(signals.raise_interrupt):
            return _run_and_report(matrix, chosen, args.take_over_lock)
    except KeyboardInterrupt:
        print(f"To go on, in {commands.directory()}:\n  {commands.again()}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError) as error:
        if os.environ.get("REFLUX_TRACEBACK"):
            raise
        parser.error(f"{error}\n(REFLUX_TRACEBACK=1 shows where)")


def _overrides(sets: Sequence[str]) -> Mapping[str, Any]:
    try:
        return tomllib.loads("\n".join(sets))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"--set {' --set '.join(sets)} is no TOML ({error}); want KEY=VALUE, a text in quotes: "
            "--set 'folder=\"runs/x\"'"
        ) from None


def only(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names, without their seed, match one of the patterns (shell style), and those
    that they wait for, in the file's order. ValueError for a pattern that matches none.
    """
    by_name = {cell.name: cell for cell in cells}
    chosen: set[str] = set()
    for pattern in patterns:
        matching = [n for n in by_name if fnmatch.fnmatchcase(n.rpartition("@")[0], pattern)]
        if not matching:
            raise ValueError(f"--only {pattern!r} matches no cell; --dry-run lists them all")
        chosen.update(matching)
    waiting = list(chosen)
    while waiting:
        more = set(by_name[waiting.pop()].after) - chosen
        chosen |= more
        waiting += more
    return [cell for cell in cells if cell.name in chosen]


def _run_and_report(matrix: Matrix, cells: list[Cell], take_over: bool) -> int:
    """Runs the cells, all of the matrix or some, and reports on those of the matrix that are
    done. ValueError, before anything is run or written, where a done cell is another one now.
    """
    refuse_changed(matrix.cells)
    _write_cells(matrix)
    start = time.monotonic()
    if matrix.says and not all(c.done for c in cells):
        print(matrix.says, end="\n\n", flush=True)
    failed = run_matrix(cells, matrix.parallel, take_over, matrix.grid)
    refuse_changed(matrix.cells)  # what was done anew just now, others may have been made from
    missing = write_reports(matrix)
    done = len(cells) - len(failed)
    took = duration(time.monotonic() - start)
    print(f"{done} of {len(cells)} cells done in {took}; reports: {matrix.folder}")
    stopped = [c.name for c in cells if c.stopped]
    if stopped:
        print(
            f"a guard ended {len(stopped)} of them: {', '.join(stopped)}. Their exports hold the "
            "weights that were accepted, and the cells behind them used these"
        )
    return 1 if failed or missing else STOPPED_BY_GUARD if stopped else 0


def refuse_changed(cells: Sequence[Cell]) -> None:
    """ValueError where cells were done with other settings, or from other files, than they would be
    now: reports would give the old numbers under the new names.
    """
    found = {c: changes(c.folder, c.module, c.arguments) for c in cells if c.done}
    changed = [f"  {c.folder}: {', '.join(what)}" for c, what in found.items() if what]
    if changed:
        more = f"\n  and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise ValueError(
            "done cells were made from something else than the matrix says now:\n"
            + "\n".join(changed[:NAMED])
            + f"{more}\nPut it back, give the matrix another folder (--set folder=...), or move "
            "the folders of these cells away to run them anew"
        )


def _parse(
    arguments: list[str] | None, prog: str
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog=prog, description="Run a table of runs, then report.")
    parser.add_argument("matrix", help="a .toml or .yaml file, or the name of a recipe: quickstart")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. folder='\"runs/x\"', seeds=[0,1,2]",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="e.g. 'student-*-seq_kd': these cells, for every seed, and all that they wait for",
    )
    parser.add_argument(
        "--take-over-lock",
        action="store_true",
        help="also run cells whose folder a process on another host owned that is known to be dead",
    )
    return parser, parser.parse_args(arguments)


def _write_cells(matrix: Matrix) -> None:
    """matrix.json: what the reports know of the cells."""
    cells = [
        {
            "name": c.name,
            "folder": os.path.relpath(c.folder, matrix.folder),
            "command": c.command,
            "labels": c.labels,
        }
        for c in matrix.cells
    ]
    table = {"title": matrix.title, "styles": matrix.styles, "cells": cells}
    with hold(matrix.folder, wait_s=WRITE_S):  # there may be other runners
        write_json(matrix.folder / "matrix.json", table)


def write_reports(matrix: Matrix) -> list[str]:
    """Writes and prints the reports on the finished cells. Returns why others were not written."""
    return _report(matrix.folder, {label for c in matrix.cells if c.done for label in c.labels})


def report_again(folder: Path) -> list[str]:
    """The reports of a matrix folder, from its matrix.json; returns why others were not written.
    ValueError where no cell is done.
    """
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    done = [c for c in cells if read_object(folder / c["folder"] / "summary.json") is not None]
    if not done:
        raise ValueError(f"{folder}: none of its {len(cells)} cells is done yet")
    return _report(folder, {label for c in done for label in c["labels"]})


def _report(folder: Path, labels: Collection[str]) -> list[str]:
    """Each by itself: one that cannot be written keeps no other from its readers."""
    missing = []
    with hold(folder, wait_s=WRITE_S):
        for label, target in REPORTS.items():
            if label in labels:
                module, _, function = target.partition(":")
                try:
                    print(getattr(importlib.import_module(module), function)(folder))
                except Exception as error:
                    if os.environ.get("REFLUX_TRACEBACK") or not isinstance(
                        error, OSError | ValueError
                    ):
                        traceback.print_exc()
                    missing.append(f"no {module.rpartition('.')[2]} (label {label}): {error}")
    if missing:
        print("\n".join(missing), file=sys.stderr)
    return missing


if __name__ == "__main__":
    sys.exit(main())
