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

Exit code: 0; 1 where a cell failed; 4 where none failed but a guard ended one; 130 after a signal.

Reports are written at the end, one for each label in REPORTS that a finished cell carries. A new
report is one function, Path -> str, and one line there.
"""

import argparse
import fnmatch
import importlib
import itertools
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reflux.trainer.cells import INTERRUPTED, STOPPED_BY_GUARD, Cell, run_matrix
from reflux.trainer.config.files import read_table
from reflux.trainer.config.loader import deep_merge, toml_value
from reflux.trainer.config.recipes import beside, find
from reflux.trainer.runs import commands, output, signals
from reflux.trainer.runs.done_cells import changes
from reflux.trainer.runs.files import read_object, write_json
from reflux.trainer.runs.lock import hold
from reflux.trainer.runs.progress import duration

NAME = "reflux.trainer.matrix"
WRITE_S = 60.0  # how long to wait for another runner that writes reports
KEYS = (
    "folder",
    "seeds",
    "parallel",
    "keep_checkpoints",
    "cell",
    "styles",
    "title",
    "says",
    "grid",
)
COST_S = 30.0  # of a cell that names none
NAMED = 5  # cells that a message names

# label of a cell in the matrix file -> "module:function" that writes its report into the folder of
# the matrix and returns it as text. Imported when it is needed
REPORTS = {
    "role": "reflux.trainer.studies.attack_report:write_report",
    "eta": "reflux.trainer.studies.eta_sweep:write_eta_sweep",
    "ablation": "reflux.trainer.studies.ablations:write_ablations",
    "pair": "reflux.trainer.studies.diagnosis_table:write_diagnoses",
}

# role -> the labels without which the report cannot place such a cell
LABELS = {
    "teacher": ("teacher",),
    "student": ("teacher", "attack"),
    "baseline": ("attack",),
    "start": ("student",),
    "defence": ("defence",),
    "repair": ("teacher",),
    "choices": ("teacher",),
}

Names = Mapping[str, Any]  # what {name} stands for in a cell


@dataclass(frozen=True)
class Matrix:
    """A matrix file with every combination and seed written out."""

    title: str
    folder: Path
    seeds: tuple[int, ...]
    parallel: int  # cells at a time
    styles: Mapping[str, str]  # name of an answer style -> regular expression on the text
    cells: list[Cell]
    says: str = ""  # what the matrix is for, in words; printed before its first cell
    grid: tuple[str, ...] = ()  # two labels, rows and columns of a table on the way


# --- reading


def read_matrix(path: Path, overrides: Mapping[str, Any]) -> Matrix:
    """The matrix of a file. `overrides`: keys that win over the file's. Raises ValueError for a
    file that cannot be run.
    """
    table = deep_merge(_read(path), overrides)
    if unknown := set(table) - set(KEYS):
        raise ValueError(
            f"{path}: unknown key {sorted(unknown)[0]}. Known there: {', '.join(KEYS)}"
        )
    if missing := {"folder", "seeds", "cell"} - set(table):
        raise ValueError(f"{path}: no key {sorted(missing)[0]}; want folder, seeds and [[cell]]")
    seeds = tuple(map(int, table["seeds"]))
    keep = table.get("keep_checkpoints", True)
    if not isinstance(keep, bool):
        raise ValueError(f"{path}: keep_checkpoints = {keep!r}; want true or false")
    cells = [
        cell
        for seed in seeds
        for row in table["cell"]
        for cell in _expand(row, seed, Path(os.path.relpath(table["folder"])) / f"seed-{seed}")
    ]
    _check_names(path, cells)
    _check_labels(path, cells)
    if not keep:
        cells = [replace(cell, keep_checkpoints=_is_read(cell, cells)) for cell in cells]
    return Matrix(
        title=table.get("title", ""),
        folder=Path(table["folder"]),
        seeds=seeds,
        parallel=int(table.get("parallel", 1)),
        styles=table.get("styles", {}),
        cells=cells,
        says=table.get("says", "").strip(),
        grid=_grid(path, table.get("grid", [])),
    )


def _is_read(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether a cell of the matrix names the checkpoints of this one."""
    home = f"{cell.folder}/checkpoint"
    return any(home in argument for other in cells for argument in other.arguments)


