"""Curves of a real language model's runs, from records of bench/language.py (pictures of
bench/figures.py): a line a run, a colour a teacher.
"""

from collections.abc import Callable, Mapping
from typing import Any

from reflux.trainer.runs.plotting import TEACHERS, legend, panels, readable

Line = Mapping[str, Any]  # of a run's curve: the numbers of a step


def _eta(line: Line) -> float:
    """The strength in use: the log says "undistillable 0.295"."""
    return float(str(line["eta"]).rpartition(" ")[2])


def _number(key: str) -> Callable[[Line], float]:
    return lambda line: line[key]


CALIBRATION = {  # title -> number of a step
    "calibration reward, nats a text": _number("reward/cal"),
    "KL to the original, nats/token": _number("reference_kl"),
    "|eta| in use": _eta,
}
STUDENTS = {"loss, nats/token": _number("loss")}


def calibrations(record: Mapping[str, Any]) -> Any:
    return _curves(record, CALIBRATION, lambda run: run.rpartition("-")[2])


def student_losses(record: Mapping[str, Any]) -> Any:
    """Runs are named student-TEACHER-ATTACK."""
    return _curves(record, STUDENTS, lambda run: run.split("-")[-2])


def _curves(
    record: Mapping[str, Any],
    columns: Mapping[str, Callable[[Line], float]],
    teacher_of: Callable[[str], str],
) -> Any:
    """ValueError for a run of no known teacher."""
    figure, axes = panels(len(columns), width=3.6)
    for run in record["runs"]:
        teacher = teacher_of(run["run"])
        if teacher not in TEACHERS:
            raise ValueError(f"run {run['run']!r}: teacher {teacher!r}; want {', '.join(TEACHERS)}")
        for ax, number in zip(axes[0], columns.values()):
            steps = [line["step"] for line in run["curve"]]
            values = [number(line) for line in run["curve"]]
            ax.plot(steps, values, color=TEACHERS[teacher], alpha=0.8, lw=1.2, label=teacher)
    for ax, title in zip(axes[0], columns):
        ax.set_title(title)
        ax.set_xlabel("step")
    drawn = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1]))  # a name once
    legend(axes[0, 0], handles=[*drawn.values()], labels=[readable(t) for t in drawn])
    return figure
