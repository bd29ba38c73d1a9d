"""The figures of the attack report. A figure is one function, (runs, results) -> matplotlib figure
or None, and one entry in FIGURES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reflux.trainer.runs.plotting import panels, save_figure

from .finished_runs import FinishedRun
from .results import Results, StudentResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 9  # attacks side by side
MAX_CURVES = 6  # panels side by side
COLOURS = {
    "original": "#6b7280",
    "distillable": "#2563eb",
    "undistillable": "#dc2626",
    "task_only": "#d97706",
}
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
        _bars(ax, attacks[start : start + width], teachers, results.students)
        ax.set_xlim(-0.3, width - 0.1)
    axes[0, 0].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0))
    return figure


def _bars(
    ax: Axes,
    attacks: Sequence[str],
    teachers: Sequence[str],
    students: Mapping[str, Mapping[str, StudentResult]],
) -> None:
    width = 0.8 / max(len(teachers), 1)
    for i, teacher in enumerate(teachers):
        cells = [students[a].get(teacher) for a in attacks]
        std = [c.sampled.std if c and c.sampled.n > 1 else 0.0 for c in cells]
        ax.bar(
            [x + i * width for x in range(len(attacks))],
            [c.sampled.mean if c else 0.0 for c in cells],
            width * 0.9,
            yerr=std if any(c and c.sampled.n > 1 for c in cells) else None,
            label=f"from {teacher}",
            color=COLOURS.get(teacher),
            capsize=2,
        )
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(attacks))], attacks, fontsize=8)
    ax.set_ylabel("accuracy, sampled")
    ax.set_ylim(0, 1)


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
                color=COLOURS.get(r.labels["teacher"]),
                alpha=0.8,
                lw=1.2,
                label=r.labels["teacher"] if first_seed else None,
            )
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step")
        ax.ticklabel_format(useOffset=False)
    axes[0, 0].set_ylim(0, 1.05)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
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
        ax.bar(list(teachers), fractions, 0.6, bottom=bottom, label=style)
        bottom = [b + f for b, f in zip(bottom, fractions)]
    ax.set_ylabel("fraction of sampled answers")
    ax.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0))
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
        _curves(ax, (r for r in students if r.labels["attack"] == attack))
        ax.set_title(attack, fontsize=9)
        ax.set_ylim(0, 1)
    for column in axes.T:  # the lowest panel that is in use
        column[max(i for i, ax in enumerate(column) if ax.axison)].set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, sampled")
    handles = {h.get_label(): h for h in axes[0, 0].get_lines()}
    axes[0, 0].legend(handles.values(), handles.keys(), frameon=False, fontsize=8)
    return figure


def _curves(ax: Axes, runs: Iterable[FinishedRun]) -> None:
    for r in runs:
        ax.plot(
            [e["step"] for e in r.evals()],
            [e["eval/sampled"] for e in r.evals()],
            marker="o",
            ms=3,
            lw=1.2,
            color=COLOURS.get(r.labels["teacher"]),
            label=r.labels["teacher"],
        )


# file -> title, drawn by
FIGURES: dict[str, tuple[str, Draw]] = {
    "students.png": ("Student accuracy by attack and teacher", student_bars),
    "calibration.png": ("Calibration: rewards and KL over steps", calibration_curves),
    "styles.png": ("Answer styles of the teachers", teacher_styles),
    "curves.png": ("Students over training", student_curves),
}
