"""Byte tables on disk: 262,144 ids in some 10 ms instead of seconds of reading a tokenizer.

A cached table belongs to the sha256 of what its tokenizer was loaded from (each file's name and
bytes, the versions of transformers and tokenizers) and to FORMAT. A file that is damaged, cut off,
of another tokenizer or of another format is built anew. A table from the cache is verified by the
loaded tokenizer like a new one.

    line 1      FORMAT and the sha256 of all that follows
    line 2      JSON: key, family, space prefix, normaliser, byte ids, number of ids
    the rest    kind int8 [V], piece lengths int32 [V] little-endian, the pieces' bytes

V: vocabulary.
"""

import hashlib
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .byte_table import ByteTable, Pieces
from .table_readers import AddedText

# raise the number whenever a reader or this file changes what it gives
FORMAT = "reflux byte table 3"
# what may change a tokenizer that AutoTokenizer loads from a folder; weights are not read
SOURCES = ("*.json", "*.model*", "*.tiktoken", "*.txt", "*.jinja", "*.py")


def cached_table(path: str | Path, tokenizer: Any) -> ByteTable:
    """`ByteTable.of(tokenizer)`, from the cache where the same files were read before.

    tokenizer: an encoder as it was loaded from `path`, a file or a folder; unchanged since. Either
    way the table is verified by it on the 22 probes. The cache is the folder $REFLUX_CACHE, else
    the user's cache of the platform. A folder that cannot be written is no error: the table is
    built each time. Several processes may do this at once. ValueError as `ByteTable.of`.
    """
    path = Path(path)
    if not path.exists():  # a name on a hub
        return ByteTable.of(tokenizer)
    key = key_of(path)
    file = cache_folder() / f"{key[:32]}.table"
    cached = load_table(file, key)
    if cached is not None:
        try:
            cached.verify_tokenizer(tokenizer)
            return cached
        except ValueError:
            pass  # not of this tokenizer after all: built anew
    table = ByteTable.of(tokenizer)
    try:
        save_table(table, file, key)
    except OSError:
        pass  # a full disk or a read-only home costs time, not the run
    return table


def cache_folder() -> Path:
    if folder := os.environ.get("REFLUX_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "reflux"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/reflux"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reflux"


def key_of(path: Path) -> str:
    """sha256 of what the tokenizer of `path` is loaded from."""
    h = hashlib.sha256(FORMAT.encode())
    if path.is_dir():
        matches = {f for pattern in SOURCES for f in path.glob(pattern) if f.is_file()}
        files = sorted(matches | set(path.glob("*.gguf")))
        h.update(_version("transformers").encode())
    else:
        files = [path]
    for file in files:
        # gigabytes of weights behind the metadata: size and time of change instead of the bytes
        if file.suffix == ".gguf":
            h.update(f"{file.resolve()}|{file.stat().st_size}|{file.stat().st_mtime_ns}|".encode())
            continue
        data = file.read_bytes()
        h.update(f"{file.name}|{len(data)}|".encode())
        h.update(data)
    h.update(_version("tokenizers").encode())
    return h.hexdigest()


def save_table(table: ByteTable, file: Path, key: str) -> None:
    """Write `table`, whole or not at all. OSError."""
    header = {
        "key": key,
        "family": table.family,
        "space_prefix": table.space_prefix,
        "normalizer": table.normalizer,
        "byte_ids": list(table.byte_ids),
        "swallows_spaces": list(table.swallows_spaces),
        "added": table.added,
        "size": len(table),
    }
    payload = b"".join(
        (
            json.dumps(header).encode(),
            b"\n",
            table.kind.astype("i1").tobytes(),
            table.packed.lens.astype("<i4").tobytes(),
            table.packed.data,
        )
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with open(handle, "wb") as out:
            out.write(f"{FORMAT} {hashlib.sha256(payload).hexdigest()}\n".encode() + payload)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def load_table(file: Path, key: str) -> ByteTable | None:
    """The table of `file`, or None where there is none that is whole and of this key."""
    try:
        first, _, payload = file.read_bytes().partition(b"\n")
        if first != f"{FORMAT} {hashlib.sha256(payload).hexdigest()}".encode():
            return None
        head, _, body = payload.partition(b"\n")
        header = json.loads(head)
        size = header["size"]
        if header["key"] != key:
            return None
        pieces = Pieces(body[5 * size :], np.frombuffer(body, "<i4", size, size).astype(np.int32))
        return ByteTable(
            pieces,
            np.frombuffer(body, np.int8, size),
            header["family"],
            header["space_prefix"],
            header["normalizer"],
            tuple(header["byte_ids"]),
            tuple(header["swallows_spaces"]),
            tuple(AddedText(*row) for row in header["added"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
