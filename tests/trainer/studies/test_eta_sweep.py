"""The sweep over eta from runs whose numbers are known."""

import json
from dataclasses import replace

import pytest
from report_runs import add_runs, write_cells, write_run

from reflux.trainer.studies.eta_sweep import (
    EtaSweep,
    Recommended,
    eta_sweep,
    recommended,
    render,
    write_eta_sweep,
)
from reflux.trainer.studies.finished_runs import load_finished_runs

# eta -> teacher, student
CURVE = {-1.0: (0.88, 0.1), -0.1: (0.9, 0.48), 0.0: (0.9, 0.5), 0.3: (0.89, 0.7), 3.0: (0.6, 0.9)}


def write(folder, curve=CURVE):
    cells = []

    def add(name, labels, sampled, greedy, seed):
        cells.append(write_run(folder / f"{name}{seed}", labels, sampled, greedy, seed=seed))

    for seed, shift in (("0", -0.01), ("1", 0.01), ("2", 0.0)):
        add("o", {"role": "teacher", "teacher": "original"}, 0.9, 0.9, seed)
        for i, (eta, (teacher, student)) in enumerate(curve.items()):
            labels = {"eta": str(eta), "teacher": f"x {eta}"}
            add(f"t{eta}", labels | {"role": "teacher"}, teacher, teacher, seed)
            of_it = labels | {"role": "student", "attack": "kd"}
            # seeds go up under one eta and down under the next, so that no difference is certain
            add(f"s{eta}", of_it, student + shift * (-1) ** i, student, seed)
    write_cells(folder, cells)
    return folder


def test_points_are_in_order_with_their_estimates(tmp_path):
    points = eta_sweep(load_finished_runs(write(tmp_path))).points
    assert [p.eta for p in points] == sorted(CURVE)
    students = [student for _, (_, student) in sorted(CURVE.items())]
    assert [p.student.mean for p in points] == pytest.approx(students)
    assert all(p.student.n == 3 and p.student.std == pytest.approx(0.01) for p in points)
    # steps 1 to 3 log 0.01, 0.02, 0.03
    assert points[0].reference_kl.mean == pytest.approx(0.02)
    # 0.6 is far from the original's 0.9
    assert [p.accuracy_preserved for p in points] == ["holds"] * 4 + ["violated"]


def test_the_range_needs_a_preserved_teacher_and_a_moved_student(tmp_path):
    sweep = eta_sweep(load_finished_runs(write(tmp_path)))
    # -0.1: inside its interval; 3: teacher lost accuracy
    assert sweep.recommended == Recommended(distillable=(0.3,), undistillable=(-1.0,))
    assert recommended([p for p in sweep.points if p.eta]) == Recommended()
    for rule in ("violated", "inconclusive"):
        assert recommended([replace(p, accuracy_preserved=rule) for p in sweep.points]) == (
            Recommended()
        )
    assert sweep.points[1].student_gap.mean == pytest.approx(-0.02)


