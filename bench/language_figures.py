"""Curves of a real language model's runs, from records of bench/language.py (pictures of
bench/figures.py): a line a run, a colour a teacher.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from reflux.trainer.runs.plotting import TEACHERS, legend, panels, readable

if TYPE_CHECKING:
    from reflux.trainer.runs.plotting import Axes

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


def calibrations(record: Mapping[str, Any]) -> Any:
    """Runs are named teacher-TEACHER; a panel a number."""
    figure, axes = panels(len(CALIBRATION), width=3.6)
    for ax, (title, number) in zip(axes[0], CALIBRATION.items()):
        for run in record["runs"]:
            _draw(ax, run, run["run"].rpartition("-")[2], number)
        ax.set_title(title)
    _name_once(axes[0, 0])
    return figure


def student_losses(record: Mapping[str, Any]) -> Any:
    """Runs are named student-TEACHER-ATTACK; a panel an attack."""
    names = [run["run"].split("-")[-2:] for run in record["runs"]]
    attacks = list(dict.fromkeys(attack for _, attack in names))
    figure, axes = panels(len(attacks), width=3.6)
    for run, (teacher, attack) in zip(record["runs"], names):
        _draw(axes[0, attacks.index(attack)], run, teacher, _number("loss"))
    for ax, attack in zip(axes[0], attacks):
        ax.set_title(readable(attack).replace("\n", " "))
        ax.set_yscale("log")
    axes[0, 0].set_ylabel("loss, nats/token")
    _name_once(axes[0, 0])
    return figure


def _draw(
    ax: "Axes", run: Mapping[str, Any], teacher: str, number: Callable[[Line], float]
) -> None:
    """ValueError for a run of no known teacher."""
    if teacher not in TEACHERS:
        raise ValueError(f"run {run['run']!r}: teacher {teacher!r}; want {', '.join(TEACHERS)}")
    steps, values = ([f(line) for line in run["curve"]] for f in (_number("step"), number))
    ax.plot(steps, values, color=TEACHERS[teacher], alpha=0.8, lw=1.2, label=teacher)
    ax.set_xlabel("step")


def _name_once(ax: "Axes") -> None:
    drawn = dict(zip(*ax.get_legend_handles_labels()[::-1]))
    legend(ax, handles=[*drawn.values()], labels=[readable(t) for t in drawn])
