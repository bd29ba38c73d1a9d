"""Where each value of a configuration came from, for the messages about it: a file, `--set a.b=v`,
or a program's overrides.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .schema import Config


@dataclass(frozen=True)
class Layer:
    """Values that one source sets. name: what messages call it."""

    name: str
    table: Mapping[str, Any]
    is_file: bool = False


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """a.b of every value, tables of tables opened."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def origins_of(layers: Sequence[Layer]) -> dict[str, str]:
    """a.b -> the name of the last layer that sets it."""
    return {key: layer.name for layer in layers for key in leaves(layer.table)}


def source_of(cfg: Config, *names: str) -> str:
    """Who set these options: their sources, each once; "" for defaults, and for a Config that a
    program made. The name of a section stands for all that is set in it.
    """
    found = [
        source
        for name in names
        for key, source in cfg.origins.items()
        if key == name or key.startswith(f"{name}.")
    ]
    return " and ".join(dict.fromkeys(found))


def blamed(cfg: Config, names: Sequence[str], text: str) -> ValueError:
    """`text` behind the source of the options `names`."""
    source = source_of(cfg, *names)
    return ValueError(f"{source}: {text}" if source else text)


def mentions(message: str, key: str) -> bool:
    """Whether a message speaks of the option: by its whole name, or as `key = value`."""
    last = key.rpartition(".")[2]
    whole = "." in key and re.search(rf"(?<![\w./]){re.escape(key)}(?![\w/]|\.\w)", message)
    return bool(whole or re.search(rf"(?<![\w./]){re.escape(last)} = ", message))


def origin_notes(cfg: Config, message: str) -> list[str]:
    """One line for every option that a message names whole and that was set, with its source;
    none where the message begins with that source.
    """
    return [
        f"{key} is set by {source}" if source.startswith("--set") else f"{key} is set in {source}"
        for key, source in cfg.origins.items()
        if not message.startswith(source) and _names_whole(message, key)
    ]


def _names_whole(message: str, key: str) -> bool:
    return mentions(message, key) and ("." not in key or key in message)


@contextlib.contextmanager
def with_origins(cfg: Config) -> Iterator[None]:
    """A ValueError or OSError that leaves gets the notes of `origin_notes`, each once."""
    try:
        yield
    except (ValueError, OSError) as error:
        before = getattr(error, "__notes__", [])
        for note in origin_notes(cfg, str(error)):
            if note not in before:
                error.add_note(note)
        raise


MISSES = " is missing; "  # in messages about a key that nobody gives


def guilty(layers: Sequence[Layer], refusals: Sequence[str | None], message: str) -> str | None:
    """The name of the layer that brings an error about, or None for the files as a whole.

    refusals[i]: what the first i + 1 layers say; the first of them that says `message` is it. A
    file that does not name an option of the message is not to blame: bases leave things out.
    """
    if message not in refusals:
        return None
    at = refusals.index(message)
    before = refusals[at - 1] if at else None
    if MISSES in message and before and MISSES in before:
        return None  # this layer brings one key; the next one is missing as before
    layer = layers[at]
    if layer.is_file and not any(mentions(message, key) for key in leaves(layer.table)):
        return None
    return layer.name
