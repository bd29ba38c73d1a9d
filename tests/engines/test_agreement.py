"""One configuration, three samplers: they draw other texts of the same distribution, so what a
calibration measures agrees within what other seeds of the embedded sampler make of it.
"""

import numpy as np
import pytest
from runs import config, run_here

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("titan_process")]

STEPS, SEEDS = 10, (0, 1, 2, 3)
MEASURED = ("reward/task", "reward/cal", "loss", "reference_kl", "entropy", "length")
WITHIN = 4.0  # standard errors of a difference of two means


def measured(talkers, folder, seed: int, **rollout) -> np.ndarray:
    """The mean of each of MEASURED over the steps."""
    cfg = config(
        talkers,
        folder / f"{rollout.get('engine', 'embedded')}{seed}",
        "calibrate",
        steps=STEPS,
        seed=seed,
        rollout={"prompts": 4, "group": 8} | rollout,
        calibration={"mode": "distillable"},
    )
    steps = run_here(cfg).steps
    assert len(steps) == STEPS
    return np.array([[step[name] for name in MEASURED] for step in steps]).mean(0)


def test_ten_steps_of_a_calibration_agree_within_the_samplers_noise(
    policy_server, talkers, tmp_path
):
    """By vLLM against the embedded sampler; by a server, which has the same seeds as vLLM here, the
    same texts.
    """
    vllm = {"engine": "vllm", "max_running": 32}
    ours = np.stack([measured(talkers, tmp_path, s) for s in SEEDS])
    theirs = np.stack([measured(talkers, tmp_path, s, **vllm) for s in SEEDS])
    error = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / len(SEEDS))
    for what, a, b, e in zip(MEASURED, ours.mean(0), theirs.mean(0), error):
        print(f"{what:13} embedded {a:9.4f}, vLLM {b:9.4f}, standard error {e:.4f}")
        assert e > 0 and abs(a - b) < WITHIN * e, what
    by_server = {"engine": "server", "servers": [policy_server.address]}
    got = measured(talkers, tmp_path, SEEDS[0], **by_server)
    assert got == pytest.approx(theirs[0], rel=1e-3, abs=1e-3)
