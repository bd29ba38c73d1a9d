"""The folder <run>/checkpoint: what lies in it under which name, and what is wrong with it.

step-N        a checkpoint. It appears under this name when all of it is on the disk
writing-N     one that is being written, or what a killed process left of it
deleting-N    one that retention takes away, or what a killed process left of it
damaged-N     one that failed verification; kept for whoever wants to look
given-up-N    one of a later step, from before the run went back; kept too
"""

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from .manifest import Manifest, read_manifest, sync_folder, wrong_contents, wrong_sizes
from .safe_metadata import METADATA, read_metadata, torn_files, unsafe_objects

OF_TRAINING = "train_state.step"  # an entry that only a checkpoint of everything has
NO_MANIFEST = "no manifest (an older version wrote it): sizes were checked, contents cannot be"


@dataclass(frozen=True)
class Findings:
    """What is known of one checkpoint without reading its tensors."""

    damage: tuple[str, ...]  # one sentence each; empty: nothing wrong so far
    files: tuple[str, ...]  # whose contents the manifest can prove
    weights_only: bool
    is_hf: bool  # safetensors, not torch's format
    bytes: int

    @property
    def has_manifest(self) -> bool:
        return bool(self.files)


def steps_in(home: Path) -> list[int]:
    """Steps that have a checkpoint, in order; nothing is said about whether it is whole."""
    if not home.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in home.iterdir())
    return sorted(int(name[1]) for name in names if name and _was_finished(home / name[0]))


def folder_bytes(folder: Path) -> int:
    """Of all files in it; those that go away meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def listed(steps: Sequence[int]) -> str:
    """step-1, step-2; or "none"."""
    return ", ".join(f"step-{n}" for n in steps) or "none"


def _was_finished(folder: Path) -> bool:
    """A folder without any of these is what an older version left of a killed save."""
    return (
        any((folder / name).exists() for name in ("manifest.json", METADATA))
        or next(folder.glob("*.safetensors"), None) is not None
    )


def inspect(folder: Path) -> Findings:
    """Everything but the contents of large files: manifest, sizes, description, small objects."""
    is_hf = not (folder / METADATA).exists() and any(folder.glob("*.safetensors"))
    damage: list[str] = []
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        manifest, damage = None, [str(error)]
    if manifest:
        damage += wrong_sizes(folder, manifest)
    metadata: Metadata | None = None
    if not damage and not is_hf:
        try:
            metadata = read_metadata(folder)
            damage += torn_files(folder, metadata)
            damage += [] if damage else unsafe_objects(folder, metadata)
        except (OSError, ValueError) as error:
            damage.append(str(error))
    return Findings(
        damage=tuple(damage),
        files=tuple(manifest.files) if manifest else (),
        weights_only=is_hf or bool(metadata and OF_TRAINING not in metadata.state_dict_metadata),
        is_hf=is_hf,
        bytes=folder_bytes(folder),
    )


def wrong_files(folder: Path, names: Sequence[str]) -> list[str]:
    """One sentence per file of `names` that reads other than it was written."""
    manifest = read_manifest(folder)
    return wrong_contents(folder, manifest, names) if manifest and names else []


def sizes_are_right(folder: Path) -> bool:
    """Whether nothing says at a glance that the checkpoint is damaged."""
    try:
        manifest: Manifest | None = read_manifest(folder)
    except (OSError, ValueError):
        return False
    return not wrong_sizes(folder, manifest) if manifest else (folder / METADATA).exists()


def set_aside(home: Path, step: int, word: str) -> Path:
    """Renames step-N to <word>-N, or <word>-N-2, ... where that is taken. Returns the new path."""
    for name in (f"{word}-{step}", *(f"{word}-{step}-{i}" for i in range(2, 1000))):
        if not (home / name).exists():
            (home / f"step-{step}").rename(home / name)
            sync_folder(home)
            return home / name
    raise ValueError(f"{home} holds 1000 folders named {word}-{step}; delete some")


def clear_leftovers(home: Path) -> None:
    """Deletes what killed processes left of saves and deletions; none of it is a checkpoint."""
    for pattern in ("writing-*", "deleting-*"):
        for folder in home.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
