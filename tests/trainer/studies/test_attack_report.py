import json

import pytest
from report_runs import STYLES, write_matrix

from reflux.trainer.studies.attack_report import summarise, verdict, write_report
from reflux.trainer.studies.render import render


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """They take seconds; one test draws them."""
    if request.function is not test_the_claims_hold_when_the_numbers_say_so:
        monkeypatch.setattr("reflux.trainer.studies.attack_report.plot_all", lambda *_: {})


def test_the_claims_hold_when_the_numbers_say_so(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    text = write_report(tmp_path)
    assert (
        "teacher distillable: accuracy kept" in text
        and "teacher undistillable: accuracy kept" in text
    )
    assert (
        "1 of 1 attacks (kd +20%)" in text
        and "1 of 1 attacks (kd -60%)" in text
        and "eta = 0" not in text
    )
    assert "kd: answers found 100%" in text and "wrong answers, not missing ones" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["students"]["kd"]["distillable"]["change"]["sampled"]["mean"] == pytest.approx(
        0.2
    )
    assert report["teachers"]["distillable"]["difference"]["sampled"]["mean"] == pytest.approx(0.01)
    # both seeds' items
    assert report["teachers"]["distillable"]["difference"]["sampled"]["n"] == 200
    assert {
        "role": "student",
        "teacher": "distillable",
        "attack": "kd",
        "seed": "1",
        "sampled": 0.6,
        "greedy": 0.6,
        "reference_kl": 0.03,
        "seconds": 10.0,
    } in report["runs"]
    markdown = (tmp_path / "report.md").read_text()
    assert "0.600 +- 0.000 (+20%)" in markdown and "c0ffee" in markdown
    for name in report["plots"]:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and name in markdown
    assert set(report["plots"]) == {"students.png", "calibration.png", "styles.png", "curves.png"}


def test_a_teacher_that_lost_accuracy_and_an_attack_that_got_through_are_named(tmp_path):
    write_matrix(
        tmp_path,
        {"original": 0.5, "distillable": 0.52, "undistillable": 0.45},
        teachers={"original": 0.9, "distillable": 0.9, "undistillable": 0.8},
    )
    text = write_report(tmp_path)
    assert "teacher undistillable: accuracy NOT kept" in text
    assert (
        "0 of 1 attacks" in text
        and "not reached: kd +4%" in text
        and "not stopped: kd -10%" in text
    )


def test_distillability_is_the_share_of_the_originals_gain(tmp_path):
    """Start 0.2, original 0.6: 0.4 gained. distillable 0.8: 1.5 times that; undistillable 0.1: it
    cost the student a quarter of it.
    """
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    text = write_report(tmp_path)
    kd = json.loads((tmp_path / "report.json").read_text())["students"]["kd"]
    assert kd["distillable"]["score"]["mean"] == pytest.approx(1.5) and kd["undistillable"][
        "score"
    ]["mean"] == pytest.approx(-0.25)
    assert (
        kd["distillable"]["score"]["low"] < 1.5 < kd["distillable"]["score"]["high"]
        and kd["distillable"]["score"]["n"] == 200
    )
    assert (
        "distillability of the undistillable teacher, the attack that gained most: kd, -0.25 ["
        in text
    )


def edit_logs(folder, names, edit):
    """`edit` on each line of the logs whose folder begins so; lines it returns None for go, lists
    come in place.
    """
    for log in (p for name in names for p in folder.glob(f"{name}*/run.jsonl")):
        rows = [edit(json.loads(line)) for line in log.read_text().splitlines()]
        flat = [x for r in rows if r is not None for x in (r if isinstance(r, list) else [r])]
        log.write_text("".join(json.dumps(x) + "\n" for x in flat))


def with_an_earlier_checkpoint(accuracy):
    def edit(row):
        earlier = {
            "event": "eval",
            "step": 2,
            "wall_s": 2,
            "eval/sampled": accuracy,
            "eval/greedy": accuracy,
        }
        return [earlier, row] if row.get("event") == "eval" and row["step"] == 3 else row

    return edit


def test_an_attacker_who_stops_early_is_judged_by_its_best_checkpoint(tmp_path):
    """Last: 0.2 of 0.5, stopped. Best: 0.4 of 0.5, not stopped. What was evaluated before the
    attack (0.1) is no checkpoint of it.
    """
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.05})
    text = write_report(tmp_path)
    kd = json.loads((tmp_path / "report.json").read_text())["students"]["kd"]
    assert (
        kd["undistillable"]["best"]["mean"] == pytest.approx(0.05)
        and "None got through." in (tmp_path / "report.md").read_text()
    )
    assert (
        "best checkpoint (the attacker stops early), <= -50% of the original's: 1 of 1 attacks (kd "
        "-90%)" in text
    )
    edit_logs(tmp_path, ["s-undistillable"], with_an_earlier_checkpoint(0.4))
    text = write_report(tmp_path)
    kd = json.loads((tmp_path / "report.json").read_text())["students"]["kd"]
    assert kd["undistillable"]["best"]["mean"] == pytest.approx(0.4) and kd["undistillable"][
        "change"
    ]["best"]["mean"] == pytest.approx(-0.2)
    assert kd["undistillable"]["change"]["sampled"]["mean"] == pytest.approx(-0.9)
    assert (
        "<= -50% of the original's: 1 of 1 attacks (kd -90%)" in text
        and "not stopped early: kd -20%" in text
    )
    markdown = (tmp_path / "report.md").read_text()
    assert (
        "Got through: kd (0.400 against 0.500 from the original, with its best checkpoint)."
        in markdown
    )
    assert "Of 1 attacks on it 0 were stopped" in markdown and "0.400 +- 0.000 (-20%)" in markdown


