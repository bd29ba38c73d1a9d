"""The metadata of a GGUF file, without its tensors
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Not the package `gguf`: its reader makes NumPy views of every string and tensor. On 262,144 tokens
and 514,906 merges it takes 18 s and 1.3 GB where this takes 0.2 s and 0.1 GB; it needs the tensors
behind the metadata, and it does not notice a file that ends within its last string.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

# value type -> NumPy's name of it; 7 is a bool in a byte, 8 a string, 9 an array
SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


def read_metadata(path: Path, prefix: str = "") -> dict[str, Any]:
    """Fields whose key starts with `prefix`, which the keys returned no longer carry.

    A string is str, a number int or float, an array of numbers a NumPy array, an array of strings
    list[bytes] (UTF-8). ValueError: not a little-endian GGUF file of version 2 or 3, or cut off
    within its metadata.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError(f"{path.name} is empty; want a GGUF file.") from None
        with data:
            if (
                data[:4] != b"GGUF"
                or len(data) < 24
                or (version := struct.unpack_from("<I", data, 4)[0]) not in (2, 3)
            ):
                raise ValueError(
                    f"{path.name} is not a little-endian GGUF file of version 2 or 3: it begins "
                    f"with {data[:8]!r}."
                )
            # after the magic, the version and the number of tensors
            count = struct.unpack_from("<Q", data, 16)[0]
            try:
                return _read_fields(data, count, prefix)
            except (struct.error, IndexError) as error:
                raise ValueError(
                    f"{path.name} (GGUF version {version}) ends within its metadata: is the "
                    "download whole?"
                ) from error


def _read_fields(data: mmap.mmap, count: int, prefix: str) -> dict[str, Any]:
    fields, at = {}, 24
    for _ in range(count):
        key, at = _read_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        wanted = key.startswith(prefix.encode())
        value, at = _read_value(data, at + 4, kind, wanted)
        if wanted:
            fields[key.decode().removeprefix(prefix)] = value.decode() if kind == STRING else value
    return fields


def _read_string(data: mmap.mmap, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    at += 8
    if at + length > len(data):
        raise IndexError(at)
    return data[at : at + length], at + length


def _read_value(data: mmap.mmap, at: int, kind: int, wanted: bool) -> tuple[Any, int]:
    """The value at byte `at` and the byte behind it. Unwanted strings are skipped by length."""
    if kind == STRING:
        return _read_string(data, at)
    if kind != ARRAY:
        array, at = _read_numbers(data, at, kind, 1)
        return array[0].item(), at
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind != STRING:
        return _read_numbers(data, at, kind, count)
    strings: list[bytes] = []
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        (length,) = length_at(data, at)
        if wanted:
            strings.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    if at > len(data):
        raise IndexError(at)
    return strings, at


def _read_numbers(data: mmap.mmap, at: int, kind: int, count: int) -> tuple[np.ndarray, int]:
    if kind not in SCALARS:
        raise ValueError(
            f"GGUF: value type {kind} at byte {at} is unknown; arrays of arrays and newer types "
            "are not read here."
        )
    end = at + count * np.dtype(SCALARS[kind]).itemsize
    if end > len(data):
        raise IndexError(end)
    return np.frombuffer(data[at:end], SCALARS[kind]), end
