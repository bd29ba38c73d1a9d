"""Damage of every kind, at random places of random checkpoints: the run goes on from the newest
whole one to the same numbers, or says that there is none; it never goes on from a damaged one.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_runs import cut, flip
from fault_runs import Process, differences, extent, fails_with_output, moved, result
from runs import config

pytestmark = pytest.mark.faults
STEPS = 5


@pytest.fixture(scope="module")
def whole(talkers, tmp_path_factory):
    """A run that kept all of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    over = {"steps": STEPS, "checkpoint": {"interval": 1, "keep_latest_k": 0}}
    cfg = config(talkers, folder / "run", "distill", **over)
    process = Process(cfg, folder / "run.toml")
    with fails_with_output(process):
        assert process.wait() == 0
    return cfg, result(cfg.folder)


def append(file: Path, random_: random.Random) -> None:
    file.write_bytes(file.read_bytes() + random_.randbytes(random_.randint(1, 99)))


def zeros(file: Path, random_: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = random_.randrange(max(len(data) - 4096, 1))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    data[-1] ^= 1  # the block may have been of zeros before
    file.write_bytes(data)


def swap(file: Path, random_: random.Random) -> None:
    """The same file of another step: whole, and of the right size."""
    others = [p for p in file.parent.parent.glob(f"step-*/{file.name}") if p != file]
    shutil.copy(random_.choice(others), file)


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": lambda file, r: flip(file, r.random(), r.randrange(8)),
    "cut": lambda file, r: cut(file, r.random()),
    "empty": lambda file, r: file.write_bytes(b""),
    "remove": lambda file, r: file.unlink(),
    "append": append,
    "zeros": zeros,
    "swap": swap,
}
FILES = ("__0_0.distcp", "__0_0.distcp", ".metadata", "manifest.json")  # most bytes are weights


def damage_some(home: Path, random_: random.Random) -> tuple[set[int], list[str]]:
    """Damages the newest checkpoint and perhaps older ones. Returns which, and what was done."""
    newest = random_.randint(1, STEPS)
    for step in range(newest + 1, STEPS + 1):
        shutil.rmtree(home / f"step-{step}")
    damaged = {newest} | {s for s in range(1, newest) if random_.random() < 0.4}
    done = []
    for step in damaged:
        kind, name = random_.choice(list(DAMAGE)), random_.choice(FILES)
        if (kind, name) in (("remove", "manifest.json"), ("swap", "manifest.json")):
            name = "__0_0.distcp"  # a checkpoint without a manifest is one of an older version
        if kind == "swap" and newest == 1:
            kind = "cut"
        DAMAGE[kind](home / f"step-{step}" / name, random_)
        done.append(f"step-{step}: {kind} {name}")
    return damaged, done


def test_random_damage(whole, tmp_path):
    cfg, wanted = whole
    random_ = random.Random(11)
    for attempt in range(extent(8, 150)):
        run = moved(cfg, tmp_path / f"run-{attempt}")
        shutil.copytree(cfg.folder, run.folder)
        home = Path(run.folder) / "checkpoint"
        damaged, done = damage_some(home, random_)
        left = [s for s in range(1, max(damaged)) if s not in damaged]
        process = Process(run, tmp_path / f"{attempt}.toml")
        with fails_with_output(process):
            assert process.wait() == (0 if left else 2), done
            if left:
                assert f"The run goes on from step {max(left)}" in process.printed, done
                assert differences(result(run.folder), wanted) == [], done
                aside = {p.name for p in home.glob("damaged-*")}
                assert aside == {f"damaged-{s}" for s in damaged if s > max(left)}, done
            else:
                assert "holds no checkpoint to go on from" in process.printed, done
                assert "Traceback" not in process.printed
                assert len(list(home.glob("step-*"))) == max(damaged), "nothing is changed"
        shutil.rmtree(run.folder)
