"""What `python -m reflux.tokenalign` is given to align, checked key by key, so that every mistake
is named with its file and line.

    text               str
    ids_a, ids_b       token ids of A and B, used as they are; -1 for a token to leave out
    logp_a, logp_b     log p of each id in nats, null where nothing predicts it
    stop_a, stop_b     log p of the stop set at the end
    prompt_bytes       bytes of the text that belong to the prompt
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

KEYS = ("text", "ids_a", "ids_b", "logp_a", "logp_b", "stop_a", "stop_b", "prompt_bytes")
PAIRS = {
    "logp": "log-probabilities of one side only; want both logp_a and logp_b, one number per id of "
    "its side",
    "stop": "a stop of one side only; want both stop_a and stop_b, for a text that ended by itself "
    "under both models, or neither",
}


class GivenError(ValueError):
    """A key that cannot be used. `key` is its name, "" for the object as a whole."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def read_given(path: str | Path) -> Mapping[str, Any]:
    """The JSON object of a file, not yet checked. ValueError with file and line."""
    raw = Path(path).read_bytes()
    try:
        given = json.loads(_decode(raw))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{_line(raw, error.start)}: the file is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; want an object of lists") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}:1: holds {_what(given)}; want a JSON object, {{...}}")
    return given


def read_text(path: str | Path, raw: bytes) -> str:
    """The text of a file. ValueError with file and line."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{_line(raw, error.start)}: byte {raw[error.start]:#04x} is not UTF-8"
        ) from None


def place_of(path: str | Path, key: str) -> str:
    """FILE:LINE of a key of the object in a JSON file; FILE:1 where it cannot be found."""
    text = _decode(Path(path).read_bytes())
    found = re.search(rf'"{re.escape(key)}"\s*:', text) if key else None
    return f"{path}:{1 + text.count(chr(10), 0, found.start()) if found else 1}"


def checked(given: Mapping[str, Any], ids_a: int, ids_b: int) -> dict[str, Any]:
    """`given` with ids as lists of int and log-probabilities as lists of float (null: NaN).

    ids_a, ids_b: how many ids A and B have. GivenError: unknown or missing keys, other types, ids
    outside the tables, one side without the other, an empty text.
    """
    unknown = sorted(set(given) - set(KEYS))
    if unknown or not {"text", "ids_a"} & set(given):
        raise GivenError(
            unknown[0] if unknown else "",
            f"a text with scores has keys {', '.join(given) or 'none'}; want text or ids_a, and of "
            f"the others only {', '.join(KEYS[2:])}",
        )
    out = dict(given)
    if "text" in given:
        _check_text(given["text"])
    for key, size in (("ids_a", ids_a), ("ids_b", ids_b)):
        if key in given:
            out[key] = _ids(key, given[key], size)
    for key in ("logp_a", "logp_b"):
        if key in given:
            out[key] = [
                _number(f"{key}[{i}]", x, key) for i, x in enumerate(_list(key, given[key]))
            ]
    for key in ("stop_a", "stop_b"):
        if given.get(key) is not None:
            out[key] = _number(key, given[key], key)
    for name, message in PAIRS.items():
        sides = [f"{name}_{side}" for side in "ab" if given.get(f"{name}_{side}") is not None]
        if len(sides) == 1:
            raise GivenError(sides[0], message)
    if "prompt_bytes" in given:
        _check_prompt_bytes(given)
    return out


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise GivenError("text", f"text is {_what(text)}; want a string")
    if not text:
        raise GivenError("text", "the text is empty: there is nothing to align")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GivenError(
            "text",
            f"text[{error.start}] is half of a surrogate pair, {text[error.start]!r}: it has no "
            "bytes. Was it decoded with errors='surrogateescape'?",
        ) from None


def _check_prompt_bytes(given: Mapping[str, Any]) -> None:
    key = "prompt_bytes"
    value = given[key]
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise GivenError(key, f"{key} is {_what(value)}; want a whole number of bytes, 0 or more")


def _ids(key: str, value: Any, size: int) -> list[int]:
    ids = _list(key, value)
    for i, x in enumerate(ids):
        if not isinstance(x, int | np.integer) or isinstance(x, bool):
            raise GivenError(key, f"{key}[{i}] is {_what(x)}; want a token id, a whole number")
        if not -1 <= x < size:
            raise GivenError(
                key,
                f"{key}[{i}] = {x}; want -1 (a token to leave out) to {size - 1}: this tokenizer "
                f"has {size} ids. Is it another tokenizer's?",
            )
    return [int(x) for x in ids]


def _list(key: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple | np.ndarray):
        raise GivenError(key, f"{key} is {_what(value)}; want a list")
    return list(value)


def _number(name: str, value: Any, key: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, Real) or isinstance(value, bool):
        raise GivenError(key, f"{name} is {_what(value)}; want a number, log p in nats")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number > 1e-3:  # 0 up to rounding
        raise GivenError(key, f"{name} = {number:g}; want log p in nats, which is at most 0")
    return number


def _what(value: Any) -> str:
    """A JSON value in words, the way the file names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the string {value[:20]!r}"
    if isinstance(value, Mapping):
        return "an object"
    return "a list"


def _decode(raw: bytes) -> str:
    return raw.decode(json.detect_encoding(raw))


def _line(raw: bytes, at: int) -> int:
    return 1 + raw.count(b"\n", 0, at)


def raise_at(path: str | Path, error: ValueError) -> NoReturn:
    """The same error with file and line in front."""
    if isinstance(error, GivenError):
        key = error.key
    else:  # an error of the alignment or the scores, which name the argument
        key = next((k for k in KEYS if k in str(error)), "")
    raise ValueError(f"{place_of(path, key)}: {error}") from None
