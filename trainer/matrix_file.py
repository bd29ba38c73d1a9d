"""A matrix file, read and checked: every combination and seed of its cells written out. What a
file holds: matrix.py. All that can be refused is refused here, before anything runs.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cells import Cell
from .config.files import read_table
from .config.fit import nearest
from .config.loader import deep_merge, toml_value
from .config.recipes import beside
from .studies.labels import KNOWN, ROLES, of_families, refuse_shared_places

COST_S = 30.0  # of a cell that names none
NEAR = 0.75  # likeness (difflib's) from which an unknown label or {name} is a misspelt one
BRACES = re.compile(r"\{(\w+)\}")

Names = Mapping[str, Any]  # what {name} stands for in a cell
Row = Mapping[str, Any]  # a [[cell]] of the file


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


# --- what a file may hold


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_cost(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _is_list(value: Any, of: Callable[[Any], bool], least: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= least and all(map(of, value))


def _is_table(value: Any, of: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, Mapping) and all(map(of, value.values()))


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


Want = tuple[Callable[[Any], bool], str]  # (what is accepted, the same in words)

KEYS: Mapping[str, Want] = {
    "folder": (_is_name, "a path in quotes"),
    "seeds": (
        lambda v: _is_list(v, _is_whole, least=1),
        "a list of one whole number or more, as in [0, 1]",
    ),
    "parallel": (lambda v: _is_whole(v) and v >= 1, "the cells at a time, 1 or more"),
    "keep_checkpoints": (lambda v: isinstance(v, bool), "true or false"),
    "cell": (lambda v: _is_list(v, _is_table, least=1), "one table or more under [[cell]]"),
    "styles": (
        lambda v: _is_table(v, _is_pattern),
        "a table of answer styles with their regular expressions",
    ),
    "title": (_is_text, "a text"),
    "says": (_is_text, "a text"),
    "grid": (
        lambda v: _is_list(v, _is_text) and len(v) in (0, 2),
        "two labels of cells, rows and columns",
    ),
}
CELL_KEYS: Mapping[str, Want] = {
    "name": (_is_name, "a text, another for each combination"),
    "each": (
        lambda v: _is_table(v, lambda values: _is_list(values, _is_scalar, least=1)),
        'a list of values for each name, as in { teacher = ["original"] }',
    ),
    "after": (lambda v: _is_list(v, _is_text), "a list of names of cells"),
    "config": (_is_name, "the file of a run's configuration"),
    "set": (_is_table, "a table of options and their values"),
    "module": (_is_name, "the name of a module"),
    "arguments": (lambda v: _is_list(v, _is_scalar), "a list of texts"),
    "labels": (lambda v: _is_table(v, _is_scalar), "a table of texts"),
    "cost": (_is_cost, "seconds of one core"),
    "says": (_is_text, "a text"),
}
NEEDED = ("folder", "seeds", "cell")


def _check_keys(place: str, table: Row, known: Mapping[str, Want]) -> None:
    for key, value in table.items():
        if key not in known:
            raise ValueError(
                f"{place}: unknown key {key}{nearest(key, known)} Known there: {', '.join(known)}"
            )
        accepts, words = known[key]
        if not accepts(value):
            raise ValueError(f"{place}: {key} = {value!r}; want {words}")


def _check_row(place: str, row: Row) -> None:
    _check_keys(place, {k: v for k, v in row.items() if k != "from"}, CELL_KEYS)
    if "name" not in row:
        raise ValueError(f"{place}: no key name; want a text, another for each combination")
    if ("config" in row) == ("module" in row):
        has = "both" if "config" in row else "neither"
        raise ValueError(
            f"{place}: has {has} of config and module; want the file of a run's configuration "
            "(config), or a module with its arguments"
        )
    other, key = ("module", "arguments") if "config" in row else ("config", "set")
    if key in row:
        raise ValueError(f"{place}: {key} belongs to a cell with {other}, and nothing reads it")


# --- reading


def read_matrix(path: Path, overrides: Mapping[str, Any]) -> Matrix:
    """The matrix of a file. `overrides`: keys that win over the file's. Raises ValueError for a
    file that cannot be run.
    """
    table = deep_merge(_read(path), overrides)
    _check_keys(str(path), table, KEYS)
    if missing := [key for key in NEEDED if key not in table]:
        raise ValueError(f"{path}: no key {missing[0]}; want folder, seeds and [[cell]]")
    for number, row in enumerate(table["cell"], 1):
        _check_row(f"{path}: cell {row.get('name', number)}", row)
    home = Path(os.path.relpath(table["folder"]))
    cells = [
        cell
        for seed in table["seeds"]
        for row in table["cell"]
        for cell in _expand(path, row, seed, home / f"seed-{seed}")
    ]
    _check_names(path, cells)
    _check_labels(path, cells)
    if not table.get("keep_checkpoints", True):
        cells = [replace(cell, keep_checkpoints=_is_read(cell, cells)) for cell in cells]
    return Matrix(
        title=table.get("title", ""),
        folder=Path(table["folder"]),
        seeds=tuple(table["seeds"]),
        parallel=table.get("parallel", 1),
        styles=table.get("styles", {}),
        cells=cells,
        says=table.get("says", "").strip(),
        grid=tuple(table.get("grid", [])),
    )


def _is_read(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether a cell of the matrix names the checkpoints of this one."""
    home = f"{cell.folder}/checkpoint"
    return any(home in argument for other in cells for argument in other.arguments)


