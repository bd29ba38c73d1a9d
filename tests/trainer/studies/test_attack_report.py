import json
import math

import pytest
from report_runs import (
    STYLES,
    add_runs,
    edit_logs,
    write_cells,
    write_lines,
    write_matrix,
    write_run,
)

from reflux.trainer.studies.attack_report import (
    _measured,
    build_report,
    style_fractions,
    write_report,
)
from reflux.trainer.studies.figures import student_bars, student_curves
from reflux.trainer.studies.finished_runs import load_finished_runs


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """They take seconds; one test draws them."""
    if request.function is not test_the_claims_hold_when_the_numbers_do:
        monkeypatch.setattr("reflux.trainer.studies.attack_report.draw_figures", lambda *_: {})


def test_the_claims_hold_when_the_numbers_do(tmp_path):
    scores = {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}
    write_matrix(tmp_path, scores, seeds="012")
    text = write_report(tmp_path)
    assert "teacher distillable: accuracy preserved" in text
    assert "teacher undistillable: accuracy preserved" in text
    assert "1 of 1 attacks kd +20% [+20%, +20%]" in text
    assert "1 of 1 attacks kd -60% [-60%, -60%]" in text
    assert "teacher task_only (eta = 0, the control): not run" in text
    assert "kd: answers found 100%" in text and "wrong answers, not missing ones" in text
    report = json.loads((tmp_path / "report.json").read_text())
    student = report["students"]["kd"]["distillable"]
    assert student["change"]["sampled"]["mean"] == pytest.approx(0.2)
    difference = report["teachers"]["distillable"]["difference"]["sampled"]
    assert difference["mean"] == pytest.approx(0.01)
    assert difference["n"] == 3  # seeds
    items = report["teachers"]["distillable"]["difference"]["sampled_items"]
    assert items["n"] == 300  # all seeds'
    markdown = (tmp_path / "report.md").read_text()
    assert "0.600 +- 0.000 (+20% [+20%, +20%])" in markdown and "c0ffee" in markdown
    for name in report["plots"]:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and name in markdown
    assert set(report["plots"]) == {"students.png", "calibration.png", "styles.png", "curves.png"}


def test_every_run_is_one_flat_row_of_the_report(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6})
    write_report(tmp_path)
    assert {
        "role": "student",
        "teacher": "distillable",
        "attack": "kd",
        "seed": "1",
        "sampled": 0.6,
        "greedy": 0.6,
        "best": 0.6,
        "at_start": 0.1,
        "reference_kl": 0.03,
        "seconds": 10.0,
    } in json.loads((tmp_path / "report.json").read_text())["runs"]


def test_an_attacker_who_stops_early_is_judged_by_its_best_checkpoint(tmp_path):
    """Last: 0.05 of 0.5, failed. Best: 0.4 of 0.5, not failed. What was evaluated before the
    attack (0.1) is no checkpoint of it.
    """
    scores = {"original": 0.5, "distillable": 0.6, "undistillable": 0.05}
    write_matrix(tmp_path, scores, seeds="012")
    report = build_report(tmp_path)
    assert report.students["kd"]["undistillable"].best.mean == pytest.approx(0.05)
    assert "1 failed, 0 succeeded and 0 are inconclusive" in report.conclusion
    best = "best checkpoint (the attacker stops early), whole interval over n = 3 seeds <= -50%"
    assert f"{best} of the original's: 1 of 1 attacks kd -90% [" in "\n".join(report.verdict)

    edit_logs(tmp_path, ["s-undistillable"], with_an_earlier_checkpoint(0.4))
    text = write_report(tmp_path)
    student = build_report(tmp_path).students["kd"]["undistillable"]
    assert student.best.mean == pytest.approx(0.4)
    assert student.change.best.mean == pytest.approx(-0.2)
    assert student.change.sampled.mean == pytest.approx(-0.9)
    assert "<= -50% of the original's: 1 of 1 attacks kd -90% [" in text
    assert "attack succeeded early: kd -20% [" in text
    markdown = (tmp_path / "report.md").read_text()
    accuracies = "0.400 against 0.500 from the original, with its best checkpoint"
    assert f"Succeeded: kd ({accuracies})." in markdown
    assert "Of 1 attacks on it 0 failed" in markdown and "0.400 +- 0.000 (-20% [" in markdown
    assert "| kd | succeeded | best | " in markdown


