"""torchrun itself is killed: its ranks finish their step, save it and end; the folder is free."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_runs import budget
from runs import command, config, environment, numbers, run_ranks

from reflux.trainer.runs.lock import process_start
from reflux.trainer.runs.logger import load_run

OVER = {"steps": 60, "checkpoint": {"interval": 1000}, "on_existing_run": "resume"}


def children(pid: int) -> dict[int, int | None]:
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(word): process_start(int(word)) for word in words}


NUMBERS = [signal.SIGKILL, signal.SIGTERM][: budget(1, 1, 2)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.name)
def test_the_launcher_is_killed(talkers, tmp_path, record_property, number):
    clean = run_ranks(config(talkers, tmp_path / "whole", "calibrate", **OVER))
    cfg = config(talkers, tmp_path / "run", "calibrate", **OVER)
    record_property("fault", f"{number.name} to torchrun after step 1")
    with open(tmp_path / "output.txt", "wb") as out:
        words = command(cfg, tmp_path / "run.toml", ranks=2)
        launcher = subprocess.Popen(words, env=environment(), stdout=out, stderr=out)
    log, end = tmp_path / "run" / "run.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b'\n{"step"') < 1:
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    launcher.send_signal(number)
    try:
        assert launcher.wait(60) == (130 if number == signal.SIGTERM else -number)
        end = time.monotonic() + 60
        while any(process_start(pid) == start for pid, start in ranks.items()):
            assert time.monotonic() < end, "a rank outlives torchrun"
            time.sleep(0.05)
    finally:
        for pid, start in ranks.items():
            if process_start(pid) == start:
                os.kill(pid, signal.SIGKILL)
    assert not list((tmp_path / "run").glob("lock-*"))
    steps = load_run(cfg.folder).steps
    assert len(steps) < 40, "the ranks went on without torchrun"
    assert (tmp_path / "run" / "checkpoint" / f"step-{len(steps)}").exists()
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
    resumed = run_ranks(cfg)
    assert [numbers(s) for s in resumed.steps] == [numbers(s) for s in clean.steps]
