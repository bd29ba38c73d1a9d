"""Every file of configs/ says at its top how it is run or what it needs, and that is true."""

import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from reflux.trainer.config.loader import load
from reflux.trainer.matrix_file import read_matrix
from reflux.trainer.preflight.dry_run import plan

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.toml"))
MAKEFILE = (ROOT / "Makefile").read_text()
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def header(path: Path) -> str:
    """The comment before the first key, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.strip("# ") for line in lines)


def is_matrix(path: Path) -> bool:
    table = tomllib.loads(path.read_text())
    return "cell" in table or isinstance(table.get("base"), list)


def commands(path: Path) -> list[list[str]]:
    """What stands in backticks and is a command, cut at &&."""
    found = re.findall("`((?:python|torchrun|make|reflux) .+?)`", header(path))
    return [shlex.split(part) for text in found for part in text.split(" && ")]


MATRICES = [path for path in FILES if is_matrix(path)]
RUNS = [path for path in FILES if not is_matrix(path) and commands(path)]


def used_by(matrix: Path) -> set[Path]:
    """The configurations of its cells, and their bases."""
    found: set[Path] = set()
    for cell in read_matrix(matrix, {"folder": "f", "seeds": [0]}).cells:
        if not cell.module:
            left = [(ROOT / cell.arguments[1]).resolve()]
            while left:
                found.add(path := left.pop())
                base = tomllib.loads(path.read_text()).get("base")
                left += [(path.parent / base).resolve()] if base else []
    return found


@each_file
def test_a_config_says_how_it_is_run_or_what_it_needs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    users = re.findall(r"[Uu]sed by (configs/[\w./-]+\.toml)", header(path))
    for user in users:
        assert path in used_by(ROOT / user) or path in bases(ROOT / user), f"{user} does not"
    says = commands(path) or users or "Needs " in header(path) or "needs " in header(path)
    assert says, (
        "its first line: want a command in backticks, or `Used by configs/MATRIX.toml`, or `Needs "
        "...`"
    )


def bases(path: Path) -> list[Path]:
    names = tomllib.loads(path.read_text()).get("base", [])
    return [path.parent / name for name in ([names] if isinstance(names, str) else names)]


@each_file
def test_the_command_of_a_config_exists(path):
    for program, *arguments in commands(path):
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", MAKEFILE, re.M), f"no target {arguments[0]}"
        for name in arguments:
            is_path = "/" in name and not name.startswith("-") and name != "THIS"
            assert not is_path or (ROOT / name).exists() or "runs/" in name, name
        if arguments[:1] == ["-m"]:
            file = ROOT / (arguments[1].removeprefix("reflux.").replace(".", "/") + ".py")
            assert file.exists(), arguments[1]
    own = [c for c in commands(path) if str(path.relative_to(ROOT)) in c]
    assert own or not commands(path) or "make" in {c[0] for c in commands(path)}


@pytest.mark.parametrize("path", MATRICES, ids=lambda p: p.name)
def test_every_cell_of_a_matrix_is_a_valid_run(path, monkeypatch):
    """What a cell names is left to the cells before it; everything else is checked."""
    monkeypatch.chdir(ROOT)
    cells = read_matrix(path, {"folder": "f", "seeds": [0]}).cells
    seen = set()
    for cell in cells:
        flags = cell.arguments
        sets = tuple(flags[i + 1] for i, x in enumerate(flags) if x == "--set")
        # cells that differ in the paths of models alone are one
        key = (flags[1], *(s.split("=")[0] if "/" in s else s for s in sets))
        if not cell.module and key not in seen:
            seen.add(key)
            assert load(flags[1], sets).folder == str(cell.folder)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_dry_run_misses_nothing_but_what_the_first_line_names(path, monkeypatch, tmp_path):
    """In an empty folder: what is missing are models; the first line says which, or makes them."""
    monkeypatch.chdir(tmp_path)
    first = path.read_text().splitlines()[0]
    errors = [f for f in plan(load(path, ())).findings if f.level == "error"]
    for error in errors:
        missing = re.findall(r"(?:models|runs)/[\w./-]+\w", f"{error}")
        assert missing, error
        made = "reflux.trainer.studies.debug_models" in first
        assert made or any(name in first for name in missing), error
