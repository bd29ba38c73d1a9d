"""Several checkpoints of a run are damaged, in every way and at random places: the run goes on from
the newest whole one, or says that there is none; it never goes on from a damaged one.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_runs import cut, flip
from fault_runs import budget, copy_place

STEPS = 5
OVER = {"steps": STEPS, "checkpoint": {"interval": 1, "keep_latest_k": 0}, "export": {}}
DATA = "__0_0.distcp"
FILES = (DATA, DATA, ".metadata", "manifest.json")  # most bytes are weights


def append(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 99)))


def zeros(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(max(len(data) - 4096, 1))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    data[-1] ^= 1  # the block may have been of zeros before
    file.write_bytes(data)


def swap(file: Path, rng: random.Random) -> None:
    """The same file of another step: whole, and of the right size."""
    others = sorted(p for p in file.parent.parent.glob(f"step-*/{file.name}") if p != file)
    shutil.copy(rng.choice(others), file)


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "flip": lambda file, rng: flip(file, rng.random(), rng.randrange(8)),
    "cut": lambda file, rng: cut(file, rng.random()),
    "empty": lambda file, rng: file.write_bytes(b""),
    "remove": lambda file, rng: file.unlink(),
    "append": append,
    "zeros": zeros,
    "swap": swap,
}


def damage_some(home: Path, rng: random.Random) -> tuple[list[int], list[str]]:
    """Damages the newest checkpoint and perhaps older ones. Returns which, and what was done."""
    newest = rng.randint(1, STEPS)
    for step in range(newest + 1, STEPS + 1):
        shutil.rmtree(home / f"step-{step}")
    damaged = [s for s in range(1, newest) if rng.random() < 0.4] + [newest]
    done = []
    for step in damaged:
        kind, name = rng.choice(list(DAMAGE)), rng.choice(FILES)
        if kind in ("remove", "swap") and name == "manifest.json":
            name = DATA  # without its manifest a checkpoint is one of an older version
        if kind == "swap" and newest == 1:
            kind = "cut"
        DAMAGE[kind](home / f"step-{step}" / name, rng)
        done.append(f"step-{step}: {kind} {name}")
    return damaged, done


@pytest.mark.parametrize("i", range(budget(4, 12, 60)))
def test_the_newest_whole_checkpoint_is_used(whole, tmp_path, record_property, i):
    rng = random.Random(i)
    clean = whole("distill", "all kept", **OVER)
    place = copy_place(clean.place, tmp_path / "x")
    home = place.folder / "checkpoint"
    damaged, done = damage_some(home, rng)
    record_property("fault", "; ".join(done))
    left = [s for s in range(1, max(damaged)) if s not in damaged]
    ended = place.run()
    assert ended.code == (0 if left else 2), place.story()
    if not left:
        assert "holds no checkpoint to go on from" in ended.output, place.story()
        assert "Traceback" not in ended.output, place.story()
        assert len(list(home.glob("step-*"))) == max(damaged), "nothing is changed"
        return
    assert f"The run goes on from step {max(left)}" in ended.output, place.story()
    aside = {p.name for p in home.glob("damaged-*")}
    assert aside == {f"damaged-{s}" for s in damaged if s > max(left)}, place.story()
    for path in home.glob("damaged-*"):
        shutil.rmtree(path)
    differences = clean.outcome.differences(place.ends_well())
    assert not differences, differences
