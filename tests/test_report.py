import json

import pytest

from reflux.trainer.report import render, summarise, verdict, write_report

STYLES = {"easy": "^e", "hard": "^h"}


def write_run(folder, labels, sampled, greedy, answered=1.0, seed="0", steps=3):
    """A finished run whose last evaluation has the given shares of right answers among 100 prompts."""
    folder.mkdir(parents=True)
    lines = [{"schema": 1, "config": {}, "code": {"commit": "c0ffee"}, "versions": {"torch": "2"}}]
    lines += [{"step": s, "wall_s": s, "loss": 1.0 / s, "anchor_kl": 0.01 * s, "reward/task": 0.5, "length": 9} for s in range(1, steps + 1)]
    lines += [{"event": "eval", "step": s, "wall_s": s, "eval/sampled": v, "eval/greedy": greedy}
              for s, v in ((0, 0.1), (steps, sampled))]
    (folder / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "summary.json").write_text(json.dumps({"wall_s": 10.0}))
    (folder / "predictions").mkdir()
    rows = []
    for mode, right in (("sampled", sampled), ("greedy", greedy)):
        for i in range(100):
            has = i < answered * 100
            rows.append({"mode": mode, "prompt": i, "sample": 0, "text": "e" if i % 4 else "h", "correct": has and i < right * 100,
                         "extracted": "x" if has else None})
    (folder / f"predictions/step-{steps}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"name": folder.name, "folder": folder.name, "command": "torchrun ...", "labels": labels | {"seed": seed}}


def write_matrix(folder, scores, answered=1.0, teachers=None, start=None):
    teachers = teachers or {"original": 0.9, "distillable": 0.91, "undistillable": 0.89}
    cells = []
    for seed in "01":
        for name, accuracy in teachers.items():
            cells.append(write_run(folder / f"t-{name}-{seed}", {"role": "teacher", "teacher": name}, accuracy, accuracy, seed=seed))
        begun = {} if start is None else {"start": "student"}
        for name, accuracy in scores.items():
            cells.append(write_run(folder / f"s-{name}-{seed}", {"role": "student", "teacher": name, "attack": "kd"} | begun, accuracy,
                                   accuracy, answered if name == "undistillable" else 1.0, seed=seed))
        if start is not None:
            cells.append(write_run(folder / f"start-{seed}", {"role": "start", "student": "student"}, start, start, seed=seed))
    (folder / "matrix.json").write_text(json.dumps({"title": "T", "styles": STYLES, "cells": cells}))


def test_the_claims_hold_when_the_numbers_say_so(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    text = write_report(tmp_path)
    assert "teacher distillable: accuracy kept" in text and "teacher undistillable: accuracy kept" in text
    assert "1 of 1 attacks (kd +20%)" in text and "1 of 1 attacks (kd -60%)" in text and "eta = 0" not in text
    assert "kd: answers found 100%" in text and "wrong answers, not missing ones" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["students"]["kd"]["distillable"]["change"]["sampled"]["mean"] == pytest.approx(0.2)
    assert report["teachers"]["distillable"]["difference"]["sampled"]["mean"] == pytest.approx(0.01)
    assert report["teachers"]["distillable"]["difference"]["sampled"]["n"] == 200  # both seeds' items
    assert {"role": "student", "teacher": "distillable", "attack": "kd", "seed": "1", "sampled": 0.6, "greedy": 0.6,
            "anchor_kl": 0.03, "seconds": 10.0} in report["runs"]
    markdown = (tmp_path / "report.md").read_text()
    assert "0.600 +- 0.000 (+20%)" in markdown and "c0ffee" in markdown
    for name in report["plots"]:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and name in markdown
    assert set(report["plots"]) == {"students.png", "calibration.png", "styles.png", "curves.png"}


def test_a_teacher_that_lost_accuracy_and_an_attack_that_got_through_are_named(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.52, "undistillable": 0.45},
                 teachers={"original": 0.9, "distillable": 0.9, "undistillable": 0.8})
    text = write_report(tmp_path)
    assert "teacher undistillable: accuracy NOT kept" in text
    assert "0 of 1 attacks" in text and "not reached: kd +4%" in text and "not stopped: kd -10%" in text


def test_distillability_is_the_share_of_the_originals_gain(tmp_path):
    """Start 0.2, original 0.6: 0.4 gained. distillable 0.8: 1.5 times that; undistillable 0.1: it cost the student a quarter of it."""
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    text = write_report(tmp_path)
    kd = json.loads((tmp_path / "report.json").read_text())["students"]["kd"]
    assert kd["distillable"]["score"]["mean"] == pytest.approx(1.5) and kd["undistillable"]["score"]["mean"] == pytest.approx(-0.25)
    assert kd["distillable"]["score"]["low"] < 1.5 < kd["distillable"]["score"]["high"] and kd["distillable"]["score"]["n"] == 200
    assert "distillability of the undistillable teacher, the attack that gained most: kd, -0.25 [" in text


def test_distillability_needs_a_gain_to_compare_with(tmp_path):
    write_matrix(tmp_path, {"original": 0.21, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    assert "distillability" not in write_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["students"]["kd"]["distillable"]["score"] is None


def test_missing_answers_are_told_from_wrong_ones(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.1}, answered=0.12)
    assert "mostly a format failure" in write_report(tmp_path)


def test_style_shares_come_from_the_texts(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    write_report(tmp_path)
    styles = json.loads((tmp_path / "report.json").read_text())["teachers"]["original"]["styles"]
    assert styles["easy"]["share"] == pytest.approx(0.75) and styles["hard"]["share"] == pytest.approx(0.25)
    assert styles["other"]["share"] == 0


def test_an_unfinished_matrix_still_reports_what_is_there(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    for name in ("s-original-0", "s-original-1"):
        (tmp_path / name / "summary.json").unlink()
    write_report(tmp_path)
    assert "from distillable" in (tmp_path / "report.md").read_text()


def test_nothing_at_all_is_no_crash():
    found = summarise([], STYLES)
    assert found["verdict"] == verdict(found) == []
    assert render(found | {"title": "", "plots": {}, "head": {}}).startswith("# Report")


def test_a_gain_that_training_on_the_task_gives_too_is_seen(tmp_path):
    write_matrix(tmp_path, {"original": 0.4, "task_only": 0.7, "distillable": 0.6, "undistillable": 0.1})
    assert "above the student of the task-only teacher (eta = 0): 0 of 1 attacks" in write_report(tmp_path)