def with_an_earlier_checkpoint(accuracy):
    earlier = {"event": "eval", "step": 2, "wall_s": 2}
    earlier |= {"eval/sampled": accuracy, "eval/greedy": accuracy}

    def edit(row):
        return [earlier, row] if row.get("event") == "eval" and row["step"] == 3 else row

    return edit


@pytest.mark.parametrize(
    "late, words",
    [
        (5.0, "none diverged (largest gradient norm in the second half of a run 5.0 times"),
        (50.0, "diverged under kd"),
        (float("nan"), "diverged under kd"),
    ],
)
def test_a_run_that_diverged_is_no_collapse(tmp_path, late, words):
    """Norms 9, 1, 1, 1, 1, late: the warm-up does not count, nor does a run without collapse."""
    norms = [9.0, 1.0, 1.0, 1.0, 1.0, late]
    steps = [{"step": k + 1, "wall_s": 0, "loss": 1.0, "grad_norm": n} for k, n in enumerate(norms)]

    def edit(row):
        if "loss" not in row:
            return row
        return steps if row["step"] == 1 else None

    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    edit_logs(tmp_path, ["s-undistillable"], edit)
    assert words in write_report(tmp_path)
    write_matrix(tmp_path / "other", {"original": 0.5, "distillable": 0.6, "undistillable": 0.5})
    edit_logs(tmp_path / "other", ["s-undistillable"], edit)
    assert "diverged" not in write_report(tmp_path / "other")


def test_missing_answers_are_told_from_wrong_ones(tmp_path):
    scores = {"original": 0.5, "distillable": 0.6, "undistillable": 0.1}
    write_matrix(tmp_path, scores, answered=0.12)
    assert "mostly a format failure" in write_report(tmp_path)


def test_a_grader_that_names_no_answers_has_wrong_texts_and_no_missing_ones(tmp_path):
    """A function that returns a bool: nothing is extracted, and the outcome is all there is."""
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.1})

    def unnamed(p):
        cut = p["prompt"] >= 96
        outcome = "correct" if p["correct"] else "truncated" if cut else "wrong"
        return p | {"extracted": None, "outcome": outcome}

    for file in tmp_path.glob("*/predictions/*.jsonl"):
        write_lines(file, [unnamed(json.loads(line)) for line in file.read_text().splitlines()])
    assert build_report(tmp_path).students["kd"]["undistillable"].answered == pytest.approx(0.96)
    text = write_report(tmp_path)
    assert "answers found 96% (original 96%), correct among them 10% (52%): wrong answers" in text


