"""The hash by which files are known: of inputs, checkpoints, caches and copied models."""

import hashlib
import os


def file_sha256(file: str | os.PathLike) -> str:
    """In hex."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
