"""The matrix: its runner or one of its cells is killed; the same command ends equal."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_runs import EXACT, TRAINING, budget, outcome
from runs import environment, table, write_data

from reflux.trainer.config.loader import fill, to_toml
from reflux.trainer.config.schema import Config
from reflux.trainer.runs.lock import process_start

MATRIX = """
folder = "runs"
seeds = [0]
parallel = 2
[[cell]]
name = "teacher"
config = "calibrate.toml"
[[cell]]
name = "student"
config = "distill.toml"
after = ["teacher"]
set = { "teacher.path" = "{folder}/teacher/export" }
[[cell]]
name = "start"
config = "evaluate.toml"
"""
CELLS = ("teacher", "student", "start")
COMMAND = [sys.executable, "-m", "reflux.trainer.matrix", "m.toml"]


def write_matrix(talkers: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    write_data(directory)
    for phase in ("calibrate", "distill", "evaluate"):
        over = {"task": EXACT} if phase == "evaluate" else TRAINING
        over = over | {"eval" if phase == "evaluate" else "data": {"source": "data.jsonl"}}
        cfg = fill(Config, table(talkers, directory / phase, phase, **over), "test")
        (directory / f"{phase}.toml").write_text(to_toml(cfg))
    (directory / "m.toml").write_text(MATRIX)


def run_matrix(directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        COMMAND, cwd=directory, env=environment(), capture_output=True, text=True, timeout=300
    )


def outcomes(directory: Path) -> dict:
    return {name: outcome(directory / "runs" / "seed-0" / name) for name in CELLS}


@pytest.fixture(scope="session")
def clean(talkers, tmp_path_factory):
    directory = tmp_path_factory.mktemp("matrix") / "m"
    write_matrix(talkers, directory)
    start = time.monotonic()
    done = run_matrix(directory)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return outcomes(directory), time.monotonic() - start


def cell_owners(directory: Path) -> dict[int, int | None]:
    """Processes that own a cell's folder -> their start time."""
    import json

    owners = {}
    for path in (directory / "runs").glob("seed-0/*/lock-*.json"):
        try:
            pid = json.loads(path.read_text())["pid"]
        except (OSError, ValueError):
            continue
        owners[pid] = process_start(pid)
    return owners


@pytest.mark.parametrize("i", range(budget(1, 2, 10)))
def test_the_matrix_is_killed(talkers, clean, tmp_path, record_property, i):
    rng = random.Random(i)
    wanted, seconds = clean
    directory = tmp_path / "m"
    write_matrix(talkers, directory)
    after, victim = rng.uniform(0.4, 0.95) * seconds, ("runner", "cell")[i % 2]
    record_property("fault", f"SIGKILL of the {victim} after {after:.1f} s")
    with open(tmp_path / "output.txt", "wb") as out:
        runner = subprocess.Popen(COMMAND, cwd=directory, env=environment(), stdout=out, stderr=out)
    try:
        runner.wait(after)
    except subprocess.TimeoutExpired:
        owners = cell_owners(directory)
        if victim == "cell" and owners:
            os.kill(rng.choice(sorted(owners)), signal.SIGKILL)
            runner.wait(300)
        else:
            runner.kill()
    runner.wait()
    # at once: cells of the killed runner may still be at work
    done = run_matrix(directory)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert not cell_owners(directory), "a cell outlived the runner"
    left = outcomes(directory)
    for name in CELLS:
        differences = wanted[name].differences(left[name])
        # a cell whose runner is gone saves the step at which it stops: one checkpoint more
        own = ("console.log", "checkpoints")
        differences = [d for d in differences if not d.startswith(own)]
        assert not differences, (name, differences)
