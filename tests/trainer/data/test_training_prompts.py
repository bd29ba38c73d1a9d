"""Whole runs on a mixture: every part trained, graded, measured and guarded by itself. One source:
test_fitted_prompts.py.
"""

import json

import pytest
from runs import config, run_here

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("titan_process")]

VOWELS = {"name": "small_tasks:reward_vowels"}
EVEN = {"name": "small_tasks:is_even", "options": {"grade_truncated": True}}


def mixture(tmp_path, **over) -> dict:
    vowels, even = tmp_path / "vowels.jsonl", tmp_path / "even.jsonl"
    vowels.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(5)))
    rows = [{"question": f"which {i}?", "answer": str(i)} for i in range(3)]
    even.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = {
        "vowels": {"source": str(vowels), "weight": 3, "task": VOWELS},
        "even": {"source": str(even), "task": EVEN},
    }
    questions = {name: {"source": part["source"]} for name, part in parts.items()}
    return {
        "data": {"source": "", "parts": parts},
        "eval": {"parts": questions, "samples": 2},
        "rollout": {"prompts": 4, "group": 4, "max_tokens": 8},
        "steps": 3,
    } | over


def test_a_calibration_on_two_tasks(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "calibrate", **mixture(tmp_path))
    run = run_here(cfg)
    for step in run.steps:
        # of the one part whose grader knows right and wrong
        assert step["accuracy"] == step["accuracy/even"] and "accuracy/vowels" not in step
        means = [step["reward/task/vowels"], step["reward/task/even"]]
        assert step["reward/task"] == pytest.approx(means[0] * 3 / 4 + means[1] / 4, abs=1e-6)
        assert step["length/vowels"] > 0 and step["length/even"] > 0
    predictions = (tmp_path / "run/predictions/step-3.jsonl").read_text().splitlines()
    parts = [json.loads(line)["part"] for line in predictions]
    assert parts.count("vowels") == 5 * 3 and parts.count("even") == 3 * 3
    head = json.loads((tmp_path / "run/run.jsonl").read_text().splitlines()[0])
    assert {"data.vowels", "data.even", "eval.vowels", "eval.even"} <= set(head["inputs"])


def test_a_mixture_is_resumed_to_the_last_digit(talkers, tmp_path):
    over = mixture(tmp_path, checkpoint={"interval": 1})
    whole = run_here(config(talkers, tmp_path / "whole", "calibrate", **over))
    run_here(config(talkers, tmp_path / "cut", "calibrate", **over | {"steps": 1}))
    again = config(talkers, tmp_path / "cut", "calibrate", **over | {"on_existing_run": "resume"})
    resumed = run_here(again)
    assert [s["loss"] for s in resumed.steps] == [s["loss"] for s in whole.steps]


def test_an_evaluation_by_parts_with_a_rule_for_one(talkers, tmp_path):
    from reflux.trainer import loop

    over = mixture(tmp_path)
    for part, task in (("vowels", VOWELS), ("even", EVEN)):
        over["eval"]["parts"][part]["task"] = task
    over["accept"] = {"even": {"metric": "greedy", "part": "even", "min": 1.1}}
    del over["data"], over["steps"]
    cfg = config(talkers, tmp_path / "run", "evaluate", **over)
    assert loop.train(cfg) == 3, "its own rule fails"
    table = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert table["parts"]["vowels"]["greedy"]["n"] == 5
    assert table["parts"]["even"]["greedy"]["n"] == 3
    assert "| even | greedy |" in (tmp_path / "run/report.md").read_text()


def test_a_part_that_is_too_long_is_named(talkers, tmp_path):
    over = mixture(tmp_path)
    file = tmp_path / "even.jsonl"
    file.write_text(json.dumps({"question": "word " * 500}) + "\n")
    with pytest.raises(ValueError, match=r"even.jsonl, line 1.*too long"):
        run_here(config(talkers, tmp_path / "run", "calibrate", **over))
