"""Every option of phase 1 changes what it names."""

import math

import numpy as np
import pytest
from runs import config, run_here

pytestmark = pytest.mark.usefixtures("titan_process")

BASE = {
    "calibration": {"mode": "undistillable", "margin_guard": False, "score_norm": "sum"},
    "reference": {"beta": 0.2},
    "task": {"name": "small_tasks:is_even"},
    "seed": 3,
    "rollout": {"prompts": 4, "group": 4, "max_tokens": 12},
}
OPTIONS = [
    {"calibration": {"mode": "off"}},
    {"calibration": {"mode": "distillable"}},
    {"calibration": {"strength": 1.0}},
    {"calibration": {"score_norm": "length_free"}},
    {"calibration": {"score_norm": "per_byte"}},
    {"calibration": {"score_norm": "per_token"}},
    {"calibration": {"denominator": "reference"}},
    {"calibration": {"score_stop": False}},
    {"calibration": {"credit": "span", "allow_biased": True}},
    {"calibration": {"credit": "prefix"}},
    {"calibration": {"truncated": "drop"}},
    {"calibration": {"truncated": "score_prefix"}},
    {"calibration": {"span_clip": 0.2}},
    {"calibration": {"winsor": 0.2}},
    {"calibration": {"std_floor": 1.0}},
    {"calibration": {"cal_gate": "none"}},
    {"calibration": {"cal_gate": "skip_degenerate"}},
    {"calibration": {"cal_gate": "scale_by_task_std"}},
    {"calibration": {"margin_guard": True}},
    {"reference": {"beta": 0.5}},
    {"reference": {"estimator": "k1_reward"}},
    {"reference": {"estimator": "k2_loss"}},
    {"reference": {"estimator": "k3_is"}},
    {"reference": {"estimator": "k3_loss"}},
    {"reference": {"dtype": "bfloat16"}},
    {"proxy": {"dtype": "bfloat16"}},
    {"policy": {"epochs": 2}},
    {"policy": {"epochs": 2, "clip": 0.001}},
    {"policy": {"minibatches": 2}},
    {"rollout": {"temperature": 0.7}},
    {"rollout": {"group": 5}},
    {"rollout": {"max_tokens": 9}},
    {"data": {"shuffle": False}},
    {"data": {"limit": 5}},
    {"seed": 4},
    {"optim": {"lr": 1e-4}},
    {"optim": {"betas": [0.5, 0.95]}},
    {"optim": {"eps": 1e-2}},
    {"optim": {"weight_decay": 1.0}},
    {"training": {"max_norm": 0.01}},
    {"lr_scheduler": {"warmup_steps": 3}},
]
_base: dict = {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "option", OPTIONS, ids=lambda o: str(o).translate({ord(c): None for c in "{}' "})
)
def test_every_option_changes_what_it_names(talkers, tmp_path, option):
    """T29: no option is swallowed. Three steps, because some act on the second update only."""

    def outcome(folder, **over):
        run = run_here(config(talkers, folder, "calibrate", **over))
        return [(s["loss"], s["grad_norm"]) for s in run.steps]

    # acts on groups that are all right or all wrong
    gated = "cal_gate" in option.get("calibration", {})
    base = (
        BASE | {"task": {"name": "small_tasks:is_easy"}, "rollout": {"prompts": 6, "group": 4}}
        if gated
        else BASE
    )
    if gated not in _base:
        _base[gated] = outcome(tmp_path / "base", **base, steps=3)
    merged = {
        k: (base.get(k, {}) | v if isinstance(v, dict) else v) for k, v in (base | option).items()
    }
    got = outcome(tmp_path / "run", **merged, steps=3)
    assert all(math.isfinite(x) for pair in got for x in pair)
    assert not np.allclose(got, _base[gated], rtol=1e-5, atol=0), f"{option} changed nothing"