def _grid(path: Path, labels: Any) -> tuple[str, ...]:
    if not isinstance(labels, list) or len(labels) not in (0, 2):
        raise ValueError(f"{path}: grid = {labels!r}; want two labels of cells, rows and columns")
    return tuple(map(str, labels))


def is_matrix(path: Path) -> bool:
    """Whether a file lists cells, itself or in a base; False for what cannot be read."""
    try:
        table = read_table(path)
        base = table.get("base", [])
        cells = "cell" in table or isinstance(base, list) and base != []
        return cells or (isinstance(base, str) and is_matrix(beside(path.parent, base)))
    except (ValueError, RecursionError):
        return False


def _check_names(path: Path, cells: Sequence[Cell]) -> None:
    names = [c.name for c in cells]
    for cell in cells:
        if missing := set(cell.after) - set(names):
            raise ValueError(
                f"{path}: {cell.name} waits for {sorted(missing)[0]}, which is no cell of this "
                "matrix"
            )
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"{path}: two cells are called {twice}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_labels(path: Path, cells: Sequence[Cell]) -> None:
    """Before anything runs: the report that reads them is written when all cells are done."""
    for cell in cells:
        eta = cell.labels.get("eta", "0")
        if not _is_number(eta):
            raise ValueError(
                f"{path}: {cell.name} has the label eta = {eta!r}; want a number, the "
                "calibration's strength with its sign, 0 for the control arm"
            )
        role = cell.labels.get("role", "")
        # in reports of their own, which need no more than these labels
        if {"eta", "ablation"} & set(cell.labels) or (
            "defence" in cell.labels and role != "defence"
        ):
            continue
        if missing := [name for name in LABELS.get(role, ()) if not cell.labels.get(name)]:
            raise ValueError(
                f"{path}: {cell.name} has the label role = {role!r} without "
                f"{' and '.join(missing)}; want labels = {{ role = {role!r}, "
                f"{', '.join(f'{name} = ...' for name in LABELS[role])} }}"
            )


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file over its bases, cells behind theirs. Each cell gets a key "from": the folder that
    its config is relative to. `above`: the files that named this one as a base.
    """
    table = read_table(path)
    for row in table.get("cell", []):
        row["from"] = path.parent.resolve()
    above = (*above, path.resolve())
    low: dict[str, Any] = {}
    for base in _bases(path, table.pop("base", []), above):
        low = _lay_over(low, _read(base, above))
    return _lay_over(low, table)


def _bases(path: Path, bases: Any, above: tuple[Path, ...]) -> list[Path]:
    names = [bases] if isinstance(bases, str) else bases
    texts = isinstance(names, list) and all(isinstance(b, str) for b in names)
    files = [beside(path.parent, b) for b in names] if texts else []
    if not texts or any(f.resolve() in above for f in files):
        raise ValueError(
            f"{path}: base = {names!r}; want the name of another matrix file, or several, none "
            "that leads back here"
        )
    return files


def _lay_over(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Keys of `high` over those of `low`; cells of `low`, then those that only `high` has."""
    shared = low.get("cell", [])
    cells = [*shared, *(row for row in high.get("cell", []) if row not in shared)]
    return deep_merge(low, high) | ({"cell": cells} if cells else {})


