"""Files, recipes and `--set` into the frozen dataclasses of schema.py, and back into TOML. An
unknown key is an error that names the nearest known one; a renamed key, the new name.
"""

import json
import os
import runpy
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from datetime import date, time
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .explain import explain
from .files import read_table
from .fit import fit, nearest, spell
from .origins import Layer, guilty, origins_of
from .other_names import meant
from .phases import PHASES
from .recipes import beside, find
from .schema import NO_SECTIONS, TITAN_SECTIONS, Config, sections

RENAMED = {  # the old name of a key or of a section -> the new one
    "anchor": "reference",
    "serve": "defence",
    "calibration.max_unscored": "calibration.max_unaligned",
    "distill.queries": "distill.query_budget",
    "distill.classes": "distill.partition",
    "diagnose.heat": "diagnose.heatmap_texts",
    "diagnose.share": "diagnose.kl_fraction",
    "diagnose.top": "diagnose.overlap_k",
}

REQUIRED = ("phase", "folder")  # keys without a default
WANTED = {"phase": " | ".join(PHASES), "folder": "a folder for the run, e.g. 'runs/mine'"}


def load(path: str | Path, sets: tuple[str, ...] = ()) -> Config:
    """The configuration of a .toml or .yaml file, of a recipe by its name (recipes.py), or of a .py
    recipe whose config() returns a Config; each `--set a.b=value` is laid on top.

    `base = "other.toml"` at the head of a file lays it over another one; the name is relative to
    the file's own folder, or `recipe:NAME`. Raises ValueError with the file and the key, or with
    the `--set` that is to blame.
    """
    return _load(find(str(path)), [Layer(f"--set {text}", _assignment(text)) for text in sets])


def load_over(path: str | Path, overrides: Mapping[str, Any]) -> Config:
    """`load` with values of a program in place of `--set`: a.b or nested tables -> value."""
    return _load(find(str(path)), layers_of(overrides))


def layers_of(overrides: Mapping[str, Any]) -> list[Layer]:
    return [Layer(f"overrides[{key!r}]", nested(key, value)) for key, value in overrides.items()]


def _load(path: Path, overrides: Sequence[Layer]) -> Config:
    """The file with the overrides laid on top, in this order."""
    for layer in overrides:
        _check_keys(Config, layer.table, layer.name)
    if path.suffix == ".py":
        return lay_over(_run_recipe(path), overrides)
    layers = [*_read(path), *overrides]
    try:
        cfg = fill(Config, _merged(layers), str(path))
    except ValueError as error:
        culprit = guilty(layers, _refusals(layers, str(path)), str(error))
        if culprit in (None, str(path)):
            raise
        raise ValueError(str(error).replace(f"{path}:", f"{culprit}:", 1)) from None
    return replace(cfg, origins=origins_of(layers))


def lay_over(cfg: Config, overrides: Sequence[Layer]) -> Config:
    """A Config that a program made, with the overrides on top."""
    for layer in overrides:
        cfg = fill(cfg, layer.table, layer.name)
    return replace(cfg, origins={**cfg.origins, **origins_of(overrides)})


def _refusals(layers: Sequence[Layer], source: str) -> list[str | None]:
    """What is wrong with the first layer, with the first two, and so on; what has no default is
    taken from wherever it stands.
    """
    wanted = {k: v for layer in layers for k, v in layer.table.items() if k in REQUIRED}
    said: list[str | None] = []
    for count in range(1, len(layers) + 1):
        try:
            fill(Config, {**wanted, **_merged(layers[:count])}, source)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append(None)
    return said


def _merged(layers: Sequence[Layer]) -> dict:
    table: dict = {}
    for layer in layers:
        table = deep_merge(table, layer.table)
    return table


