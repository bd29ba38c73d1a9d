"""One configuration, three samplers: they draw other texts of the same distribution, so what a
calibration measures agrees within what other seeds of the embedded sampler make of it.
"""

import numpy as np
import pytest
from runs import config, run_here

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("titan_process")]

STEPS, SEEDS = 10, (0, 1, 2, 3)
MEASURED = ("reward/task", "reward/cal", "loss", "reference_kl", "entropy", "length")
# standard deviations of a difference; 4 seeds tell one of them within a factor of 2
WITHIN = 6.0


def measured(talkers, folder, seed: int, **rollout) -> np.ndarray:
    """The mean of each of MEASURED over the steps."""
    cfg = config(
        talkers,
        folder,
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
    embedded = np.stack([measured(talkers, tmp_path / f"embedded{s}", s) for s in SEEDS])
    mean, noise = embedded.mean(0), embedded.std(0, ddof=1)
    assert (noise > 0).all()
    by_server = {"engine": "server", "servers": [policy_server.address]}
    for name, rollout in (("vllm", {"engine": "vllm", "max_running": 32}), ("server", by_server)):
        got = measured(talkers, tmp_path / name, 0, **rollout)
        for what, value, m, s in zip(MEASURED, got, mean, noise):
            print(f"{name:7}{what:13}{value:10.4f}, embedded {m:.4f} +- {s:.4f}")
            assert abs(value - m) < WITHIN * s, (name, what)
