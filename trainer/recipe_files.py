"""reflux init: a recipe as a file of one's own, whole, with the reasons that the recipe gives.

A configuration is written out over its bases. A table of runs keeps its cells where they are: the
file builds on `recipe:NAME` and holds the keys that are worth changing.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import options, recipes
from .config.files import read_table
from .config.loader import deep_merge, toml_value, write_tables
from .matrix_file import is_matrix

SHORT = 80  # letters of a reason behind a key that has none in the recipe
KEY = re.compile(r"""^\s*([\w."'-]+)\s*=""")
SECTION = re.compile(r"^\s*\[([^\[\]]+)\]")


def init(words: list[str], prog: str) -> int:
    """reflux init [NAME]: lists a few recipes, or all, or writes one."""
    parser = argparse.ArgumentParser(
        prog=prog, description="List the recipes, or write one as a file of your own."
    )
    parser.add_argument("name", nargs="?", help="of a recipe")
    parser.add_argument("--out", type=Path, help="the file to write; default: its name, here")
    parser.add_argument("--force", action="store_true", help="also over a file that exists")
    parser.add_argument("--all", action="store_true", help="list every recipe, not a choice")
    parser.add_argument("--names", action="store_true", help="only the names of the recipes")
    args = parser.parse_args(words)
    if args.names or args.name is None:
        listed = recipes.names() if args.names else _listed() if args.all else _suggested()
        print("\n".join(listed))
        return 0
    try:
        file = recipes.recipe(args.name.removeprefix(recipes.PREFIX))
        out = args.out or Path(file.name)
        if out.exists() and not args.force:
            raise ValueError(f"{out} exists; want another --out, or --force")
        out.write_text(_matrix(args.name, file) if is_matrix(file) else own_file(file))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{out}: {recipes.purpose(args.name)}")
    print(f"next: {_next(file, out)}", file=sys.stderr)
    return 0


def _next(file: Path, out: Path) -> str:
    return f"reflux matrix {out}" if is_matrix(file) else f"reflux check {out}, reflux run {out}"


def _suggested() -> list[str]:
    """The short list, and what to do with it."""
    first = recipes.SUGGESTED[0].name
    lines = [f"Take {first} first: reflux run {first}", ""]
    for s in recipes.SUGGESTED:
        lines += [s.name, f"    {s.purpose}", f"    {s.takes}; needs {s.needs}"]
    return [
        *lines,
        "",
        "A file of your own, with every key that the recipe sets: reflux init NAME",
        f"All {len(recipes.names())} recipes: reflux init --all",
    ]


def _listed() -> list[str]:
    width = max(map(len, recipes.names()))
    return [f"{name:<{width}}  {recipes.purpose(name)}" for name in recipes.names()]


def own_file(file: Path) -> str:
    """The text of a configuration: head of the recipe, every key that it or one of its bases sets,
    and behind each key the comment that stands behind it there, or what the key is for.
    """
    chain = list(_chain(file))
    table: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    known = {k: v for k, v in options.reasons().items() if len(v) <= SHORT}
    for path in reversed(chain):
        own = read_table(path)
        own.pop("base", None)
        table = deep_merge(table, own)
        # another value needs another reason
        reasons = {k: v for k, v in reasons.items() if k not in set(_keys(own))}
        reasons |= _reasons(path.read_text(encoding="utf-8"))
    return "\n".join([*_head(file), *write_tables(table, {**known, **reasons})]) + "\n"


def _keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """a.b for every value."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _chain(file: Path) -> Iterator[Path]:
    """The file and its bases, top first."""
    yield file
    base = read_table(file).get("base")
    if base is not None:
        yield from _chain(recipes.beside(file.parent, base))


def _head(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:count]


def _reasons(text: str) -> Mapping[str, str]:
    """a.b -> the comment behind `b = ...` of table [a]."""
    found, section = {}, ""
    for line in text.splitlines():
        if match := SECTION.match(line):
            section = match[1].strip() + "."
        elif (match := KEY.match(line)) and (comment := _comment(line)):
            found[section + match[1]] = comment
    return found


def _comment(line: str) -> str:
    """What stands behind the # of a line of TOML; a # in quotes is none."""
    quote = ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote and line[at - 1] != "\\" else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#":
            return line[at + 1 :].strip()
    return ""


def _matrix(name: str, file: Path) -> str:
    """A table of runs of one's own over the shipped one."""
    table = read_table(file)
    keys = {k: table[k] for k in ("folder", "seeds", "parallel") if k in table}
    reasons = {
        "folder": "of all cells; {folder} in a cell is <folder>/seed-<seed>",
        "seeds": "every cell once for each; three or more give intervals and verdicts",
        "parallel": "cells at a time",
    }
    lines = [f"base = {toml_value(f'{recipes.PREFIX}{name}')}  # its cells"]
    lines += [f"{k} = {toml_value(v)}  # {reasons[k]}" for k, v in keys.items()]
    more = "# A cell of your own goes below as [[cell]], as in docs/commands.md."
    return "\n".join([*_head(file), *lines, "", more, ""])
