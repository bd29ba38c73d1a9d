"""Files, recipes and `--set` into the frozen dataclasses of config.py. Strangers are refused with
the nearest key.
"""

import json
import math
import runpy
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from datetime import date, time
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .schema import TITAN_SECTIONS, Config, sections


def load(path: str | Path, sets: tuple[str, ...] = ()) -> Config:
    """A .toml file, or a .py recipe whose config() returns a Config; then each `--set a.b=value` on
    top.

    `base = "other.toml"` at the head of a file lays it over another one, relative to its own
    folder.
    """
    path = Path(path)
    if path.suffix == ".py":
        return fill(_run_recipe(path), _merge_sets(sets), "--set")
    table, override = _read(path), _merge_sets(sets)
    _check_keys(Config, override, "--set")
    return fill(Config, deep_merge(table, override), str(path))


def _run_recipe(path: Path) -> Config:
    recipe = runpy.run_path(str(path)).get("config")
    if not callable(recipe):
        raise ValueError(f"{path}: no function config(); want `def config() -> Config: ...`")
    cfg = recipe()
    if not isinstance(cfg, Config):
        raise ValueError(
            f"{path}: config() returned {type(cfg).__name__}; want "
            "reflux.trainer.config.schema.Config"
        )
    return cfg


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """The file over its bases. The keys of each are checked alone, so that an error names the file
    to mend.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        raise ValueError(
            f"{path}: no such file{f'; did you mean {path.parent / near[0]}?' if near else ''}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    base = table.pop("base", None)
    _check_keys(Config, table, str(path))
    if base is None:
        return table
    if not isinstance(base, str):
        raise ValueError(f"{path}: base = {base!r}; want the name of a .toml file")
    above = (*above, path.resolve())
    if (path.parent / base).resolve() in above:
        raise ValueError(f"{path}: base = {base!r} leads back to a file it is the base of")
    return deep_merge(_read(path.parent / base, above), table)


def deep_merge(low: Mapping, high: Mapping) -> dict:
    """`high` laid over `low`, table by table."""
    out = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = deep_merge(out[key], value) if both else value
    return out


def fill(target: Any, table: Mapping, source: str, prefix: str = "") -> Any:
    """A copy of `target` (a dataclass, or an instance of one) with the entries of `table`;
    strangers are refused.
    """
    _check_keys(target if isinstance(target, type) else type(target), table, source, prefix)
    hints = _hints(target)
    values = {}
    if prefix == "" and "titan" in hints:
        table = _fold_titan(target, table)
    for key, value in table.items():
        name = prefix + key
        if is_dataclass(hints[key]):
            values[key] = fill(getattr(target, key, hints[key]), value, source, f"{name}.")
        elif kind := _named_kind(hints[key]):
            before = {} if isinstance(target, type) else getattr(target, key)
            values[key] = {
                **before,
                **{
                    n: fill(before.get(n, kind), t, source, f"{name}.{n}.")
                    for n, t in value.items()
                },
            }
        else:
            values[key] = _fit(value, hints[key], f"{source}: {name}")
    if isinstance(target, type):
        for f in fields(target):
            if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(
                    f"{source}: {prefix}{f.name} is missing; want {_spell(hints[f.name])}"
                )
    try:
        return target(**values) if isinstance(target, type) else replace(target, **values)
    except ValueError as error:  # from __post_init__, which does not know the file
        raise ValueError(f"{source}: {prefix}{error}") from None


RENAMED = {  # the old name of a key, or of a section -> the new one
    "anchor": "reference",
    "serve": "defence",
    "calibration.max_unscored": "calibration.max_unaligned",
    "distill.queries": "distill.query_budget",
    "distill.classes": "distill.partition",
    "diagnose.heat": "diagnose.heatmap_texts",
    "diagnose.share": "diagnose.kl_fraction",
    "diagnose.top": "diagnose.overlap_k",
}


def _check_keys(target: type, table: Mapping, source: str, prefix: str = "") -> None:
    hints = _hints(target)
    known = sections() if target is Config else tuple(hints)
    for key, value in table.items():
        name = prefix + key
        if new := RENAMED.get(name):
            raise ValueError(f"{source}: {name} is called {new} now")
        if key not in known and not (target is Config and key == "titan"):
            near = get_close_matches(key, known, n=1, cutoff=0.5)  # half of `lr` is one letter
            guess = f", did you mean {prefix}{near[0]}?" if near else "."
            raise ValueError(f"{source}: unknown key {name}{guess} Known there: {', '.join(known)}")
        kind = _named_kind(hints.get(key))
        if key in TITAN_SECTIONS or kind or is_dataclass(hints.get(key)):
            _require_table(name, value, source)
        if is_dataclass(hints.get(key)):
            _check_keys(hints[key], value, source, f"{name}.")
        for inner, entry in value.items() if kind else ():
            _require_table(f"{name}.{inner}", entry, source)
            _check_keys(kind, entry, source, f"{name}.{inner}.")


def _require_table(name: str, value: Any, source: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: {name} is a section; write its keys as {name}.key = value")


def _named_kind(hint: Any) -> type | None:
    """The dataclass of a table of named tables ([accept.NAME]); None for any other key."""
    kind = get_args(hint)[-1] if get_origin(hint) is Mapping else None
    return kind if is_dataclass(kind) else None


def _fold_titan(target: Any, table: Mapping) -> dict:
    """torchtitan's sections move under one key, over what is there already."""
    before = {} if isinstance(target, type) else target.titan
    own = {k: v for k, v in table.items() if k in TITAN_SECTIONS}
    rest = {k: v for k, v in table.items() if k not in TITAN_SECTIONS}
    return rest | {"titan": deep_merge(deep_merge(before, rest.get("titan", {})), own)}


