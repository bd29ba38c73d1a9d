"""Two ranks, one of which fails: both end, soon, with the words of the one that failed; the last
finished step is saved where its weights are whole, and the run goes on from there.
"""

import subprocess
import time
from pathlib import Path

import pytest
from checkpoint_runs import flip
from fault_runs import budget
from runs import MAIN, command, config, environment, numbers, run_ranks

from reflux.trainer.engine.checkpoint_folder import steps_in
from reflux.trainer.runs.logger import load_run
from reflux.trainer.verify import verify

OVER = {"steps": 5, "checkpoint": {"interval": 100}, "on_existing_run": "resume"}
FAULTY = MAIN.parents[1] / "tests" / "faulty_main.py"
# fault (see faulty_main.py) -> the step that is saved, None for none
FAULTS = {
    "score:3:1:value": 2,
    "sample:4:0:memory": 3,
    "sample:3:all:key": 2,
    "optimizer:3:1:memory": None,
    "score:3:1:kill": None,
    "save:2:0:kill": None,
    "close:4:1:value": 3,
    "log:3:0:value": 3,
    "score:4:1:interrupt": 3,
}
TRIED = list(FAULTS)[: budget(2, 3, len(FAULTS))]


@pytest.fixture(scope="module")
def whole(talkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    cfg = config(talkers, folder / "run", "distill", **OVER)
    return [numbers(step) for step in run_ranks(cfg).steps]


def start(cfg, fault: str) -> subprocess.CompletedProcess:
    words = command(cfg, Path(cfg.folder + ".toml"), 2)
    words[words.index(str(MAIN))] = str(FAULTY)
    env = environment() | {"FAULT": fault}
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("fault", TRIED)
def test_a_rank_that_fails_ends_all_and_loses_no_finished_step(
    talkers, whole, tmp_path, record_property, fault
):
    record_property("fault", f"{fault} (where:step:rank:kind)")
    cfg = config(talkers, tmp_path / "run", "distill", **OVER)
    started = time.monotonic()
    done = start(cfg, fault)
    took = time.monotonic() - started
    assert done.returncode != 0 and took < 100, f"{took:.0f} s, most of them to start"
    saved, step = steps_in(tmp_path / "run" / "checkpoint"), FAULTS[fault]
    assert saved == ([] if step is None else [step]), done.stderr[-3000:]
    if step:
        assert f"step {step} is saved in" in done.stderr
        assert [v.line for v in verify(tmp_path / "run") if v.damage] == []
    if ":value" in fault and "all" not in fault:
        rank = fault.split(":")[2]
        assert f"rank {rank} ended the run: row 17 has no prompt" in done.stderr
    if "log:" not in fault:  # the line that could not be logged is lost
        assert [numbers(step) for step in run_ranks(cfg).steps] == whole


def test_both_ranks_go_back_to_the_same_checkpoint(talkers, tmp_path):
    over = {"steps": 4, "checkpoint": {"interval": 1, "keep_latest_k": 0}}
    cfg = config(talkers, tmp_path / "run", "distill", **over, on_existing_run="resume")
    whole = [numbers(step) for step in run_ranks(cfg).steps]
    home = tmp_path / "run" / "checkpoint"
    flip(home / "step-4" / "__1_0.distcp", 0.6)
    flip(home / "step-3" / "__0_0.distcp", 0.6)
    assert [numbers(step) for step in run_ranks(cfg).steps] == whole
    names = sorted(p.name for p in home.iterdir())
    assert names == ["damaged-3", "damaged-4", "step-1", "step-2", "step-3", "step-4"]
    messages = [e["message"] for e in load_run(cfg.folder).events if e["event"] == "checkpoint"]
    assert len(messages) == 2 and "__1_0.distcp was changed" in messages[0]