def is_matrix(path: Path) -> bool:
    """Whether a file lists cells, itself or in a base; False for what cannot be read."""
    try:
        table = read_table(path)
        base = table.get("base", [])
        cells = "cell" in table or isinstance(base, list) and base != []
        return cells or (isinstance(base, str) and is_matrix(beside(path.parent, base)))
    except (ValueError, RecursionError):
        return False


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file over its bases, cells behind theirs. Each cell gets a key "from": the folder that
    its config is relative to. `above`: the files that named this one as a base.
    """
    table = read_table(path)
    accepts, words = KEYS["cell"]
    if not accepts(table.get("cell", [{}])):
        raise ValueError(f"{path}: cell = {table['cell']!r}; want {words}")
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


# --- writing cells out


def _expand(path: Path, row: Row, seed: int, folder: Path) -> Iterator[Cell]:
    """One cell for each combination of the values in `each`. `folder`: of the seed."""
    each = row.get("each", {})
    for values in itertools.product(*each.values()):
        names = dict(zip(each, values)) | {"folder": str(folder), "seed": seed}
        _check_braces(path, row, names)
        name = _text(row["name"], names)
        labels = {k: _text(v, names) for k, v in row.get("labels", {}).items()}
        arguments = _module_arguments if "module" in row else _config_arguments
        yield Cell(
            name=f"{name}@{seed}",
            folder=folder / name,
            arguments=arguments(row, names, folder / name),
            module=row.get("module", ""),
            after=tuple(f"{_text(a, names)}@{seed}" for a in row.get("after", [])),
            labels=labels | {"seed": str(seed)},
            cost=float(row.get("cost", COST_S)),
            says=_text(row.get("says", ""), names),
        )


def _module_arguments(row: Row, names: Names, folder: Path) -> tuple[str, ...]:
    return (*(_text(a, names) for a in row.get("arguments", [])), "--out", str(folder))


def _config_arguments(row: Row, names: Names, folder: Path) -> tuple[str, ...]:
    sets = {"folder": str(folder), "seed": names["seed"], "on_existing_run": "resume"}
    sets |= fill_in(row.get("set", {}), names)
    config = os.path.relpath(beside(row["from"], _text(row["config"], names)))
    values = (f"{key}={toml_value(value)}" for key, value in sets.items())
    return ("--config", config, *(x for value in values for x in ("--set", value)))


def fill_in(value: Any, names: Names) -> Any:
    """`value` with {name} replaced, in lists and tables entry by entry; other braces stay. A string
    that is nothing but one {name} becomes what the name stands for, a number for instance.
    """
    if isinstance(value, list):
        return [fill_in(v, names) for v in value]
    if isinstance(value, Mapping):
        return {_text(k, names): fill_in(v, names) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    whole = BRACES.fullmatch(value)
    if whole and whole[1] in names:
        return names[whole[1]]
    return BRACES.sub(lambda found: str(names.get(found[1], found[0])), value)


def _text(value: Any, names: Names) -> str:
    return str(fill_in(value, names))


def _check_braces(path: Path, row: Row, names: Names) -> None:
    """A {name} that stands for nothing. In options and arguments it may be a text of its own, as in
    a template of prompts, unless it is nearly one that the cell knows.
    """
    own = [row["name"], row.get("config", ""), *row.get("after", []), *_values(row.get("labels"))]
    others = _values([row.get("set", {}), row.get("arguments", [])])
    for values, cutoff in ((own, 0.0), (others, NEAR)):
        for word in (w for v in values if isinstance(v, str) for w in BRACES.findall(v)):
            near = nearest(word, names, cutoff=cutoff or NEAR)
            if word not in names and (not cutoff or near != "."):
                raise ValueError(
                    f"{path}: cell {row['name']}: {{{word}}} stands for nothing{near} Known there: "
                    f"{', '.join(names)}"
                )


def _values(value: Any) -> list[Any]:
    """What lists and tables hold, however deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for v in value for x in _values(v)] if isinstance(value, list) else [value]


# --- checking cells


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


def _check_labels(path: Path, cells: Sequence[Cell]) -> None:
    """Before anything runs: the report that reads them is written when all cells are done."""
    for cell in cells:
        for label in cell.labels:
            near = nearest(label, KNOWN, cutoff=NEAR)
            if label not in KNOWN and near != ".":
                raise ValueError(f"{path}: {cell.name} has the label {label}{near}")
        _check_eta(path, cell)
        _check_role(path, cell)
    for family in of_families(cell.labels for cell in cells):
        mine = [c for c in cells if family in ("", c.labels.get("family", family))]
        refuse_shared_places(path, [(c.name, c.labels) for c in mine])


def _check_eta(path: Path, cell: Cell) -> None:
    eta = cell.labels.get("eta", "0")
    try:
        finite = math.isfinite(float(eta))
    except ValueError:
        finite = False
    if not finite:
        raise ValueError(
            f"{path}: {cell.name} has the label eta = {eta!r}; want a number, the "
            "calibration's strength with its sign, 0 for the control arm"
        )


def _check_role(path: Path, cell: Cell) -> None:
    role = cell.labels.get("role")
    if role is not None and role not in ROLES:
        raise ValueError(
            f"{path}: {cell.name} has the label role = {role!r}{nearest(role, ROLES)} Known: "
            f"{', '.join(ROLES)}; no label role for a cell that is no row of a report"
        )
    # in reports of their own, which need no more than these labels
    defends = "defence" in cell.labels and role != "defence"
    if role is None or defends or {"eta", "ablation"} & set(cell.labels):
        return
    if missing := [name for name in ROLES[role] if not cell.labels.get(name)]:
        raise ValueError(
            f"{path}: {cell.name} has the label role = {role!r} without "
            f"{' and '.join(missing)}; want labels = {{ role = {role!r}, "
            f"{', '.join(f'{name} = ...' for name in ROLES[role])} }}"
        )
