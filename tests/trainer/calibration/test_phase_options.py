"""Every option of phase 1 changes what it names."""

import math

import numpy as np
import pytest
from runs import config, run_here, write_data

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


@pytest.mark.parametrize("whole, part, ends", [(0.0, 1.0, False), (1.0, 0.0, True)])
def test_a_part_has_the_budget_for_failed_grades_of_its_own_task(
    talkers, tmp_path, whole, part, ends
):
    task = {"name": "small_tasks:fail_always", "max_failed": part}
    task["options"] = {"grade_truncated": True}
    data = {"source": "", "parts": {"a": {"source": str(write_data(tmp_path)), "task": task}}}
    over = {"data": data, "task": {"name": "", "max_failed": whole}, "steps": 1}
    cfg = config(talkers, tmp_path / "run", "calibrate", **over, calibration={"mode": "off"})
    if ends:
        with pytest.raises(ValueError, match="fail_always of part a: grading failed on 8 of 8"):
            run_here(cfg)
    else:
        assert run_here(cfg).steps[0]["grader_error"] == 1.0


def test_no_answer_is_of_the_texts_whose_grader_names_answers(talkers, tmp_path):
    """A function that says right or wrong names none, so none of its texts lacks one."""
    data = str(write_data(tmp_path))
    right = {"name": "small_tasks:is_right", "options": {"grade_truncated": True}}
    exact = {"name": "exact", "options": {"marker": "nowhere", "grade_truncated": True}}
    off = {"calibration": {"mode": "off"}, "steps": 1}
    (alone,) = run_here(config(talkers, tmp_path / "a", "calibrate", task=right, **off)).steps
    assert alone["accuracy"] == 1.0 and "no_answer" not in alone
    parts = {"x": {"source": data, "task": right}, "y": {"source": data, "task": exact}}
    cfg = config(talkers, tmp_path / "b", "calibrate", data={"source": "", "parts": parts}, **off)
    (both,) = run_here(cfg).steps
    assert both["accuracy"] == 0.5 and both["no_answer"] == 1.0
