"""Two ranks of which one is killed: all ends within a minute, and the same command goes on."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_runs import TRAINED, budget
from runs import command, config, environment, numbers, run_ranks

from reflux.trainer.runs.logger import load_run

CASES = [(phase, rank) for phase in TRAINED for rank in (0, 1)]
OVER = {"steps": 6, "checkpoint": {"interval": 2}, "on_existing_run": "resume"}


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def rank_of(pid: int) -> int | None:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(w[5:]) for w in words if w.startswith(b"RANK=")), None)


def ranks_of(launcher: int) -> dict[int, int]:
    pids = {rank_of(pid): pid for pid in children(launcher)}
    return {rank: pid for rank, pid in pids.items() if rank is not None}


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("phase, rank", CASES[: budget(1, 2, 4)], ids=str)
def test_one_rank_is_killed(talkers, tmp_path, record_property, phase, rank):
    rng = random.Random(f"{phase} {rank}")
    clean = run_ranks(config(talkers, tmp_path / "whole", phase, **OVER))
    cfg = config(talkers, tmp_path / "run", phase, **OVER)
    words = command(cfg, tmp_path / "run.toml", ranks=2)
    with open(tmp_path / "output.txt", "wb") as out:
        launcher = subprocess.Popen(words, env=environment(), stdout=out, stderr=out)
    at = rng.randint(1, 4)
    record_property("fault", f"SIGKILL of rank {rank} of 2 after step {at}")
    log = tmp_path / "run" / "run.jsonl"
    end = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b'\n{"step"') < at:
        assert launcher.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)
    pids = ranks_of(launcher.pid)
    os.kill(pids[rank], signal.SIGKILL)
    start = time.monotonic()
    try:
        code = launcher.wait(60)
    finally:
        launcher.kill()
    record_property("ended after s", round(time.monotonic() - start, 1))
    assert code not in (0, 2), "a killed rank is no mistake of the user, and no success"
    assert not any(exists(pid) for pid in pids.values()), "a rank outlived the launcher"
    assert load_run(cfg.folder).summary is None
    resumed = run_ranks(cfg)
    assert [numbers(s) for s in resumed.steps] == [numbers(s) for s in clean.steps]
