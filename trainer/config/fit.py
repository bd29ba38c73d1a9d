"""A value that a user wrote, against the type hint of what it sets; and the nearest known name to
one that is not known. The one rule for configuration files, `--set`, options of tasks and
torchtitan's own sections.
"""

import math
import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def fit(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` wants it: an int becomes a float, a list a tuple.

    A bool is no int, and a float has to be finite. ValueError: `where`, the value, and what is
    wanted.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fit(value, args[0], where)
    if origin in (Union, types.UnionType):
        return _fit_one_of(value, hint, where)
    if origin is tuple and args[-1] is not Ellipsis:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise _wrong(value, hint, where)
        return tuple(fit(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise _wrong(value, hint, where)
        return origin(fit(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if not _is_a(value, hint):
        raise _wrong(value, hint, where)
    return value


def _fit_one_of(value: Any, hint: Any, where: str) -> Any:
    for kind in get_args(hint):
        try:
            return fit(value, kind, where)
        except ValueError:
            continue
    raise _wrong(value, hint, where)


def _is_a(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (Mapping, dict):
        if not isinstance(value, Mapping):
            return False
        return args[-1] is not str or all(isinstance(v, str) for v in value.values())
    return type(value) is hint and (hint is not float or math.isfinite(value))


def _wrong(value: Any, hint: Any, where: str) -> ValueError:
    return ValueError(f"{where} = {value!r}; want {spell(hint)}")


def spell(hint: Any) -> str:
    """A type hint in a user's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return spell(args[0])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(map(spell, args))
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list of {spell(args[0])}"
    if origin is tuple:
        return f"[{', '.join(a.__name__ for a in args)}]"
    if origin in (Mapping, dict):
        return "a table of strings" if args[-1] is str else "a table"
    if hint is NoneType:
        return "none (leave it out)"
    return "a finite float" if hint is float else getattr(hint, "__name__", str(hint))


def nearest(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """The end of a sentence about an unknown name: `, did you mean X?` or a full stop.

    `prefix` is written before X; `cutoff` is difflib's, 0 to 1.
    """
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f", did you mean {prefix}{near[0]}?" if near else "."


def nearest_model(path: str) -> str:
    """`, did you mean X?` for the model folder beside `path` that is called most like it; empty
    where there is none.
    """
    at = Path(path).expanduser()
    near = [p.name for f in ("config.json", "adapter_config.json") for p in _holding(at.parent, f)]
    guess = nearest(at.name, near, "" if at.parent == Path() else f"{Path(path).parent}/")
    return guess if guess.startswith(",") else ""


def _holding(parent: Path, file: str) -> list[Path]:
    try:
        return [found.parent for found in parent.glob(f"*/{file}")]
    except OSError:
        return []
