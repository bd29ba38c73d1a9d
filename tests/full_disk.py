"""Disks that fill up: a small file system where this process may mount one, else a limit on the
size of files, which the system answers with EFBIG.
"""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest


@cache
def may_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    probe = Path("/tmp") / f"mount-probe-{resource.getpagesize()}"
    probe.mkdir(exist_ok=True)
    try:
        return _mount(probe, 1.0) and _unmount(probe)
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


def _mount(folder: Path, megabytes: float) -> bool:
    size = f"size={int(megabytes * 1024)}k"
    words = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and not subprocess.run(words, capture_output=True).returncode


def _unmount(folder: Path) -> bool:
    return not subprocess.run(["umount", "-l", str(folder)], capture_output=True).returncode


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """`folder` on a file system of its own of that size; skips where none can be mounted. `grow`
    makes it larger.
    """
    if not may_mount():
        pytest.skip("needs the right to mount a tmpfs")
    folder.mkdir(parents=True, exist_ok=True)
    assert _mount(folder, megabytes)
    try:
        yield folder
    finally:
        _unmount(folder)


def grow(folder: Path, megabytes: float) -> None:
    """The small disk at `folder` gets this size, with what it holds."""
    size = f"remount,size={int(megabytes * 1024)}k"
    subprocess.run(["mount", "-o", size, str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def limited_files(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond that size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