def _fit(value: Any, hint: Any, where: str) -> Any:
    origin, wanted = get_origin(hint), get_args(hint) or (hint,)
    if origin is Literal:
        ok = value in wanted and type(value) in {type(w) for w in wanted}
    elif origin is tuple and wanted[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} = {value!r}; want a list of {_spell(wanted[0])}")
        return tuple(_fit(v, wanted[0], f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is tuple:
        ok = (
            isinstance(value, list | tuple)
            and len(value) == len(wanted)
            and all(type(v) in (int, float) for v in value)
        )
        value = tuple(map(float, value)) if ok else value
    elif origin is Mapping:
        ok = isinstance(value, Mapping) and (
            wanted[-1] is not str or all(isinstance(v, str) for v in value.values())
        )
    else:
        # bool is not an int here
        ok = type(value) in wanted or (float in wanted and type(value) is int)
        ok = ok and (type(value) is not float or math.isfinite(value))
    if not ok:
        raise ValueError(f"{where} = {value!r}; want {_spell(hint)}")
    return float(value) if float in wanted and type(value) is int else value


def _spell(hint: Any) -> str:
    if get_origin(hint) in (Literal, None) and get_args(hint):
        return " | ".join(map(str, get_args(hint)))
    if get_args(hint) and get_origin(hint) not in (tuple, Mapping):
        return " | ".join(
            "none (leave it out)" if a is NoneType else a.__name__ for a in get_args(hint)
        )
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return f"a list of {_spell(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        return f"[{', '.join(a.__name__ for a in get_args(hint))}]"
    if get_origin(hint) is Mapping:
        return "a table of strings" if get_args(hint)[-1] is str else "a table"
    return "a finite float" if hint is float else getattr(hint, "__name__", str(hint))


def _hints(target: Any) -> dict[str, Any]:
    return get_type_hints(target if isinstance(target, type) else type(target))


def _merge_sets(sets: tuple[str, ...]) -> dict:
    table: dict = {}
    for text in sets:
        table = deep_merge(table, _assignment(text))
    return table


def _assignment(text: str) -> dict:
    """`a.b=value` is a line of TOML already; a bare word stands for a string."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {text}: want a.b=value") from None
        try:
            return tomllib.loads(f"{name} = '''{value}'''")
        except tomllib.TOMLDecodeError:
            raise ValueError(f"--set {text}: want a.b=value") from None


def as_table(cfg: Config) -> dict:
    """The whole configuration as nested plain tables; `fill(Config, as_table(cfg), ...)` gives it
    back.
    """
    table = asdict(cfg)
    return {k: v for k, v in table.items() if k != "titan"} | {
        k: dict(v) for k, v in cfg.titan.items()
    }


def to_toml(cfg: Config) -> str:
    """The resolved configuration as a TOML file, none-valued keys left out (they are the
    default).
    """
    lines: list[str] = []
    table = as_table(cfg)
    _write_table(table, "", lines)
    return "\n".join(lines) + "\n"


def _write_table(table: Mapping, prefix: str, lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
    if prefix and (plain or not table):
        lines += ["", f"[{prefix}]"]
    lines += [f"{_key(k)} = {toml_value(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, f"{prefix}.{_key(key)}" if prefix else _key(key), lines)


def _key(key: str) -> str:
    return (
        key
        if key.replace("_", "").replace("-", "").isalnum() and key.isascii()
        else toml_value(key)
    )


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # the one control character JSON leaves
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return value.isoformat() if isinstance(value, date | time) else repr(value)
