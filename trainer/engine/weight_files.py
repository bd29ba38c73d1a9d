"""The files that hold a model's weights in a Hugging Face folder, and what their headers say.

    weight_files     the files, as transformers chooses them: model.safetensors, else the shards
                     that model.safetensors.index.json names, and no others
                     (consolidated.safetensors)
    stored_tensors   name -> file, shape, dtype, from the headers alone

Every error is a ValueError that names the file.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

from reflux.trainer.adapter_folder import base_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5", ".msgpack")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder. dtype: safetensors' name, as "BF16"."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(path: str) -> tuple[str, ...]:
    """Of an adapter's folder, those of its base. ValueError where there are none, or a shard of the
    index is missing.
    """
    path = base_of(path)
    single = os.path.join(path, SINGLE)
    if os.path.isfile(single):  # before an index, as transformers does
        return (single,)
    names = sorted(set(read_index(path).values()))
    if not names:
        raise ValueError(_no_weights(path))
    there = [name for name in names if os.path.isfile(os.path.join(path, name))]
    if there != names:
        missing = sorted(set(names) - set(there))
        raise ValueError(
            f"{path}: the shard {missing[0]} is missing; {INDEX} names {len(names)} shards and "
            f"{len(there)} are there. Copy or download it again"
        )
    return tuple(os.path.join(path, name) for name in names)


def has_weights(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in (SINGLE, INDEX))


def read_index(path: str) -> dict[str, str]:
    """Tensor -> file name, of the folder's index; empty without one."""
    file = os.path.join(base_of(path), INDEX)
    if not os.path.isfile(file):
        return {}
    try:
        with open(file, encoding="utf-8") as text:
            names = dict(json.load(text)["weight_map"])
        plain = all(name and name == os.path.basename(name) for name in names.values())
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: no index of shards ({type(error).__name__}: {error}); want a JSON object "
            "with a weight_map. Copy or download it again"
        ) from None
    if not plain or not names:
        raise ValueError(f"{file}: its weight_map has to name files of its own folder")
    return names


def _no_weights(path: str) -> str:
    there = sorted(n for n in os.listdir(path) if n.endswith(OTHER_FORMATS))
    what = f"{path}: no {SINGLE} and no {INDEX} there"
    if not there:
        return f"{what}; want a folder with weights, as save_pretrained writes it"
    return (
        f"{what}, only {', '.join(there[:3])}{', ...' if there[3:] else ''}. Want transformers' "
        "safetensors: convert the weights with save_pretrained"
    )


def stored_tensors(path: str) -> dict[str, Stored]:
    """Every tensor of the folder.

    ValueError for a file that is truncated or is no safetensors, for a tensor that is in two files,
    and where the index and the shards differ.
    """
    path = base_of(path)
    stored: dict[str, Stored] = {}
    for file in weight_files(path):
        with opened(file) as tensors:
            for name in tensors.keys():
                if name in stored:
                    raise ValueError(f"{file}: tensor {name!r} is also in {stored[name].file}")
                header = tensors.get_slice(name)
                stored[name] = Stored(file, tuple(header.get_shape()), str(header.get_dtype()))
    if not os.path.isfile(os.path.join(path, SINGLE)):
        _check_index(path, stored)
    return stored


def _check_index(path: str, stored: Mapping[str, Stored]) -> None:
    index = read_index(path)
    for name in sorted(index.keys() | stored.keys()):
        said = index.get(name, "nowhere")
        found = os.path.basename(stored[name].file) if name in stored else "in none of its shards"
        if said != found:
            raise ValueError(
                f"{os.path.join(path, INDEX)}: by the index tensor {name!r} is {said}, in truth it "
                f"is {found}. Index and shards are of different models; copy or download them again"
            )


@contextlib.contextmanager
def opened(file: str) -> Iterator[Any]:
    """safetensors' safe_open; ValueError, naming the file, for one that cannot be read."""
    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {_why_unreadable(file)} ({error})") from None
    with tensors:
        yield tensors


def _why_unreadable(file: str) -> str:
    try:
        with open(file, "rb") as raw:
            start = raw.read(len(LFS_POINTER))
        size = os.path.getsize(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if start == LFS_POINTER:
        return "a pointer of Git LFS, not the weights; run git lfs pull"
    return f"truncated, or no safetensors file, {size:,} bytes; copy or download it again"
