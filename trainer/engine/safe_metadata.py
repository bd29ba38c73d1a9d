"""Reads torch's distributed checkpoints without running what they say.

A `.metadata` file is a pickle, and small objects inside the .distcp files are pickles too; torch
loads both by the plain unpickler, which calls whatever the file names. Here only the classes that
torch's own writer puts there are loaded, and anything else is a ValueError that names it. Source:
torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py.
"""

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint.metadata as _metadata
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

METADATA = ".metadata"
_OF_METADATA = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)


class Unsafe(ValueError):
    """A file wants something called that a checkpoint does not need."""


# a copy: a pickle can set attributes of the class itself
_MEMORY_FORMATS = dict(_metadata._MEM_FORMAT_ENCODING.__members__)


def _memory_format(kind: Any, name: Any) -> Any:
    """In place of getattr: how Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""
    if kind is not _metadata._MEM_FORMAT_ENCODING or name not in _MEMORY_FORMATS:
        raise _unsafe(f"builtins.getattr of {kind!r} and {name!r}")
    return _MEMORY_FORMATS[name]


def _unsafe(name: str) -> Unsafe:
    return Unsafe(f"{METADATA} names {name}, which no checkpoint needs; it was not loaded")


ALLOWED = {
    ("builtins", "getattr"): _memory_format,
    **{("torch.distributed.checkpoint.metadata", n): getattr(_metadata, n) for n in _OF_METADATA},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # its name in Python 3.13
}


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _unsafe(f"{module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """The description of a checkpoint. ValueError if it cannot be read, names a class that it does
    not need, or a file outside the folder.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = MetadataUnpickler(file).load()
    except (OSError, Unsafe):
        raise
    except Exception as error:  # what a torn pickle raises: EOFError, IndexError, KeyError ...
        raise ValueError(f"{METADATA} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not _is_description(metadata):
        raise ValueError(f"{METADATA} is no description of a checkpoint")
    for info in metadata.storage_data.values():
        if not re.fullmatch(r"[\w-][\w.-]*", info.relative_path):
            raise ValueError(f"{METADATA} names the file {info.relative_path!r}; want a plain name")
    return metadata


def _is_description(metadata: Metadata) -> bool:
    """Whether the fields that are read here are of the types that torch writes."""
    entries = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return False
    return all(
        isinstance(index, MetadataIndex)
        and isinstance(getattr(index, "fqn", None), str)
        and isinstance(info, _StorageInfo)
        and isinstance(getattr(info, "relative_path", None), str)
        and isinstance(getattr(info, "offset", None), int)
        and isinstance(getattr(info, "length", None), int)
        for index, info in places.items()
    )


def torn_files(folder: Path, metadata: Metadata) -> list[str]:
    """One sentence per file that is missing or ends before what it has to hold."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    found = []
    for name, end in sorted(ends.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
            continue
        if size < end:
            found.append(f"{name} has {size:,} bytes, its {METADATA} wants {end:,}")
    return found


def _objects(folder: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    """Every entry that is no tensor: its name and its pickled bytes."""
    by_file: dict[str, list[tuple[str, Any]]] = {}
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            by_file.setdefault(info.relative_path, []).append((index.fqn, info))
    for name, entries in by_file.items():
        with open(folder / name, "rb") as file:
            for fqn, info in entries:
                file.seek(info.offset)
                yield fqn, file.read(info.length)


def unsafe_objects(folder: Path, metadata: Metadata) -> list[str]:
    """One sentence for the first entry that is more than numbers, text and tensors, or torn."""
    for fqn, data in _objects(folder, metadata):
        try:
            load_object(io.BytesIO(data), fqn)
        except ValueError as error:
            return [str(error)]
    return []


def load_object(data: io.BytesIO, name: str) -> Any:
    """One entry. ValueError if it wants anything called."""
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, or what torn bytes raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"the entry {name} is not plain data, and was not loaded: {first[0]}"
        ) from None


class SafeReader(FileSystemReader):
    """torch's reader; the description goes through `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner; entries that are no tensors go through `load_object`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        loaded = load_object(value, fqn)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.state_dict[fqn] = loaded
