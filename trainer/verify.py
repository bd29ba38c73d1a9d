"""Says which checkpoints are whole: python -m reflux.trainer.verify FOLDER

FOLDER is a run, its folder checkpoint/, or one step-N in it. Changes nothing, runs nothing of what
it reads. Exit code 0: all are whole; 2: some are damaged, or there is none.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from . import disk_space
from .engine.checkpoint_folder import NO_MANIFEST, inspect, steps_in, wrong_files

DAMAGED = 2


@dataclass(frozen=True)
class FolderVerdict:
    """One checkpoint. damage: one sentence for each thing that is wrong with it."""

    folder: Path
    damage: tuple[str, ...]
    has_manifest: bool
    weights_only: bool
    bytes: int

    @property
    def line(self) -> str:
        if self.damage:
            return f"{self.folder.name}: damaged: " + "; ".join(self.damage)
        holds = "weights alone" if self.weights_only else "weights, optimizer and state"
        proof = "whole" if self.has_manifest else NO_MANIFEST
        return f"{self.folder.name}: {proof}; {holds}, {disk_space.size(self.bytes)}"


def verify(folder: Path) -> list[FolderVerdict]:
    """One verdict a checkpoint, oldest first. ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; want a run's folder, or one in it")
    if folder.name.startswith("step-"):
        return [_verdict(folder)]
    home = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    verdicts = [_verdict(home / f"step-{n}") for n in steps_in(home)]
    if not verdicts:
        raise ValueError(f"{folder}: holds no checkpoint; want a run's folder, or its checkpoint/")
    return verdicts


def _verdict(folder: Path) -> FolderVerdict:
    found = inspect(folder)
    damage = found.damage or tuple(wrong_files(folder, found.files))
    return FolderVerdict(folder, damage, found.has_manifest, found.weights_only, found.bytes)


def main(arguments: list[str] | None = None, prog: str = "python -m reflux.trainer.verify") -> int:
    """Prints a line for each checkpoint. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="a run, its folder checkpoint/, or one step-N")
    try:
        verdicts = verify(parser.parse_args(arguments).folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for verdict in verdicts:
        print(verdict.line)
    return DAMAGED if any(v.damage for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
