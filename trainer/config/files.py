"""A configuration file as nested plain tables: TOML, or YAML with the same keys.

YAML is read by the rules of its version 1.2: `off` and `no` are words, not booleans, and 1e-6 is a
number. (PyYAML's own rules are those of 1.1, where `mode: off` is false and 1e-6 a string.)
"""

import re
import tomllib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from .fit import nearest

YAML = (".yaml", ".yml")
SUFFIXES = (".toml", *YAML)
# tag, what a plain word has to look like, the first letters of such words
CORE_1_2 = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
)


def read_table(path: Path) -> dict[str, Any]:
    """ValueError with the file for what is missing, cannot be read, or is not valid."""
    kind, text = "YAML" if path.suffix in YAML else "TOML", ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _yaml(text) if kind == "YAML" else tomllib.loads(text)
    except FileNotFoundError:
        beside = (p.name for s in SUFFIXES for p in path.parent.glob(f"*{s}"))
        guess = nearest(path.name, beside, f"{path.parent}/")
        raise ValueError(f"{path}: no such file{guess}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        hint = _quotes(text, said) if kind == "TOML" else ""
        raise ValueError(f"{path}: not valid {kind}: {said}{hint}") from None


def _quotes(text: str, said: str) -> str:
    """What a word that is no TOML value wants, where that is what was said."""
    at = re.match(r"Invalid value \(at line (\d+)", said)
    line = text.splitlines()[int(at[1]) - 1] if at else ""
    value = re.match(r"[^=#]*=\s*([A-Za-z_~/.][^\s,#\]}]*)", line)
    if value is None:
        return ""
    if value[1].lower() in ("true", "false"):
        return f": want {value[1].lower()}, not {value[1]}"
    word = value[1].rstrip("'\"")
    return f': {word} is neither a number nor true or false, and a text wants quotes: "{word}"'


def _yaml(text: str) -> dict[str, Any]:
    """ValueError for what is no YAML, and for what TOML refuses too: a key that occurs twice, a key
    that is no text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            own = [self.construct_object(k) for k, _ in node.value if not k.tag.endswith(":merge")]
            for key in own:
                if not isinstance(key, str):
                    line = node.start_mark.line + 1
                    raise ValueError(f"key {key!r} in the table of line {line}; want text")
                if own.count(key) > 1:
                    raise ValueError(f"key {key} occurs twice in one table")
            return super().construct_mapping(node, deep)

    for tag, pattern, first in CORE_1_2:
        regexp = re.compile(f"^(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", regexp, list(first))
    try:
        table = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(table, dict) and table is not None:
        raise ValueError(f"a {type(table).__name__} at the top; want keys with values")
    return table or {}
