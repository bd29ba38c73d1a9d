"""Alarms and guards of a matrix's runs, in every report of the matrix."""

import json

import pytest
from report_runs import edit_logs, write_cells, write_matrix, write_run

from reflux.trainer.studies import attack_report, diagnosis_table, eta_sweep
from reflux.trainer.studies.run_warnings import as_markdown, run_warnings

ALARM = {"event": "alarm", "step": 3, "wall_s": 3, "alarm": "truncation", "message": "12% are cut"}
EXPORT = {"event": "export", "step": 3, "wall_s": 3, "folder": "x", "steps": 2}


def add_to_log(folder, names, *events):
    """Behind the line of the last step."""
    edit_logs(
        folder, names, lambda row: [row, *events] if "loss" in row and row["step"] == 3 else row
    )


def stop(folder, name, reason):
    path = folder / name / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stopped": reason}))


def test_each_kind_of_alarm_is_one_line_with_its_runs(tmp_path):
    cells = [write_run(tmp_path / f"r{i}", {"role": "teacher"}, 0.5, 0.5, seed=i) for i in range(8)]
    write_cells(tmp_path, cells)
    assert run_warnings(tmp_path) == () and as_markdown(()) == ""
    add_to_log(tmp_path, ["r1"], ALARM | {"alarm": "no_learning", "message": "nothing is learned"})
    add_to_log(tmp_path, [f"r{i}" for i in range(1, 8)], ALARM)
    (tmp_path / "r7" / "summary.json").unlink()  # it is still at work, or was killed
    stop(tmp_path, "r2", "KL above it")
    stop(tmp_path, "r3", "accuracy fell")
    edit_logs(tmp_path, ["r2"], lambda row: [row, EXPORT] if row.get("alarm") else row)
    where = ", ".join(f"r{i} (step 3)" for i in range(1, 6))
    assert set(run_warnings(tmp_path)) == {
        "r2: a guard ended it; its export holds the accepted weights of step 2: KL above it",
        "r3: a guard ended it: accuracy fell",
        "no_learning in r1 (step 3); nothing is learned",
        f"truncation in {where} and 2 more runs; of the first: 12% are cut",
    }
    assert run_warnings(tmp_path)[0].startswith("r2: a guard"), "guards come first"


def test_a_cell_that_has_just_begun_does_not_cost_the_report(tmp_path):
    cells = [write_run(tmp_path / f"r{i}", {"role": "teacher"}, 0.5, 0.5, seed=i) for i in range(2)]
    write_cells(tmp_path, cells)
    (tmp_path / "r1" / "run.jsonl").write_text("")
    add_to_log(tmp_path, ["r0"], ALARM)
    alarm, unread = run_warnings(tmp_path)
    assert alarm.startswith("truncation in r0")
    assert unread.startswith("r1: not in the report, nor its warnings: ") and "run.jsonl" in unread


@pytest.mark.parametrize("warned", [True, False])
def test_the_attack_report_prints_them(tmp_path, warned):
    write_matrix(tmp_path, {"original": 0.7, "distillable": 0.8, "undistillable": 0.3})
    if warned:
        add_to_log(tmp_path, ["t-distillable-0"], ALARM)
    attack_report.write_report(tmp_path)
    line = "- truncation in t-distillable-0 (step 3); 12% are cut"
    assert (line in (tmp_path / "report.md").read_text()) is warned
    assert ("## Warnings" in (tmp_path / "report.md").read_text()) is warned
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == [line[2:]] * warned


def test_the_other_pages_print_them(tmp_path):
    labels = {"role": "teacher", "teacher": "x", "eta": "0.3", "pair": "p"}
    write_cells(tmp_path, [write_run(tmp_path / "t", labels, 0.9, 0.9)])
    (tmp_path / "t" / "diagnosis.json").write_text('{"verdict": []}')
    add_to_log(tmp_path, ["t"], ALARM)
    for page in (eta_sweep.write_eta_sweep(tmp_path), diagnosis_table.write_diagnoses(tmp_path)):
        assert page.endswith("\n## Warnings\n\n- truncation in t (step 3); 12% are cut\n")
