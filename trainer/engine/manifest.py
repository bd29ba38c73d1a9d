"""The manifest of a checkpoint: size and sha256 of every file in it, written last.

    {"format": 1, "step": 50, "files": {"__0_0.distcp": {"bytes": 2084298, "sha256": "..."}, ...}}

Knows no torch: whoever holds a folder can verify it. Source of the order of writes (file, folder,
rename, folder above): fsync(2) and rename(2) of Linux.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from reflux.trainer.file_hash import file_sha256

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileDigest:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    files: Mapping[str, FileDigest]  # name inside the folder -> what it has to be


def digest_and_sync(path: Path) -> FileDigest:
    """Size and sha256 of the file as it reads now; its bytes are on the disk afterwards."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(file.tell(), digest)


def sync_file(path: Path) -> None:
    """The bytes of the file are on the disk afterwards."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names inside the folder are on the disk afterwards; some file systems cannot say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def data_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of all files but the manifest."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p.relative_to(folder).as_posix() for p in files if p.name != NAME)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The manifest is there whole or not at all, and so is every name in the folder."""
    partial = folder / (NAME + ".partial")
    files = {name: asdict(digest) for name, digest in sorted(manifest.files.items())}
    text = json.dumps({"format": FORMAT, "step": manifest.step, "files": files}, indent=1)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / NAME)
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none. ValueError if it is not what write_manifest writes."""
    path = folder / NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        table = json.loads(text)
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}; this program reads format {FORMAT}")
        files = {name: FileDigest(**digest) for name, digest in table["files"].items()}
        return Manifest(int(table["step"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} cannot be read ({type(error).__name__}: {error})") from None


def wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """One sentence per file that is missing or has another size; costs no reading."""
    found = []
    for name, wanted in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
            continue
        if size != wanted.bytes:
            found.append(f"{name} has {size:,} bytes, its manifest says {wanted.bytes:,}")
    return found


def wrong_contents(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """One sentence per file of `names` whose bytes are not those that were written."""
    found = []
    for name in names:
        try:
            digest = file_sha256(folder / name)
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
            continue
        if digest != manifest.files[name].sha256:
            found.append(f"{name} was changed after it was written (its sha256 is another)")
    return found
