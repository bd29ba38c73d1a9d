"""Curves of records: a line a run in its teacher's colour, with the record's own numbers."""

import pytest

from bench.language_figures import calibrations, student_losses
from reflux.trainer.runs.plotting import TEACHERS


def line(step, **numbers):
    return {"step": step, **numbers}


def calibration(teacher, seed, eta):
    curve = [
        line(s, eta=f"{teacher} {eta}", **{"reward/cal": -s - seed, "reference_kl": 0.01 * s})
        for s in (1, 2, 3)
    ]
    return {"run": f"seed-{seed}/teacher-{teacher}", "curve": curve}


def test_calibrations_are_drawn_by_seed_and_mode():
    runs = [calibration("distillable", s, 0.5) for s in (1, 2)]
    runs.append(calibration("undistillable", 1, 0.25))
    axes = calibrations({"runs": runs}).axes
    assert [len(ax.lines) for ax in axes] == [3, 3, 3]
    reward, kl, eta = (ax.lines[1] for ax in axes)
    assert list(reward.get_ydata()) == [-3, -4, -5] and list(reward.get_xdata()) == [1, 2, 3]
    assert list(kl.get_ydata()) == [0.01, 0.02, 0.03] and list(eta.get_ydata()) == [0.5] * 3
    assert list(axes[2].lines[2].get_ydata()) == [0.25] * 3
    colours = [x.get_color() for x in axes[0].lines]
    assert colours == [TEACHERS["distillable"]] * 2 + [TEACHERS["undistillable"]]
    named = [t.get_text() for t in axes[0].get_legend().get_texts()]
    assert named == ["distillable", "undistillable"]


def test_losses_of_students_by_teacher_a_panel_an_attack():
    curve = [line(s, loss=1.0 / s) for s in (1, 2)]
    names = ("original-seq_kd", "task_only-seq_kd", "original-whole_student")
    runs = [{"run": f"seed-1/student-{n}", "curve": curve} for n in names]
    first, second = student_losses({"runs": runs}).axes
    assert [x.get_color() for x in first.lines] == [TEACHERS["original"], TEACHERS["task_only"]]
    assert [list(x.get_ydata()) for x in (*first.lines, *second.lines)] == [[1.0, 0.5]] * 3


def test_a_run_of_no_teacher_is_named():
    with pytest.raises(ValueError, match="'start-student'.*want original"):
        calibrations({"runs": [{"run": "start-student", "curve": []}]})