def nested(key: str, value: Any) -> dict:
    """{"a.b": v} as {"a": {"b": v}}, in tables inside too; a path becomes text."""
    first, dot, rest = key.partition(".")
    if dot:
        return {first: nested(rest, value)}
    if isinstance(value, Mapping):
        inner: dict = {}
        for k, v in value.items():
            inner = deep_merge(inner, nested(k, v))
        return {key: inner}
    return {key: os.fspath(value) if isinstance(value, os.PathLike) else value}


def _run_recipe(path: Path) -> Config:
    try:
        recipe = runpy.run_path(str(path)).get("config")
    except FileNotFoundError as error:
        if error.filename != str(path):  # one that the recipe reads
            raise
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:
        raise ValueError(f"{path}: the recipe failed with {explain(error)}") from error
    if not callable(recipe):
        raise ValueError(f"{path}: no function config(); want `def config() -> Config: ...`")
    try:
        cfg = recipe()
    except ValueError as error:  # of our own tables: it says which key
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        raise ValueError(f"{path}: config() failed with {explain(error)}") from error
    if not isinstance(cfg, Config):
        raise ValueError(
            f"{path}: config() returned {type(cfg).__name__}; want "
            "reflux.trainer.config.schema.Config"
        )
    return cfg


def _read(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The file behind its bases. The keys of each are checked alone: an error names its file."""
    table = read_table(path)
    base = table.pop("base", None)
    _check_keys(Config, table, str(path))
    own = Layer(str(path), table, is_file=True)
    if base is None:
        return [own]
    if not isinstance(base, str):
        raise ValueError(f"{path}: base = {base!r}; want the name of a .toml or .yaml file")
    above, below = (*above, path.resolve()), beside(path.parent, base)
    if below.resolve() in above:
        raise ValueError(f"{path}: base = {base!r} leads back to a file it is the base of")
    return [*_read(below, above), own]


def deep_merge(low: Mapping, high: Mapping) -> dict:
    """`high` laid over `low`, table by table."""
    out = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = deep_merge(out[key], value) if both else value
    return out


def fill(target: Any, table: Mapping, source: str, prefix: str = "") -> Any:
    """A copy of `target` (a dataclass, or an instance of one) with the entries of `table`.

    source: what an error names, a file or "--set". prefix: the section of `table`, as "optim.".
    Raises ValueError for unknown and renamed keys, wrong types, and what the dataclass refuses.
    """
    is_class = isinstance(target, type)
    _check_keys(target if is_class else type(target), table, source, prefix)
    hints = _hints(target)
    if prefix == "" and "titan" in hints:
        table = _fold_titan(target, table)
    values = {
        key: _value(target, key, value, hints[key], source, prefix) for key, value in table.items()
    }
    if is_class and (missing := _missing(target, values, prefix)):
        raise ValueError(f"{source}: {'; '.join(missing)}")
    try:
        return target(**values) if is_class else replace(target, **values)
    except ValueError as error:  # from __post_init__, which does not know the file
        raise ValueError(f"{source}: {prefix}{error}") from None


def _missing(target: type, values: Mapping[str, Any], prefix: str) -> list[str]:
    """Every key without a default that nobody gives, with what it wants."""
    hints = _hints(target)
    keys = [f.name for f in fields(target) if f.default is MISSING and f.default_factory is MISSING]
    wanted = {key: WANTED.get(prefix + key, spell(hints[key])) for key in keys}
    missing = [f"{prefix}{k} is missing; want {w}" for k, w in wanted.items() if k not in values]
    if missing and target is Config and "model" not in values:
        missing.append("model.path is missing; want a Hugging Face folder")
    return missing


def _value(target: Any, key: str, value: Any, hint: Any, source: str, prefix: str) -> Any:
    """One entry of a table as its field wants it: a section, a table of sections, or a plain
    value.
    """
    name = prefix + key
    if is_dataclass(hint):
        return fill(getattr(target, key, hint), value, source, f"{name}.")
    if kind := _named_kind(hint):
        before = {} if isinstance(target, type) else getattr(target, key)
        return before | {
            n: fill(before.get(n, kind), t, source, f"{name}.{n}.") for n, t in value.items()
        }
    return fit(value, hint, f"{source}: {name}")


def _check_keys(target: type, table: Mapping, source: str, prefix: str = "") -> None:
    hints = _hints(target)
    known = sections() if target is Config else tuple(hints)
    for key, value in table.items():
        name, hint = prefix + key, hints.get(key)
        if name in RENAMED:
            raise ValueError(f"{source}: {_renamed(name)}")
        if key not in known and not (target is Config and key == "titan"):
            # half of `lr` is one letter
            guess = meant(key, Config, name) or nearest(key, known, prefix, cutoff=0.5)
            raise ValueError(f"{source}: unknown key {name}{guess} Known there: {', '.join(known)}")
        kind = _named_kind(hint)
        if key in TITAN_SECTIONS or kind or is_dataclass(hint):
            _require_table(name, value, source)
        if isinstance(hint, type) and is_dataclass(hint):
            _check_keys(hint, value, source, f"{name}.")
        if kind:
            for inner, entry in value.items():
                _require_table(f"{name}.{inner}", entry, source)
                _check_keys(kind, entry, source, f"{name}.{inner}.")


def _renamed(name: str) -> str:
    """A sentence; sections stand in brackets, as in a file."""
    old, new = (f"[{n}]" if "." not in n else n for n in (name, RENAMED[name]))
    return f"{old} is called {new} now"


def _require_table(name: str, value: Any, source: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: {name} is a section; write its keys as {name}.key = value")


def _named_kind(hint: Any) -> type | None:
    """The dataclass of a table of named tables ([accept.NAME]); None for any other key."""
    kind = get_args(hint)[-1] if get_origin(hint) is Mapping else None
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def _fold_titan(target: Any, table: Mapping) -> dict:
    """torchtitan's sections move under one key, over what is there already."""
    before = {} if isinstance(target, type) else target.titan
    own = {k: v for k, v in table.items() if k in TITAN_SECTIONS}
    rest = {k: v for k, v in table.items() if k not in TITAN_SECTIONS}
    return rest | {"titan": deep_merge(deep_merge(before, rest.get("titan", {})), own)}


def _hints(target: Any) -> dict[str, Any]:
    return get_type_hints(target if isinstance(target, type) else type(target))


def _assignment(text: str) -> dict:
    """`a.b=value` is a line of TOML already; a bare word stands for a string."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {text}: want a.b=value") from None
        try:
            return tomllib.loads(f"{name} = '''{value}'''")
        except tomllib.TOMLDecodeError:
            raise ValueError(f"--set {text}: want a.b=value") from None


def as_table(cfg: Config) -> dict:
    """The configuration as nested plain tables; `fill(Config, as_table(cfg), ...)` inverts it."""
    table = asdict(cfg)
    return {k: v for k, v in table.items() if k not in NO_SECTIONS} | {
        k: dict(v) for k, v in cfg.titan.items()
    }


def to_toml(cfg: Config) -> str:
    """The resolved configuration as a TOML file. Keys that are None, the default, are left out."""
    return "\n".join(write_tables(as_table(cfg))) + "\n"


def write_tables(table: Mapping, reasons: Mapping[str, str] | None = None) -> list[str]:
    """Nested plain tables as lines of TOML. reasons: a.b -> a comment behind that key."""
    lines: list[str] = []
    _write_table(table, "", lines, reasons or {})
    return lines


def _write_table(table: Mapping, prefix: str, lines: list[str], reasons: Mapping[str, str]) -> None:
    dot = f"{prefix}." if prefix else ""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
    if prefix and (plain or not table):
        lines += ["", f"[{prefix}]"]
    for key, value in plain.items():
        reason = reasons.get(dot + key)
        lines.append(f"{_key(key)} = {toml_value(value)}" + (f"  # {reason}" if reason else ""))
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, dot + _key(key), lines, reasons)


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else toml_value(key)


def toml_value(value: Any) -> str:
    """One value as TOML writes it."""
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