def test_the_files_are_written(tmp_path):
    text = write_eta_sweep(write(tmp_path))
    assert "| +0.3 | 0.890 +- 0.000 | yes |" in text and "over n = 3 seeds" in text
    assert "\n\nundistillable: eta from -1 to -1 moves the student and preserves" in text
    assert (tmp_path / "eta_sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "eta_sweep.md").read_text() == text
    saved = json.loads((tmp_path / "eta_sweep.json").read_text())
    assert saved["recommended"] == {"distillable": [0.3], "undistillable": [-1.0]}
    assert set(saved["points"][0]) == {
        *(
            "attack",
            "eta",
            "accuracy_preserved",
            "teacher",
            "teacher_gap",
            "student",
            "student_gap",
        ),
        *("reference_kl", "reward"),
    }


@pytest.mark.parametrize("seeds, teacher", [("1", "0.890"), ("02", "0.890 +- 0.000")])
def test_fewer_than_three_seeds_have_no_range(tmp_path, seeds, teacher):
    """The two seeds' interval under eta = 0.3 is above 0."""
    runs = load_finished_runs(write(tmp_path))
    sweep = eta_sweep([r for r in runs if r.labels["seed"] in seeds])
    text = render(sweep)
    assert sweep.recommended == Recommended()
    assert text.count("no range is recommended from fewer than three seeds (A4)") == 2
    assert f"| +0.3 | {teacher} |" in text


def test_students_of_two_seeds_recommend_no_eta(tmp_path):
    runs = load_finished_runs(write(tmp_path))
    kept = [r for r in runs if r.labels["role"] != "student" or r.labels["seed"] != "1"]
    assert eta_sweep(runs).recommended != Recommended() == eta_sweep(kept).recommended


def test_a_range_may_be_empty(tmp_path):
    sweep = eta_sweep(load_finished_runs(write(tmp_path)))
    text = render(EtaSweep(sweep.points, Recommended()))
    assert text.count("no eta here moves the student beyond its interval") == 2


def test_what_was_not_compared_is_no_result(tmp_path):
    """Nothing below 0, and nothing beside the original teacher."""
    runs = load_finished_runs(write(tmp_path))
    above = [r for r in runs if float(r.labels.get("eta", 0)) >= 0]
    text = render(eta_sweep(above))
    assert "undistillable: not measured: no eta here has a student beside one at eta = 0" in text
    assert "\ndistillable: eta from +0.3 to +0.3 moves the student" in text
    for missing in ({"teacher": "original"}, {"eta": "0.0"}):
        left = [r for r in runs if missing.items() - r.labels.items()]
        assert render(eta_sweep(left)).count("not measured: no eta here has") == 2
    alone = [r for r in runs if r.labels.get("teacher") != "original"]
    assert "| not measured |" in render(eta_sweep(alone))


def test_a_range_names_no_eta_that_failed_inside_it(tmp_path):
    curve = {0.0: (0.9, 0.5), 0.1: (0.9, 0.7), 0.3: (0.6, 0.8), 1.0: (0.9, 0.9)}
    text = render(eta_sweep(load_finished_runs(write(tmp_path, curve))))
    assert "distillable: eta of +0.1, +1, not of all between them, moves the student" in text


def test_teachers_alone_are_counted_too(tmp_path):
    runs = [r for r in load_finished_runs(write(tmp_path)) if r.labels["role"] == "teacher"]
    assert "over n = 3 seeds" in render(eta_sweep(runs))


def test_a_folder_without_a_sweep_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no finished run carries a label eta"):
        write_eta_sweep(write(tmp_path, {}))


def test_each_attack_is_a_sweep_of_its_own(tmp_path):
    """One attack is moved by eta, the other not, and both have three seeds."""
    write(tmp_path, {0.0: (0.9, 0.3), 1.0: (0.9, 0.6)})
    moved = {0.0: 0.8, 1.0: 0.8}
    more = [
        ({"role": "student", "teacher": "x", "attack": "seq_kd", "eta": str(eta)}, accuracy)
        for eta, accuracy in moved.items()
    ]
    add_runs(tmp_path, more, seeds="012")
    text = write_eta_sweep(tmp_path)
    saved = json.loads((tmp_path / "eta_sweep.json").read_text())
    points = saved["points"]
    assert [(p["attack"], p["eta"], p["student"]["n"]) for p in points] == [
        *(("seq_kd", 0.0, 3), ("seq_kd", 1.0, 3), ("kd", 0.0, 3), ("kd", 1.0, 3)),
    ]
    assert saved["recommended"] == {"distillable": [], "undistillable": []}, "not by every attack"
    assert "| +1 | kd | 0.900 +- 0.000 |" in text and "| eta | attack | teacher" in text
    assert "\ndistillable, by kd: eta from +1 to +1 moves the student" in text
    assert "\ndistillable, by seq_kd: no eta here moves the student" in text
