"""The options of our own tables, each with its type, default and reason, from the dataclasses that
define them: the comment behind a field, or the lines of comment above it.
"""

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from .fit import spell
from .phases import PHASES
from .schema import NO_SECTIONS, Config


@dataclass(frozen=True)
class Option:
    """value: the default, or that of a run; MISSING: it has to be chosen."""

    key: str
    kind: str  # its type in a user's words
    value: Any
    reason: str


@dataclass(frozen=True)
class Section:
    """name: "" for the keys at the head of a file."""

    name: str
    purpose: str
    options: tuple[Option, ...]


def own_sections() -> list[Section]:
    """All of our tables, in the order of schema.py."""
    return list(_sections(Config, ""))


def reasons() -> Mapping[str, str]:
    """a.b -> the reason of the option."""
    dotted = ((s, o, f"{s.name}." if s.name else "") for s in own_sections() for o in s.options)
    return {dot + o.key: o.reason for s, o, dot in dotted if o.reason}


def _sections(table: type, name: str) -> Iterator[Section]:
    hints, comments = get_type_hints(table), _comments(table)
    inner: list[tuple[type, str]] = []
    options = []
    for f in fields(table):
        named = _named(hints[f.name])
        if is_dataclass(hints[f.name]):
            inner.append((hints[f.name], f.name))
        elif named is not None:
            inner.append((named, f"{f.name}.NAME"))
        elif f.name not in NO_SECTIONS:
            kind = " | ".join(PHASES) if (name, f.name) == ("", "phase") else spell(hints[f.name])
            options.append(Option(f.name, kind, _default(f), comments.get(f.name, "")))
    purpose = " ".join((inspect.cleandoc(table.__doc__ or "")).split())
    is_generated = purpose.startswith(f"{table.__name__}(")  # dataclasses write one themselves
    yield Section(name, "" if is_generated or not name else purpose, tuple(options))
    for inner_table, below in inner:
        yield from _sections(inner_table, f"{name}.{below}" if name else below)


def _named(hint: Any) -> type | None:
    """The dataclass of a table of named tables, [accept.NAME]."""
    last = (get_args(hint) or (None,))[-1]
    return last if isinstance(last, type) and is_dataclass(last) else None


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING


def _comments(table: type) -> dict[str, str]:
    """Field -> its comment, of base classes too."""
    found: dict[str, str] = {}
    for kind in reversed(table.__mro__):
        if is_dataclass(kind):
            found |= _comments_of(inspect.getsource(kind))
    return found


def _comments_of(source: str) -> dict[str, str]:
    lines = inspect.cleandoc(source).splitlines()
    tree = ast.parse("\n".join(lines))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            row = node.lineno - 2
            while row >= 0 and lines[row].strip().startswith("#"):
                above.insert(0, lines[row].strip().removeprefix("#").strip())
                row -= 1
            inside = [_behind(line) for line in lines[node.lineno - 1 : node.end_lineno]]
            found[node.target.id] = " ".join(filter(None, [*above, *inside]))
    return found


def _behind(line: str) -> str:
    """The comment of a line of Python; no field has a # in a string."""
    return line.partition("  #")[2].strip()
