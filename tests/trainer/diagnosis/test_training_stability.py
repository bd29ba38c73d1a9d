"""Spikes of gradient norms by hand, and which run folders are read."""

import json
import math

import pytest

from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.diagnosis.training_stability import norm_stability, read_stability


def test_spikes_are_over_ten_times_the_running_median():
    got = norm_stability([1.0, 1.0, 11.0, 1.0, 9.9])
    assert (
        got.steps == 5 and got.unstable == pytest.approx(0.2) and got.worst == pytest.approx(11.0)
    )
    # the median so far knows no smaller ones yet
    assert norm_stability([100.0, 1.0, 1.0]).unstable == 0
    assert (
        norm_stability([1.0, 1.0, 1.0, 10.0]).unstable == 0
        and norm_stability([2.0, 2.0, 2.0, 20.1]).unstable == 0.25
    )


def test_norms_that_are_not_finite_are_spikes():
    got = norm_stability([1.0, math.nan, math.inf, 1.0])
    assert got.unstable == 0.5 and got.worst == math.inf
    assert (
        math.isnan(norm_stability([math.nan]).worst) and norm_stability([math.nan]).unstable == 1.0
    )


def finished(folder, norms, score=None, phase="distill", ended=True, seed=0, teacher="t"):
    folder.mkdir()
    head = {
        "schema": 1,
        "config": {
            "phase": phase,
            "seed": seed,
            "model": {"path": "m"},
            "teacher": {"path": teacher},
        },
    }
    lines = [head] + [{"step": i + 1, "wall_s": 0.0, "grad_norm": x} for i, x in enumerate(norms)]
    lines += [{"event": "eval", "step": 0, "eval/sampled": 0.0}] + (
        [{"event": "eval", "step": 9, "eval/sampled": score}] if score else []
    )
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        (folder / "summary.json").write_text("{}")
    return str(folder)


def config_of(*runs) -> Config:
    return fill(
        Config,
        {
            "phase": "diagnose",
            "folder": "f",
            "model": {"path": "m"},
            "teacher": {"path": "t"},
            "data": {"source": "d"},
            "diagnose": {"runs": list(runs)},
        },
        "x.toml",
    )


def test_seeds_are_put_together(tmp_path):
    runs = [
        finished(tmp_path / str(i), norms, score, seed=i)
        for i, (norms, score) in enumerate(
            [([1.0, 1.0, 30.0, 1.0], 0.5), ([1.0] * 12, 0.7), ([2.0] * 4, 0.6)]
        )
    ]
    got = read_stability(config_of(*runs))
    assert [r.unstable for r in got.runs] == [0.25, 0, 0]
    assert [r.seed for r in got.runs] == [0, 1, 2]
    assert got.unstable == pytest.approx(1 / 20) and got.worst == 30.0
    score = got.score
    assert score.metric == "eval/sampled" and score.mean == pytest.approx(0.6)
    assert score.std == pytest.approx(0.1)
    assert score.range == pytest.approx(0.2) and score.low < 0.6 < score.high
    assert read_stability(config_of()) is None


def test_runs_without_an_evaluation_have_no_score(tmp_path):
    folder = finished(tmp_path / "a", [1.0])
    text = (tmp_path / "a" / "run.jsonl").read_text().splitlines()
    (tmp_path / "a" / "run.jsonl").write_text("\n".join(text[:2]) + "\n")
    assert read_stability(config_of(folder)).score is None


@pytest.mark.parametrize(
    "over, words",
    [
        ({"phase": "calibrate"}, "phase = 'calibrate' with 1 steps; want a distillation"),
        ({"norms": []}, "with 0 steps; want a distillation"),
        ({"ended": False}, "has not ended; take it off the list, or finish it"),
        ({"teacher": "u"}, "has teacher.path = 'u'; want this diagnosis' pair, 't'"),
    ],
)
def test_other_folders_are_an_error(tmp_path, over, words):
    folder = finished(tmp_path / "a", **{"norms": [1.0]} | over)
    with pytest.raises(ValueError, match="diagnose.runs: ") as error:
        read_stability(config_of(folder))
    assert words in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="diagnose.runs: .*/nothing: no run.jsonl; want the folder of a run"
    ):
        read_stability(config_of(str(tmp_path / "nothing")))