def _expand(row: Mapping[str, Any], seed: int, folder: Path) -> Iterator[Cell]:
    """One cell for each combination of the values in `each`. `folder`: of the seed."""
    each = row.get("each", {})
    for values in itertools.product(*each.values()):
        names = dict(zip(each, values)) | {"folder": str(folder), "seed": str(seed)}
        name = fill_in(row["name"], names)
        labels = {k: str(fill_in(v, names)) for k, v in row.get("labels", {}).items()}
        arguments = _module_arguments if "module" in row else _config_arguments
        yield Cell(
            name=f"{name}@{seed}",
            folder=folder / name,
            arguments=arguments(row, names, folder / name),
            module=row.get("module", ""),
            after=tuple(f"{fill_in(a, names)}@{seed}" for a in row.get("after", [])),
            labels=labels | {"seed": str(seed)},
            cost=float(row.get("cost", COST_S)),
            says=fill_in(row.get("says", ""), names),
        )


def _module_arguments(row: Mapping[str, Any], names: Names, folder: Path) -> tuple[str, ...]:
    return (*fill_in(row.get("arguments", []), names), "--out", str(folder))


def _config_arguments(row: Mapping[str, Any], names: Names, folder: Path) -> tuple[str, ...]:
    sets = {"folder": str(folder), "seed": int(names["seed"]), "on_existing_run": "resume"}
    sets |= row.get("set", {})
    config = os.path.relpath(beside(row["from"], fill_in(row["config"], names)))
    values = (f"{key}={toml_value(fill_in(value, names))}" for key, value in sets.items())
    return ("--config", config, *(x for value in values for x in ("--set", value)))


def fill_in(value: Any, names: Names) -> Any:
    """`value` with {name} replaced, in lists entry by entry. A string that is nothing but one
    {name} becomes what the name stands for, a number for instance.
    """
    if isinstance(value, list):
        return [fill_in(v, names) for v in value]
    if not isinstance(value, str):
        return value
    whole = value[:1] == "{" and value[-1:] == "}" and value[1:-1] in names
    return names[value[1:-1]] if whole else value.format_map(names)


# --- the command


def main(arguments: list[str] | None = None, prog: str = f"python -m {NAME}") -> int:
    """Runs the matrix that the command line names. Returns the exit code."""
    parser, args = _parse(arguments, prog)
    commands.remember(arguments, name=NAME)
    if sys.stdout is sys.__stdout__:  # nobody captures it
        output.survive_lost_reader()
    try:
        matrix = read_matrix(find(args.matrix), tomllib.loads("\n".join(args.set)))
        chosen = only(matrix.cells, args.only) if args.only else matrix.cells
    except (OSError, KeyError, ValueError) as error:
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
    write_reports(matrix)
    done = len(cells) - len(failed)
    took = duration(time.monotonic() - start)
    print(f"{done} of {len(cells)} cells done in {took}; reports: {matrix.folder}")
    stopped = [c.name for c in cells if c.stopped]
    if stopped:
        print(
            f"a guard ended {len(stopped)} of them: {', '.join(stopped)}. Their exports hold the "
            "weights that were accepted, and the cells behind them used these"
        )
    return 1 if failed else STOPPED_BY_GUARD if stopped else 0


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


def write_reports(matrix: Matrix) -> None:
    """Writes and prints the reports on the finished cells."""
    _report(matrix.folder, {label for c in matrix.cells if c.done for label in c.labels})


def report_again(folder: Path) -> None:
    """The reports of a matrix folder, from its matrix.json. ValueError where no cell is done."""
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    done = [c for c in cells if read_object(folder / c["folder"] / "summary.json") is not None]
    if not done:
        raise ValueError(f"{folder}: none of its {len(cells)} cells is done yet")
    _report(folder, {label for c in done for label in c["labels"]})


def _report(folder: Path, labels: Collection[str]) -> None:
    with hold(folder, wait_s=WRITE_S):
        for label, target in REPORTS.items():
            if label in labels:
                module, _, function = target.partition(":")
                print(getattr(importlib.import_module(module), function)(folder))


if __name__ == "__main__":
    sys.exit(main())
