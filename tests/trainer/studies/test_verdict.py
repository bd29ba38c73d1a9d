"""The acceptance rules, on runs and on results whose numbers are known."""

import json

import pytest
from report_runs import edit_logs, write_matrix

from reflux.trainer.runs.stats import Estimate, over_seeds
from reflux.trainer.studies.attack_report import build_report
from reflux.trainer.studies.results import Change, QueryCost, Results, StudentResult
from reflux.trainer.studies.verdict import (
    AttackOutcome,
    attack_outcomes,
    check_rule,
    conclusion,
    verdict_lines,
    within_a1,
)

PAID = {"original": 0.9, "distillable": 0.9, "undistillable": 0.8}  # teachers' accuracies


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.attack_report.draw_figures", lambda *_: {})


def estimate(mean, half=0.01):
    return Estimate(mean, half, mean - half, mean + half, 3)


def student(last, best):
    """A student with these relative changes."""
    nothing = over_seeds([])
    return StudentResult(
        sampled=nothing,
        greedy=nothing,
        answered=1.0,
        correct_if_answered=1.0,
        best=nothing,
        styles={},
        greedy_styles={},
        seconds=nothing,
        cost=QueryCost(0, 0, 0, 0.0),
        late_spike=1.0,
        change=Change(sampled=last, greedy=nothing, best=best),
    )


def test_an_attack_fails_only_by_both_checkpoints_and_beyond_the_interval():
    low, wide, high = estimate(-0.8), estimate(-0.8, half=0.9), estimate(-0.2)
    changes = {
        "by both": (low, low),
        "early": (low, high),
        "early, wide": (low, wide),
        "late": (high, high),
        "wide": (wide, low),
    }
    students = {a: {"undistillable": student(*c)} for a, c in changes.items()}
    assert attack_outcomes(students) == [
        AttackOutcome("by both", "failed"),
        AttackOutcome("late", "succeeded"),
        AttackOutcome("wide", "inconclusive"),
        AttackOutcome("early", "succeeded", "best"),
        AttackOutcome("early, wide", "inconclusive", "best"),
    ]


def test_the_rules_have_their_own_side():
    changes = {"up": estimate(0.2), "little": estimate(0.1), "down": estimate(-0.6)}
    for teacher, holds in (("distillable", "up"), ("undistillable", "down")):
        students = {a: {teacher: student(c, c)} for a, c in changes.items()}
        rule = check_rule(students, teacher)
        assert rule.holds == (holds,) and rule.violated == [a for a in changes if a != holds]
    unmeasured = {"a": {"undistillable": student(over_seeds([]), over_seeds([]))}}
    assert check_rule(unmeasured, "undistillable").changes == {}


def test_a1_needs_every_seed():
    assert within_a1([0.02, -0.02]) and not within_a1([0.0, 0.03]) and not within_a1([])


def test_a_teacher_that_lost_accuracy_and_an_attack_that_succeeded_are_named(tmp_path):
    scores = {"original": 0.5, "distillable": 0.52, "undistillable": 0.45}
    write_matrix(tmp_path, scores, teachers=PAID)
    lines = build_report(tmp_path).verdict
    limit = "within 2 points (sampled -10.0, greedy -10.0)"
    assert f"teacher undistillable: accuracy NOT preserved {limit}" in lines
    assert sum("0 of 1 attacks" in line for line in lines) == 3
    assert "not reached: kd +4%" in lines
    assert "succeeded or inconclusive: kd -10%" in lines


def test_the_conclusion_names_what_succeeded_and_what_the_teacher_paid(tmp_path):
    scores = {"original": 0.5, "distillable": 0.52, "undistillable": 0.45}
    write_matrix(tmp_path, scores, teachers=PAID)
    text = build_report(tmp_path).conclusion
    assert text.startswith(
        "The undistillable teacher lost accuracy itself. Of 1 attacks on it 0 failed"
    )
    assert "Succeeded: kd (0.450 against 0.500 from the original)." in text
    assert "at least 15% more than the original under 0 of 1 attacks; not under kd." in text
    assert "One seed" not in text
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    matrix["cells"] = [c for c in matrix["cells"] if c["labels"]["seed"] == "0"]
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    assert build_report(tmp_path).conclusion.endswith(
        "One seed: no number here has a standard deviation over seeds yet."
    )


def test_less_than_half_with_an_interval_that_holds_0_is_inconclusive(tmp_path):
    """Original 0.9 and 0.1 over two seeds, undistillable 0.05: -90 % in the mean, and an interval
    over two seeds that holds 0.
    """
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.05})
    for seed, accuracy in (("0", 0.9), ("1", 0.1)):
        last = {"eval/sampled": accuracy, "eval/greedy": accuracy}

        def edit(row, last=last):
            return row | last if row.get("event") == "eval" and row["step"] == 3 else row

        edit_logs(tmp_path, [f"s-original-{seed}"], edit)
    report = build_report(tmp_path)
    assert "succeeded or inconclusive: kd -90% (its interval holds 0)" in report.verdict
    assert "Of 1 attacks on it 0 failed" in report.conclusion
    assert "None succeeded. Inconclusive (less than half in the mean" in report.conclusion
    assert "holds 0): kd (0.050 against 0.500 from the original)." in report.conclusion


def test_a_gain_that_training_on_the_task_gives_too_is_seen(tmp_path):
    scores = {"original": 0.4, "task_only": 0.7, "distillable": 0.6, "undistillable": 0.1}
    write_matrix(tmp_path, scores)
    line = "above the student of the task-only teacher (eta = 0): 0 of 1 attacks"
    assert line in build_report(tmp_path).verdict


def test_the_headline_is_the_worst_attack(tmp_path):
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    text = "\n".join(build_report(tmp_path).verdict)
    most = "distillability of the undistillable teacher, the attack that gained most"
    assert f"{most}: kd, -0.25 [" in text
    assert "of the distillable teacher, the attack that gained least: kd, 1.50 [" in text
    # the original's gain of 0.01 is too small to compare with
    little = {"original": 0.21, "distillable": 0.8, "undistillable": 0.1}
    write_matrix(tmp_path / "little", little, start=0.2)
    assert "distillability" not in "\n".join(build_report(tmp_path / "little").verdict)


def test_without_runs_there_is_nothing_to_conclude():
    results = Results(teachers={}, students={}, baselines={})
    assert verdict_lines(results) == [] and conclusion(results) == ""
