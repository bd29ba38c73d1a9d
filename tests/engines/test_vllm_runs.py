"""Runs that sample by vLLM in their own processes: one, two ranks, and one engine of two ranks."""

import os
from pathlib import Path

import pytest
from runs import config, run_here, run_ranks

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("titan_process")]

VLLM = {"engine": "vllm", "max_running": 16}
GAP = 1e-5  # nats, fp32


def test_runs_sample_with_the_weights_that_they_train(talkers, tmp_path):
    """The mismatch compares vLLM's log-probabilities with the trainer's own, after every update."""
    calibrate = config(
        talkers,
        tmp_path / "calibrate",
        "calibrate",
        steps=3,
        rollout=VLLM | {"old_logp": "trainer"},
        policy={"max_is": 2.0},
        calibration={"mode": "distillable"},
        eval={"source": str(tmp_path / "data.jsonl"), "limit": 2, "at_start": True},
    )
    run = run_here(calibrate)
    assert len(run.steps) == 3
    for step in run.steps:
        assert step["is/gap"] < GAP and step["is/weight"] == pytest.approx(1.0, abs=GAP), step
    distill = config(talkers, tmp_path / "distill", "distill", steps=3, rollout=VLLM)
    steps = run_here(distill).steps
    assert len(steps) == 3 and all(s["on_policy"] == 1 and s["kl"] > 0 for s in steps)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_sample_what_one_does(talkers, tmp_path, tensor_parallel):
    """One engine a rank; one engine of both. What a job that was killed left behind, by vLLM's one
    name for all jobs, is not in the way; nothing is left by ours.
    """
    left = [Path("/dev/shm", f"-tp:0-[0-1]-cpushm_{rank}") for rank in range(2)]
    for segment in left:
        segment.write_bytes(b"")
    before = set(os.listdir("/dev/shm"))
    both = config(
        talkers,
        tmp_path / "two",
        "calibrate",
        rollout=VLLM | {"tensor_parallel": tensor_parallel},
        calibration={"mode": "distillable"},
    )
    for step in run_ranks(both).steps:
        assert step["max/mismatch"] < GAP, step
    assert set(os.listdir("/dev/shm")) == before
    for segment in left:
        segment.unlink()
