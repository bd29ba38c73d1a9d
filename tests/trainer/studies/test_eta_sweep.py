"""The knob's curve from runs whose numbers are known."""

import json

import pytest
from report_runs import write_run

from reflux.trainer.studies.eta_sweep import knob_points, recommended, render, write_knob
from reflux.trainer.studies.finished_runs import load_finished_runs

# eta -> teacher, student
CURVE = {-1.0: (0.88, 0.1), -0.1: (0.9, 0.48), 0.0: (0.9, 0.5), 0.3: (0.89, 0.7), 3.0: (0.6, 0.9)}


def write(folder, curve=CURVE):
    cells = []
    for seed, shift in (("0", -0.01), ("1", 0.01), ("2", 0.0)):
        cells.append(
            write_run(
                folder / f"o{seed}", {"role": "teacher", "teacher": "original"}, 0.9, 0.9, seed=seed
            )
        )
        for eta, (teacher, student) in curve.items():
            label = {"eta": str(eta), "teacher": f"x {eta}"}
            cells.append(
                write_run(
                    folder / f"t{eta}{seed}",
                    label | {"role": "teacher"},
                    teacher,
                    teacher,
                    seed=seed,
                )
            )
            cells.append(
                write_run(
                    folder / f"s{eta}{seed}",
                    label | {"role": "student", "attack": "kd"},
                    student + shift,
                    student,
                    seed=seed,
                )
            )
    (folder / "matrix.json").write_text(json.dumps({"title": "", "styles": {}, "cells": cells}))
    return folder


def test_points_are_in_order_with_their_estimates(tmp_path):
    points = knob_points(load_finished_runs(write(tmp_path)))
    assert [p["eta"] for p in points] == sorted(CURVE)
    assert [p["student"]["mean"] for p in points] == pytest.approx(
        [CURVE[e][1] for e in sorted(CURVE)]
    )
    assert all(
        p["student"]["n"] == 3 and p["student"]["std"] == pytest.approx(0.01) for p in points
    )
    # steps 1 to 3 log 0.01, 0.02, 0.03
    assert points[0]["reference_kl"]["mean"] == pytest.approx(0.02)
    # 0.6 is far from the original's 0.9
    assert [p["kept"] for p in points] == [True, True, True, True, False]


def test_the_range_needs_a_kept_teacher_and_a_moved_student(tmp_path):
    points = knob_points(load_finished_runs(write(tmp_path)))
    # -0.1: inside its interval; 3: teacher lost
    assert recommended(points) == {"distillable": [0.3], "undistillable": [-1.0]}
    assert recommended([p for p in points if p["eta"]]) == {"distillable": [], "undistillable": []}


def test_the_files_are_written(tmp_path):
    text = write_knob(write(tmp_path))
    assert (
        "| +0.3 | 0.890 +- 0.000 |" in text
        and "undistillable: eta from -1 to -1 moves the student" in text
    )
    assert (tmp_path / "knob.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "knob.md"
    ).read_text() == text
    assert json.loads((tmp_path / "knob.json").read_text())["recommended"]["distillable"] == [0.3]


def test_one_seed_has_no_range(tmp_path):
    points = knob_points(
        [e for e in load_finished_runs(write(tmp_path)) if e.labels["seed"] == "1"]
    )
    assert render(points).count(
        "no range can be said from one seed"
    ) == 2 and "| +0.3 | 0.890 |" in render(points)


def test_a_folder_without_a_sweep_says_so(tmp_path):
    with pytest.raises(ValueError, match="no finished run carries a label eta"):
        write_knob(write(tmp_path, {}))