def test_the_conclusion_names_who_got_through_and_what_the_teacher_paid(tmp_path):
    write_matrix(
        tmp_path,
        {"original": 0.5, "distillable": 0.52, "undistillable": 0.45},
        teachers={"original": 0.9, "distillable": 0.9, "undistillable": 0.8},
    )
    write_report(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["conclusion"].startswith(
        "The undistillable teacher lost accuracy itself. Of 1 attacks on it 0 were stopped"
    )
    assert "Got through: kd (0.450 against 0.500 from the original)." in found["conclusion"]
    assert (
        "at least 15% more than the original under 0 of 1 attacks; not under kd."
        in found["conclusion"]
        and "One seed" not in found["conclusion"]
    )
    cells = json.loads((tmp_path / "matrix.json").read_text())
    cells["cells"] = [c for c in cells["cells"] if c["labels"]["seed"] == "0"]
    (tmp_path / "matrix.json").write_text(json.dumps(cells))
    write_report(tmp_path)
    assert "One seed: nothing here has a spread" in (tmp_path / "report.md").read_text()


def test_a_student_of_random_weights_starts_at_nothing(tmp_path):
    """D = 0.3 / 0.6, without any run to start from."""
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.6, "undistillable": 0.3})
    edit_logs(
        tmp_path,
        ["s-"],
        lambda row: row | {"config": {"model": {"from_scratch": True}}} if "schema" in row else row,
    )
    text = write_report(tmp_path)
    kd = json.loads((tmp_path / "report.json").read_text())["students"]["kd"]
    assert kd["undistillable"]["score"]["mean"] == pytest.approx(0.5) and kd["distillable"][
        "score"
    ]["mean"] == pytest.approx(1.0)
    assert "the attack that gained most: kd, 0.50 [" in text


def test_a_student_that_was_evaluated_before_the_attack_starts_there(tmp_path):
    """Step 0 of its own run: 0.2. D = (0.3 - 0.2) / (0.6 - 0.2)."""
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.3})
    for run in tmp_path.glob("s-*"):
        rows = [
            {
                "mode": "sampled",
                "prompt": i,
                "sample": 0,
                "text": "",
                "correct": i < 20,
                "extracted": "x",
            }
            for i in range(100)
        ]
        (run / "predictions/step-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_report(tmp_path)
    kd = json.loads((tmp_path / "report.json").read_text())["students"]["kd"]
    assert kd["undistillable"]["score"]["mean"] == pytest.approx(0.25) and kd["distillable"][
        "score"
    ]["mean"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    "late, words",
    [
        (5.0, "none diverged (largest gradient norm in the second half of a run 5.0 times"),
        (50.0, "diverged under kd"),
        (float("nan"), "diverged under kd"),
    ],
)
def test_a_run_that_broke_down_is_no_collapse(tmp_path, late, words):
    """Norms 9, 1, 1, 1, 1, late: what the warm-up does is not asked, and a run without collapse is
    not either.
    """
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    norms = [9.0, 1.0, 1.0, 1.0, 1.0, late]

    def edit(row):
        return (
            [{"step": k + 1, "wall_s": 0, "loss": 1.0, "grad_norm": norms[k]} for k in range(6)]
            if row.get("step") == 1 and "loss" in row
            else None
            if "loss" in row
            else row
        )

    edit_logs(tmp_path, ["s-undistillable"], edit)
    assert words in write_report(tmp_path)
    write_matrix(tmp_path / "other", {"original": 0.5, "distillable": 0.6, "undistillable": 0.5})
    edit_logs(tmp_path / "other", ["s-undistillable"], edit)
    assert "diverged" not in write_report(tmp_path / "other")


def test_distillability_needs_a_gain_to_compare_with(tmp_path):
    write_matrix(tmp_path, {"original": 0.21, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    assert "distillability" not in write_report(tmp_path)
    assert (
        json.loads((tmp_path / "report.json").read_text())["students"]["kd"]["distillable"]["score"]
        is None
    )


def test_missing_answers_are_told_from_wrong_ones(tmp_path):
    write_matrix(
        tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.1}, answered=0.12
    )
    assert "mostly a format failure" in write_report(tmp_path)


def test_style_shares_come_from_the_texts(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2})
    write_report(tmp_path)
    styles = json.loads((tmp_path / "report.json").read_text())["teachers"]["original"]["styles"]
    assert styles["easy"]["share"] == pytest.approx(0.75) and styles["hard"][
        "share"
    ] == pytest.approx(0.25)
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
    write_matrix(
        tmp_path, {"original": 0.4, "task_only": 0.7, "distillable": 0.6, "undistillable": 0.1}
    )
    assert "above the student of the task-only teacher (eta = 0): 0 of 1 attacks" in write_report(
        tmp_path
    )


def test_less_than_half_with_a_spread_that_allows_no_change_is_neither_stopped_nor_through(
    tmp_path,
):
    """Original 0.9 and 0.1 over two seeds, undistillable 0.05: -90 % in the mean, and an interval
    over two seeds that holds 0.
    """
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.05})
    for seed, accuracy in (("0", 0.9), ("1", 0.1)):
        edit_logs(
            tmp_path,
            [f"s-original-{seed}"],
            lambda row, a=accuracy: (
                row | {"eval/sampled": a, "eval/greedy": a}
                if row.get("step") == 3 and row.get("event") == "eval"
                else row
            ),
        )
    text = write_report(tmp_path)
    assert "0 of 1 attacks" in text and "not stopped: kd -90% (its interval holds 0)" in text
    said = json.loads((tmp_path / "report.json").read_text())["conclusion"]
    assert (
        "Of 1 attacks on it 0 were stopped" in said
        and "None got through. Less than half, too, but with a spread" in said
    )
    assert "allows no change: kd (0.050 against 0.500 from the original)." in said
