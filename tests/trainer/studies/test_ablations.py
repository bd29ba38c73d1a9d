"""The table of ablations from runs whose numbers are known."""

import json

import pytest
from report_runs import write_run

from reflux.trainer.studies.ablations import ablation_rows, write_ablations
from reflux.trainer.studies.attack_report import write_report
from reflux.trainer.studies.finished_runs import load_finished_runs

TEACHERS = {"default": 0.9, "joint": 0.91, "gate_none": 0.85}
STUDENTS = {"default": 0.5, "joint": 0.7, "gate_none": 0.4}


def write(folder, names=("joint", "gate_none")):
    cells = []
    for seed, shift in (("0", -0.01), ("1", 0.01), ("2", 0.0)):
        cells.append(
            write_run(
                folder / f"o{seed}", {"role": "teacher", "teacher": "original"}, 0.9, 0.9, seed=seed
            )
        )
        cells.append(
            write_run(
                folder / f"b{seed}", {"role": "start", "student": "student"}, 0.1, 0.1, seed=seed
            )
        )
        cells.append(
            write_run(
                folder / f"so{seed}",
                {"role": "student", "teacher": "original", "attack": "seq_kd"},
                0.4,
                0.4,
                seed=seed,
            )
        )
        cells.append(
            write_run(
                folder / f"e{seed}",
                {"role": "teacher", "teacher": "distillable", "eta": "1.0"},
                0.1,
                0.1,
                seed=seed,
            )
        )
        for name in ("default", *names):
            labels = {"teacher": "distillable"} | ({} if name == "default" else {"ablation": name})
            cells.append(
                write_run(
                    folder / f"t{name}{seed}",
                    labels | {"role": "teacher"},
                    TEACHERS[name],
                    0.9,
                    seed=seed,
                )
            )
            for attack in ("seq_kd", "kd"):
                accuracy = (
                    STUDENTS[name] + shift * (name != "default") if attack == "seq_kd" else 0.2
                )
                cells.append(
                    write_run(
                        folder / f"s{name}{attack}{seed}",
                        labels | {"role": "student", "attack": attack},
                        accuracy,
                        0.2,
                        seed=seed,
                    )
                )
    (folder / "matrix.json").write_text(json.dumps({"title": "", "styles": {}, "cells": cells}))
    return folder


def test_rows_are_paired_by_seed(tmp_path):
    rows = ablation_rows(load_finished_runs(write(tmp_path)))
    assert list(rows["distillable"]) == ["default", "joint", "gate_none"]
    joint = rows["distillable"]["joint"]
    assert joint["student"]["mean"] == pytest.approx(0.7) and joint["student"]["n"] == 3
    assert joint["student_gap"]["mean"] == pytest.approx(0.2) and joint["student_gap"][
        "std"
    ] == pytest.approx(0.01)
    assert (
        joint["teacher_gap"]["mean"] == pytest.approx(0.01)
        and joint["kept"]
        and not rows["distillable"]["gate_none"]["kept"]
    )
    assert joint["reference_kl"]["mean"] == pytest.approx(0.02)  # steps 1 to 3 log 0.01, 0.02, 0.03
    # not the sweep's teacher
    assert rows["distillable"]["default"]["teacher_gap"]["mean"] == pytest.approx(0)
    assert (
        rows["undistillable"]["joint"]["student"]["n"] == 0
        and rows["undistillable"]["joint"]["score"] is None
    )
    assert joint["score"]["mean"] == pytest.approx((0.7 - 0.1) / (0.4 - 0.1))


def test_the_files_are_written_and_the_main_report_leaves_ablations_out(tmp_path):
    text = write_ablations(write(tmp_path))
    assert (
        "| joint | +1.0 +- 0.0 | 0.020 +- 0.000 |" in text
        and "| +20.0 +- 1.0 | 2.00 [" in text
        and "| gate_none | -5.0" in text
    )
    assert (tmp_path / "ablations.md").read_text() == text
    assert (
        json.loads((tmp_path / "ablations.json").read_text())["distillable"]["joint"]["kept"]
        is True
    )
    write_report(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert (
        found["students"]["seq_kd"]["distillable"]["sampled"]["n"]
        == 3
        == found["teachers"]["distillable"]["sampled"]["n"]
    )


def test_a_folder_without_ablations_says_so(tmp_path):
    with pytest.raises(ValueError, match="no finished run carries a label ablation"):
        write_ablations(write(tmp_path, ()))
