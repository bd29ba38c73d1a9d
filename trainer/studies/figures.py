"""The figures of the attack report. A figure is one function, (runs, results) -> matplotlib figure
or None, and one entry in FIGURES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.trainer.runs.plotting import (
    TEACHERS,
    draw_missing,
    draw_rule,
    draw_seeds,
    legend,
    panels,
    readable,
    save_figure,
)

from .finished_runs import FinishedRun
from .results import Results, StudentResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 9  # attacks side by side
MAX_CURVES = 6  # panels side by side
OPTION = re.compile(r"eval/\w+_at_(\d+)")  # accuracy where the correct option is the n-th
CALIBRATION = {  # field of the log -> title
    "reward/task": "task reward",
    "reward/cal": "calibration reward, nats",
    "reference_kl": "KL to original, nats/token",
    "length": "response length, tokens",
}

Draw = Callable[[Sequence[FinishedRun], Results], "Figure | None"]


def draw_figures(folder: Path, runs: Sequence[FinishedRun], results: Results) -> dict[str, str]:
    """Writes the figures that there are results for; file -> title."""
    made = {}
    for name, (title, draw) in FIGURES.items():
        figure = draw(runs, results)
        if figure is not None:
            save_figure(figure, folder / name)
            made[name] = title
    return made


def student_bars(runs: Sequence[FinishedRun], results: Results) -> Figure | None:
    attacks, teachers = list(results.students), list(results.teachers)
    if not attacks:
        return None
    rows = -(-len(attacks) // MAX_BARS)
    width = -(-len(attacks) // rows)  # as evenly as it goes
    figure, axes = panels(1, rows, width=max(6.0, 1.6 * width))
    for ax, start in zip(axes[:, 0], range(0, len(attacks), width)):
        ax.set_ylim(0, 1)
        _rules(ax, runs, results)
        _bars(ax, attacks[start : start + width], teachers, results.students, runs)
        ax.set_xlim(-0.3, width - 0.1)
    legend(axes[0, 0], bbox_to_anchor=(1.0, 1.0))
    return figure


def _rules(ax: Axes, runs: Sequence[FinishedRun], results: Results) -> None:
    """What a student starts from, what guessing gives, and the original teacher itself."""
    students = [r for r in runs if r.labels["role"] == "student"]
    if "original" in results.teachers:
        draw_rule(ax, results.teachers["original"].sampled.mean, "original teacher")
    if begun := started_at(students):
        draw_rule(ax, sum(begun) / len(begun), "students at the start", ":")
    if (guessed := chance(students)) is not None:
        draw_rule(ax, guessed, "chance", "-.")


def started_at(runs: Iterable[FinishedRun]) -> list[float]:
    """Sampled accuracies of step 0, of the runs that were evaluated there."""
    firsts = [r.evals()[0] for r in runs if r.evals()]
    return [e["eval/sampled"] for e in firsts if e["step"] == 0 and "eval/sampled" in e]


def chance(runs: Iterable[FinishedRun]) -> float | None:
    """1 / options of a multiple-choice task, by the positions that the log names; None where
    answers are free.
    """
    named = (OPTION.fullmatch(key) for r in runs for e in r.evals()[:1] for key in e)
    positions = [int(m[1]) for m in named if m]
    return 1 / max(positions) if positions else None


def _bars(
    ax: Axes,
    attacks: Sequence[str],
    teachers: Sequence[str],
    students: Mapping[str, Mapping[str, StudentResult]],
    runs: Sequence[FinishedRun],
) -> None:
    """A bar for each teacher with its standard deviation, seeds as points; hatched where there is
    no student.
    """
    width = 0.8 / max(len(teachers), 1)
    for i, teacher in enumerate(teachers):
        style: dict[str, Any] = {
            "label": f"from {readable(teacher)}",
            "color": TEACHERS.get(teacher),
        }
        for x, attack in enumerate(attacks):
            place, cell = x + i * width, students[attack].get(teacher)
            if cell is None or not cell.sampled.n:
                draw_missing(ax, place, 0.9 * width)
                continue
            std = cell.sampled.std if cell.sampled.n > 1 else None
            ax.bar(place, cell.sampled.mean, 0.9 * width, yerr=std, capsize=2, **style)
            style.pop("label", None)  # once in the legend
            draw_seeds(ax, place, _of_seeds(runs, attack, teacher), 0.4 * width)
    names = [readable(a) for a in attacks]
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(attacks))], names, fontsize=8)
    ax.set_ylabel("accuracy, sampled")


def _of_seeds(runs: Sequence[FinishedRun], attack: str, teacher: str) -> list[float]:
    wanted = {"role": "student", "attack": attack, "teacher": teacher}
    return [r.accuracy("sampled") for r in runs if wanted.items() <= r.labels.items()]


def calibration_curves(runs: Sequence[FinishedRun], results: Results) -> Figure | None:
    teachers = [
        r
        for r in runs
        if r.labels["role"] == "teacher" and any("reference_kl" in s for s in r.run.steps)
    ]
    if not teachers:
        return None
    figure, axes = panels(len(CALIBRATION), width=3.6)
    for ax, (key, title) in zip(axes[0], CALIBRATION.items()):
        for r in teachers:
            first_seed = r.labels["seed"] == teachers[0].labels["seed"]
            steps = [s for s in r.run.steps if key in s]
            ax.plot(
                [s["step"] for s in steps],
                [s[key] for s in steps],
                color=TEACHERS.get(r.labels["teacher"]),
                alpha=0.8,
                lw=1.2,
                label=readable(r.labels["teacher"]) if first_seed else None,
            )
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.ticklabel_format(useOffset=False)
    axes[0, 0].set_ylim(0, 1.05)
    legend(axes[0, 0], loc="lower left")
    return figure


def teacher_styles(runs: Sequence[FinishedRun], results: Results) -> Figure | None:
    teachers = results.teachers
    styles = list(next(iter(teachers.values())).styles) if teachers else []
    if not styles:
        return None
    figure, axes = panels(1, width=1.6 * max(len(teachers), 3))
    ax, bottom = axes[0, 0], [0.0] * len(teachers)
    for style in styles:
        fractions = [t.styles[style].fraction for t in teachers.values()]
        names = [readable(t) for t in teachers]
        ax.bar(names, fractions, 0.6, bottom=bottom, label=readable(style))
        bottom = [b + f for b, f in zip(bottom, fractions)]
    ax.set_ylabel("fraction of sampled answers")
    legend(ax, bbox_to_anchor=(1.0, 1.0))
    return figure


def student_curves(runs: Sequence[FinishedRun], results: Results) -> Figure | None:
    students = [r for r in runs if r.labels["role"] == "student" and len(r.evals()) > 1]
    attacks = list(dict.fromkeys(r.labels["attack"] for r in students))
    if not attacks:
        return None
    columns = min(len(attacks), MAX_CURVES)
    figure, axes = panels(columns, -(-len(attacks) // columns), width=3.4)
    for ax in axes.flat[len(attacks) :]:
        ax.set_axis_off()
    for ax, attack in zip(axes.flat, attacks):
        mine = [r for r in students if r.labels["attack"] == attack]
        _curves(ax, mine)
        ax.set_title(readable(attack).replace("\n", " "))
        ax.set_ylim(0, 1)
    for column in axes.T:  # the lowest panel that is in use
        column[max(i for i, ax in enumerate(column) if ax.axison)].set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, sampled")
    handles = {h.get_label(): h for h in axes[0, 0].get_lines()}
    axes[0, 0].legend(handles.values(), handles.keys())
    return figure


def _curves(ax: Axes, runs: Iterable[FinishedRun]) -> None:
    for r in runs:
        ax.plot(
            [e["step"] for e in r.evals()],
            [e["eval/sampled"] for e in r.evals()],
            marker="o",
            ms=3,
            lw=1.2,
            color=TEACHERS.get(r.labels["teacher"]),
            label=readable(r.labels["teacher"]),
        )


# file -> title, drawn by
FIGURES: dict[str, tuple[str, Draw]] = {
    "students.png": ("Student accuracy by attack and teacher", student_bars),
    "calibration.png": ("Calibration: rewards and KL over steps", calibration_curves),
    "styles.png": ("Answer styles of the teachers", teacher_styles),
    "curves.png": ("Students over training", student_curves),
}
