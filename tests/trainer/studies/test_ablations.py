"""The table of ablations from runs whose numbers are known."""

import json

import pytest
from report_runs import edit_logs, write_cells, write_run

from reflux.trainer.studies.ablations import ablation_rows, render, write_ablations
from reflux.trainer.studies.attack_report import write_report
from reflux.trainer.studies.finished_runs import load_finished_runs

TEACHERS = {"default": 0.9, "joint": 0.91, "gate_none": 0.85}
STUDENTS = {"default": 0.5, "joint": 0.7, "gate_none": 0.4}


def write(folder, names=("joint", "gate_none")):
    cells = []

    def add(name, labels, sampled, greedy, seed):
        cells.append(write_run(folder / f"{name}{seed}", labels, sampled, greedy, seed=seed))

    for seed, shift in (("0", -0.01), ("1", 0.01), ("2", 0.0)):
        student = {"role": "student", "attack": "seq_kd"}
        add("o", {"role": "teacher", "teacher": "original"}, 0.9, 0.9, seed)
        add("b", {"role": "start", "student": "student"}, 0.1, 0.1, seed)
        add("so", student | {"teacher": "original"}, 0.4, 0.4, seed)
        add("e", {"role": "teacher", "teacher": "distillable", "eta": "1.0"}, 0.1, 0.1, seed)
        for name in ("default", *names):
            labels = {"teacher": "distillable"} | ({} if name == "default" else {"ablation": name})
            add(f"t{name}", labels | {"role": "teacher"}, TEACHERS[name], 0.9, seed)
            accuracy = STUDENTS[name] + shift * (name != "default")
            add(f"s{name}seq_kd", labels | student, accuracy, 0.2, seed)
            add(f"s{name}kd", labels | student | {"attack": "kd"}, 0.2, 0.2, seed)
    write_cells(folder, cells)
    return folder


def test_rows_are_paired_by_seed(tmp_path):
    rows = ablation_rows(load_finished_runs(write(tmp_path)))
    assert list(rows["distillable"]) == ["default", "eta = 0", "joint", "gate_none"]
    default, control, joint, gate_none = rows["distillable"].values()
    assert control.student.n == 0
    assert joint.student.mean == pytest.approx(0.7) and joint.student.n == 3
    assert joint.student_gap.mean == pytest.approx(0.2)
    assert joint.student_gap.std == pytest.approx(0.01)
    assert joint.teacher_gap.mean == pytest.approx(0.01)
    assert (joint.accuracy_preserved, gate_none.accuracy_preserved) == ("holds", "violated")
    assert joint.reference_kl.mean == pytest.approx(0.02)  # steps 1 to 3 log 0.01, 0.02, 0.03
    assert default.teacher_gap.mean == pytest.approx(0)  # not the sweep's teacher
    unmeasured = rows["undistillable"]["joint"]
    assert unmeasured.student.n == 0 and unmeasured.score is None
    assert joint.score.mean == pytest.approx((0.7 - 0.1) / (0.4 - 0.1))


def test_an_ablation_with_the_controls_name_is_an_error(tmp_path):
    folder = write(tmp_path)
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    for cell in cells:
        if cell["labels"].get("ablation") == "joint":
            cell["labels"]["ablation"] = "eta = 0"
    write_cells(folder, cells)
    with pytest.raises(ValueError, match="'eta = 0' is the name of the control's own row"):
        ablation_rows(load_finished_runs(folder))


def joint_length(folder):
    rows = ablation_rows(load_finished_runs(folder))
    return rows["distillable"]["joint"].length.mean


def test_the_files_are_written(tmp_path):
    text = write_ablations(write(tmp_path))
    assert "## distillable\n\n| calibration |" in text and "\n\n## undistillable\n" in text
    assert "| joint | +1.0 [+1.0, +1.0] | 0.020 +- 0.000 |" in text and "n = 3 seeds" in text
    assert "| +20.0 [+17.5, +22.5] | 2.00 [" in text and "| gate_none | -5.0" in text
    assert "| eta = 0 | not run | | | | | | | |" in text
    assert joint_length(tmp_path) == pytest.approx(1.0)  # all texts of the runs have 9 tokens
    assert (tmp_path / "ablations.md").read_text() == text
    saved = json.loads((tmp_path / "ablations.json").read_text())
    assert saved["distillable"]["joint"]["accuracy_preserved"] == "holds"


def test_the_control_is_a_row_and_an_ablation_without_effect_is_none(tmp_path):
    """gate_none with the default's teachers to the last digit: nothing in this world depends on
    it.
    """
    write(tmp_path)
    for seed in "012":
        log = (tmp_path / f"tdefault{seed}/run.jsonl").read_text()
        (tmp_path / f"tgate_none{seed}/run.jsonl").write_text(log)
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    for seed in "012":
        for role, accuracy in (("teacher", 0.9), ("student", 0.4)):
            labels = {"role": role, "teacher": "task_only", "attack": "seq_kd"}
            run = tmp_path / f"control-{role}-{seed}"
            matrix["cells"].append(write_run(run, labels, accuracy, accuracy, seed=seed))
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    text = write_ablations(tmp_path)
    assert (
        "| gate_none |" not in text and "nothing in this world depends on them): gate_none" in text
    )
    # -10 points of the default's 0.5
    assert "| eta = 0 | +0.0 [+0.0, +0.0] |" in text and "| -10.0 [-10.0, -10.0] | 1.00 [" in text


def test_equal_accuracies_alone_are_not_the_same_teacher(tmp_path, monkeypatch):
    """Fractions of a few prompts are equal by chance; lengths that no run has are no number."""
    monkeypatch.setitem(TEACHERS, "gate_none", TEACHERS["default"])
    write(tmp_path)

    def forget(row):
        return {k: v for k, v in row.items() if k not in ("reference_kl", "length")}

    edit_logs(tmp_path, ["t"], forget)
    text = write_ablations(tmp_path)
    assert "| gate_none | +0.0 [+0.0, +0.0] |" in text and "nan" not in text


def test_teachers_alone_are_counted_and_judged_beside_an_original(tmp_path):
    runs = load_finished_runs(write(tmp_path))
    teachers = [r for r in runs if r.labels["role"] == "teacher"]
    assert "over n = 3 seeds" in render(ablation_rows(teachers))
    alone = [r for r in runs if r.labels.get("teacher") != "original"]
    assert "| not measured |" in render(ablation_rows(alone))


def test_the_attack_report_leaves_ablations_out(tmp_path):
    write_report(write(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    student = report["students"]["seq_kd"]["distillable"]
    assert student["sampled"]["n"] == 3 == report["teachers"]["distillable"]["sampled"]["n"]


def test_a_folder_without_ablations_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no finished run carries a label ablation"):
        write_ablations(write(tmp_path, ()))
