"""Two ranks print the numbers of one, whatever the way the work is shared (T23)."""

import json
import os
import subprocess

import pytest
from runs import command, config, environment, run_here, run_ranks

pytestmark = pytest.mark.usefixtures("titan_process")
CALIBRATE = {
    "calibration": {
        "mode": "undistillable",
        "credit": "span",
        "allow_biased": True,
        "score_norm": "sum",
    },
    "reference": {"beta": 0.2},
    "log": {"samples_every": 1},
    "rollout": {"prompts": 4, "old_logp": "trainer"},
    "steps": 3,
    "task": {"name": "exact", "options": {"marker": "=>"}},
    "batch": {"tokens": 97},
}
# seed 1: in the first step one rank samples from the student only, the other one from the teacher
# only
DISTILL = {
    "seed": 1,
    "distill": {"objective": "kl", "on_policy": 0.5, "nll_weight": 0.5, "correct_only": True},
    "steps": 3,
    "task": {"name": "exact", "options": {"marker": "=>"}},
    "rollout": {"prompts": 4},
    "log": {"samples_every": 1},
}
SAME = (
    "loss",
    "grad_norm",
    "reward/task",
    "reward/cal",
    "reference_kl",
    "length",
    "kl",
    "nll",
    "tokens",
    "kept",
    "entropy",
    "accuracy",
)


def assert_same(one, two, eta: bool = True) -> None:
    assert [s["step"] for s in one.steps] == [s["step"] for s in two.steps] and len(one.steps) == 3
    for a, b in zip(one.steps, two.steps):
        later = {key for key in a if key.startswith("epoch2/") and "mismatch" not in key}
        for key in set(SAME) & set(a) | later:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (a["step"], key)
        assert a.get("eta") == b.get("eta")


def texts(folder) -> set:
    """Saved texts and grades; their r_cal may differ by a rounding, which assert_same bounds."""
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    scores = ("r_cal", "spans")
    return {json.dumps({k: v for k, v in x.items() if k not in scores}) for x in lines}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "phase, over", [("calibrate", CALIBRATE), ("distill", DISTILL)], ids=["calibrate", "distill"]
)
def test_two_ranks_are_one(talkers, tmp_path, phase, over):
    """Also the mini-batches of every epoch; `distill` has prompts of both kinds on both ranks."""
    over = over | {"policy": {"epochs": 2, "minibatches": 2}}
    one = run_here(config(talkers, tmp_path / "one", phase, **over))
    two = run_ranks(config(talkers, tmp_path / "two", phase, **over))
    assert_same(one, two)
    assert texts(tmp_path / "two") <= texts(tmp_path / "one"), "the ranks sampled other texts"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "parallelism",
    [
        {"tensor_parallel_degree": 2},
        {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
    ],
    ids=["TP", "replicas"],
)
def test_other_meshes_are_one_rank_too(talkers, tmp_path, parallelism):
    # models of transformers cannot be split by tensor
    native = {"proxy": {"path": str(talkers / "teacher")}}
    one = run_here(config(talkers, tmp_path / "one", "calibrate", **CALIBRATE, **native))
    two = run_ranks(
        config(
            talkers, tmp_path / "two", "calibrate", **CALIBRATE, **native, parallelism=parallelism
        )
    )
    assert_same(one, two)


BY_CHANCE = """
import os, pathlib, random

def grade(prompt, text):
    with open(pathlib.Path(__file__).with_name("graders"), "a") as file:
        file.write(os.environ["RANK"] + "\\n")
    return random.SystemRandom().random()
"""


def test_ranks_that_share_rows_grade_them_once(talkers, tmp_path, monkeypatch):
    """Grades that differ from call to call would give them other gradients. T23."""
    (tmp_path / "by_chance.py").write_text(BY_CHANCE)
    monkeypatch.chdir(tmp_path)
    over = {
        "calibration": {"mode": "off"},
        "task": {"name": "by_chance:grade", "options": {"isolate": False, "grade_truncated": True}},
        "parallelism": {"tensor_parallel_degree": 2},
        "rollout": {"prompts": 2, "group": 4},
        "steps": 2,
    }
    run = run_ranks(config(talkers, tmp_path / "run", "calibrate", **over))
    assert len(run.steps) == 2
    assert (tmp_path / "graders").read_text().split() == ["0"] * (2 * 2 * 4)


def test_a_rank_without_a_token_neither_hangs_nor_changes_the_numbers(talkers, tmp_path):
    """T11: of two prompts only one has a right answer on offer, so one rank trains on nothing."""
    over = {
        "steps": 3,
        "distill": {
            "divergence": "forward",
            "on_policy": 0.0,
            "source": "dataset",
            "correct_only": True,
        },
        "task": {"name": "small_tasks:is_answer_of_prompt_0"},
        "data": {"shuffle": False, "limit": 2},
        "rollout": {"prompts": 2},
    }
    one = run_here(config(talkers, tmp_path / "one", "distill", **over))
    two = run_ranks(config(talkers, tmp_path / "two", "distill", **over))
    assert one.steps[0]["passed_filter"] == 0.5 and one.steps[0]["tokens"] > 0
    assert_same(one, two)


def test_prompts_that_cannot_be_shared_equally_are_refused_without_a_hang(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "calibrate", rollout={"prompts": 3})
    done = subprocess.run(
        command(cfg, tmp_path / "x.toml", 2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "multiple of 2, for instance 4" in done.stderr
    assert not os.path.exists(tmp_path / "run" / "summary.json")
