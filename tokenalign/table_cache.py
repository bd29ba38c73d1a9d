"""Tables of tokenizer files, kept on disk: 262,144 ids in some 10 ms instead of seconds of parsing.

Only tables of *paths* are kept. A loaded tokenizer takes as long to describe itself as its table
takes to build, and its table is checked against the object each time.

A kept table belongs to the sha256 of everything that it was read from (each file's name and bytes,
the version of transformers where that loads it) and to FORMAT. A file that is damaged, cut off, of
another tokenizer or of another format is built anew, never believed.

    line 1      FORMAT and the sha256 of all that follows
    line 2      JSON: key, family, habits, sizes, and the ids that spelled each probe when the
                tokenizer was there
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

import numpy as np

from .byte_table import PROBES, ByteTable, Pieces
from .table_files import load as load_tokenizer
from .table_readers import encode_text, read

# raise the number whenever a reader or this file changes what it gives
FORMAT = "reflux byte table 1"
# What may change a tokenizer that AutoTokenizer loads from a folder; weights lie there, too, and
# are not read.
SOURCES = ("*.json", "*.model*", "*.tiktoken", "*.txt", "*.jinja", "*.py")


def cached_table(path: str | Path) -> ByteTable:
    """`ByteTable.of(path)`, from the cache when the same bytes were read before.

    The cache is the folder $REFLUX_CACHE, else the user's cache of the platform. A folder that
    cannot be written is no error: the table is built each time. Several processes may do this at
    once. ValueError as `ByteTable.of`.
    """
    path = Path(path)
    if not path.exists():
        return ByteTable.of(path)  # which says what is wrong
    key = key_of(path)
    file = cache_folder() / f"{key[:32]}.table"
    kept = load_table(file, key)
    if kept is not None:
        return kept
    tokenizer = load_tokenizer(path)
    table = ByteTable.of(tokenizer)
    ids = [encode_text(tokenizer, p) for p in PROBES] if read(tokenizer).encode else []
    try:
        save_table(table, file, key, ids)
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
    """sha256 of what the table of `path` is read from."""
    h = hashlib.sha256(FORMAT.encode())
    if path.is_dir():
        files = sorted(
            {f for pattern in SOURCES for f in path.glob(pattern) if f.is_file()}
            | set(path.glob("*.gguf"))
        )
        h.update(_version("transformers").encode())
    else:
        files = [path]
    for file in files:
        # gigabytes of weights behind the metadata: size and time of change have to do
        if file.suffix == ".gguf":
            h.update(f"{file.resolve()}|{file.stat().st_size}|{file.stat().st_mtime_ns}|".encode())
            continue
        data = file.read_bytes()
        h.update(f"{file.name}|{len(data)}|".encode())
        h.update(data)
    h.update(_version("tokenizers").encode())
    return h.hexdigest()


def save_table(table: ByteTable, file: Path, key: str, probe_ids: list[list[int]] = ()) -> None:
    """Write `table`, whole or not at all. probe_ids: the ids of each probe, spelled again by
    whoever loads it. OSError.
    """
    header = {
        "key": key,
        "family": table.family,
        "space_prefix": table.space_prefix,
        "normalizer": table.normalizer,
        "byte_ids": list(table.byte_ids),
        "swallows_spaces": list(table.swallows_spaces),
        "size": len(table),
        "probe_ids": [list(map(int, ids)) for ids in probe_ids],
        "probes": [hashlib.sha256(table.bytes_of(ids)).hexdigest() for ids in probe_ids],
    }
    payload = b"".join(
        (
            json.dumps(header).encode(),
            b"\n",
            table.kind.astype("i1").tobytes(),
            table.pieces.lens.astype("<i4").tobytes(),
            table.pieces.data,
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
    """The table kept in `file`, or None where there is none that can be believed."""
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
        table = ByteTable(
            pieces,
            np.frombuffer(body, np.int8, size),
            header["family"],
            header["space_prefix"],
            header["normalizer"],
            tuple(header["byte_ids"]),
            tuple(header["swallows_spaces"]),
        )
        spelled = [hashlib.sha256(table.bytes_of(ids)).hexdigest() for ids in header["probe_ids"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if spelled == header["probes"] else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