def test_style_fractions_come_from_the_texts(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    styles = build_report(tmp_path).teachers["original"].styles
    assert styles["easy"].fraction == pytest.approx(0.75)
    assert styles["hard"].fraction == pytest.approx(0.25)
    assert styles["other"].fraction == 0.0 and math.isnan(styles["other"].correct)
    empty = style_fractions([], STYLES)["easy"]
    assert empty.fraction == 0.0 and math.isnan(empty.correct)
    write_report(tmp_path)
    assert "0% / not measured" in (tmp_path / "report.md").read_text()
    assert style_fractions([{"text": "e", "correct": True}], {}) == {}


def test_known_teachers_come_first_and_in_order(tmp_path):
    teachers = {"b": 0.9, "undistillable": 0.9, "a": 0.9, "original": 0.9}
    write_matrix(tmp_path, {"original": 0.5}, teachers=teachers)
    assert list(build_report(tmp_path).teachers) == ["original", "undistillable", "a", "b"]


def test_an_unfinished_matrix_still_reports_what_is_there(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    for name in ("s-original-0", "s-original-1"):
        (tmp_path / name / "summary.json").unlink()
    write_report(tmp_path)
    assert "from distillable" in (tmp_path / "report.md").read_text()


def test_an_empty_matrix_is_no_crash(tmp_path):
    (tmp_path / "matrix.json").write_text('{"title": "", "styles": {}, "cells": []}')
    assert write_report(tmp_path) == ""
    assert (tmp_path / "report.md").read_text().startswith("# Report\n")


def test_runs_that_only_scored_options_do_not_stop_the_report(tmp_path):
    """What phase = "evaluate" with eval.by = "likelihood" logs: neither sampled nor greedy."""
    write_matrix(tmp_path, {"original": 0.5, "undistillable": 0.2})
    accuracies = {"original": 0.5, "undistillable": 0.25}
    add_runs(tmp_path, [({"role": "choices", "teacher": t}, a) for t, a in accuracies.items()])
    generated = ("eval/sampled", "eval/greedy")

    def without_generation(row):
        return None if "loss" in row else {k: v for k, v in row.items() if k not in generated}

    edit_logs(tmp_path, ["choices"], without_generation)
    row = {"mode": "likelihood_sum", "sample": 0, "correct": True, "logp": [-1.0] * 4}
    for run in tmp_path.glob("choices*"):
        lines = (json.dumps(row | {"prompt": i}) + "\n" for i in range(3))
        (run / "predictions/step-3.jsonl").write_text("".join(lines))
    means = "student of original 0.500, student of undistillable 0.250 (chance 0.25)"
    assert means in write_report(tmp_path)
    rows = [r for r in build_report(tmp_path).runs if r.labels["role"] == "choices"]
    assert [set(r.accuracy) for r in rows] == [{"likelihood_sum"}] * 4
    assert {r.accuracy["likelihood_sum"] for r in rows} == {0.5, 0.25}


def test_students_of_a_defended_teacher_are_no_students_of_the_original(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "reflux.trainer.studies.attack_report.draw_figures",
        lambda folder, runs, results: drawn.extend(runs) or {},
    )
    write_matrix(tmp_path, {"original": 0.5})
    labels = {"role": "student", "teacher": "original", "attack": "kd", "defence": "poe"}
    add_runs(tmp_path, [(labels, 0.3)])
    report = build_report(tmp_path)
    assert report.students["kd"]["original"].sampled.mean == pytest.approx(0.5)
    assert drawn and not any("defence" in r.labels for r in drawn)


def test_a_run_without_norms_does_not_hide_one_that_diverged(tmp_path):
    cells = [
        write_run(tmp_path / f"r{seed}", {"role": "student"}, 0.5, 0.5, seed=seed, steps=4)
        for seed in "01"
    ]
    write_cells(tmp_path, cells)

    def edit(row):
        norm = {"grad_norm": 50.0 if row["step"] == 4 else 1.0} if "loss" in row else {}
        return row | norm

    edit_logs(tmp_path, ["r1"], edit)
    quiet, loud = load_finished_runs(tmp_path)
    for rows in ([quiet, loud], [loud, quiet]):
        assert _measured(rows, {})["late_spike"] == pytest.approx(50 / 25.5)
    assert math.isnan(_measured([quiet], {})["late_spike"])


@pytest.mark.parametrize("left", [("greedy",), ()], ids=["eval.samples = 0", "by likelihood"])
@pytest.mark.parametrize("which", ["", "s-undistillable", "t-original"])
def test_runs_without_sampled_accuracy_are_not_measured(tmp_path, which, left):
    """No traceback after all cells have run, and no number."""
    scores = {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}
    write_matrix(tmp_path, scores, start=0.1)
    gone = {f"eval/{m}" for m in ("sampled", "greedy") if m not in left}

    def edit(row):
        row = {k: v for k, v in row.items() if k not in gone}
        return row | ({"eval/likelihood_sum": 0.5} if row.get("event") == "eval" else {})

    edit_logs(tmp_path, [which], edit)
    for file in tmp_path.glob(f"{which}*/predictions/*.jsonl"):
        rows = map(json.loads, file.read_text().splitlines())
        file.write_text("".join(json.dumps(r) + "\n" for r in rows if r["mode"] in left))
    report = build_report(tmp_path)
    text = write_report(tmp_path)
    if which == "t-original":
        assert "accuracy INCONCLUSIVE within 2 points (sampled not measured, " in text
    else:
        assert report.students["kd"]["undistillable"].sampled.n == 0
        assert "kd: answers found not measured, without sampled answers (eval.samples)" in text
    for draw in (student_bars, student_curves):
        draw(load_finished_runs(tmp_path), report)


def test_runs_that_would_count_as_two_seeds_are_refused(tmp_path):
    """One seed and three learning rates under the same labels are no three seeds."""
    write_matrix(tmp_path, {"original": 0.5}, seeds="0")
    add_runs(
        tmp_path, [({"role": "student", "teacher": "original", "attack": "kd"}, 0.6)], seeds="0"
    )
    with pytest.raises(ValueError, match="s-original-0 and student-original-kd-0 stand in one"):
        write_report(tmp_path)


def test_families_have_reports_of_their_own(tmp_path):
    """Two families of three seeds are no six seeds, and each has its own original."""
    write_matrix(tmp_path, {}, teachers={"original": 0.9}, seeds="012")  # of both families
    rows = [
        ({"role": "student", "teacher": t, "attack": "kd", "family": f}, accuracy)
        for f, scores in (("q 3", (0.4, 0.1)), ("g", (0.8, 0.7)))
        for t, accuracy in zip(("original", "undistillable"), scores)
    ]
    add_runs(tmp_path, rows, seeds="012")
    text = write_report(tmp_path)
    assert text.index("family q 3:") < text.index("kd -75%") < text.index("family g:")
    for folder, changes in (("report-q_3", -0.75), ("report-g", -0.125)):
        saved = json.loads((tmp_path / folder / "report.json").read_text())
        change = saved["students"]["kd"]["undistillable"]["change"]["sampled"]
        assert change["n"] == 3 and change["mean"] == pytest.approx(changes)
        assert saved["teachers"]["original"]["sampled"]["n"] == 3
        assert (tmp_path / folder / "report.md").exists()
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_grader_that_gives_rewards_has_a_report(tmp_path, shift):
    """`correct` is null: means are of rewards, and nothing is said of correct answers."""
    write_matrix(tmp_path, {"original": 0.8, "undistillable": 0.2}, seeds="012", start=0.1)

    def reward(p):
        return p | {"correct": None, "extracted": None, "reward": float(p["correct"]) + shift}

    def shifted(row):
        return row | {k: row[k] + shift for k in ("eval/sampled", "eval/greedy") if k in row}

    for file in tmp_path.glob("*/predictions/*.jsonl"):
        write_lines(file, [reward(json.loads(line)) for line in file.read_text().splitlines()])
    edit_logs(tmp_path, [""], shifted)
    text = write_report(tmp_path)
    assert "kd: answers found not measured, for the grader gives rewards" in text
    report = build_report(tmp_path)
    teacher, protected = report.teachers["distillable"], report.students["kd"]["undistillable"]
    assert teacher.difference.sampled_items.mean == pytest.approx(0.01)
    assert protected.score.mean == pytest.approx((0.2 - 0.1) / (0.8 - 0.1))
    assert math.isnan(protected.answered) and math.isnan(protected.styles["easy"].correct)
    assert protected.change.sampled.n == (0 if shift else 3), "rewards below 0 have no ratios"
    assert any("gives rewards and knows no correct answers" in w for w in report.warnings)
    assert "75% / not measured" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("log", ["", '{"schema": 1, "confi', None])
def test_a_cell_that_was_killed_before_its_first_line_costs_no_report(tmp_path, log):
    write_matrix(tmp_path, {"original": 0.8, "undistillable": 0.2}, seeds="012")
    (tmp_path / "s-original-2" / "summary.json").unlink()
    if log is None:
        (tmp_path / "s-original-2" / "run.jsonl").unlink()
    else:
        (tmp_path / "s-original-2" / "run.jsonl").write_text(log)
    report = build_report(tmp_path)
    assert report.students["kd"]["original"].sampled.n == 2
    named = any(w.startswith("s-original-2: not in the report") for w in report.warnings)
    assert named is (log is not None)
