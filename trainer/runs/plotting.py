"""Figures of reports; the only file that imports matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = 9  # attacks side by side
COLOURS = {
    "original": "#6b7280",
    "distillable": "#2563eb",
    "undistillable": "#dc2626",
    "task_only": "#d97706",
}


def plot_all(folder: Path, entries: list, found: Mapping[str, Any]) -> dict[str, str]:
    """Writes the plots that the entries allow; file name -> title."""
    made = {}
    for name, title, draw in (
        ("students.png", "Student accuracy by attack and teacher", _students),
        ("calibration.png", "Calibration: rewards and KL over steps", _calibration),
        ("styles.png", "Answer styles of the teachers", _styles),
        ("curves.png", "Students over training", _curves),
    ):
        figure = draw(entries, found)
        if figure is not None:
            save_figure(figure, folder / name)
            made[name] = title
    return made


def panels(
    columns: int, rows: int = 1, width: float = 4.2, height: float = 3.2
) -> "tuple[Figure, np.ndarray]":
    """A figure, and its axes [rows, columns] with light horizontal lines. width, height: of one
    panel, inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    """As the ending of the path says; without the margin."""
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _students(entries: list, found: Mapping[str, Any]):
    attacks, teachers = list(found["students"]), list(found["teachers"])
    if not attacks:
        return None
    rows = -(-len(attacks) // BARS)
    width = -(-len(attacks) // rows)  # as evenly as it goes
    figure, axes = panels(1, rows, width=max(6.0, 1.6 * width))
    for ax, start in zip(axes[:, 0], range(0, len(attacks), width)):
        _bars(ax, attacks[start : start + width], teachers, found["students"])
        ax.set_xlim(-0.3, width - 0.1)
    axes[0, 0].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0))
    return figure


def _bars(ax, attacks: list[str], teachers: list[str], students: Mapping[str, Any]) -> None:
    bar = 0.8 / max(len(teachers), 1)
    for i, teacher in enumerate(teachers):
        cells = [students[a].get(teacher) for a in attacks]
        heights = [c["sampled"]["mean"] if c else 0.0 for c in cells]
        several = any(c and c["sampled"]["n"] > 1 for c in cells)
        spread = (
            [c["sampled"]["std"] if c and c["sampled"]["n"] > 1 else 0.0 for c in cells]
            if several
            else None
        )
        ax.bar(
            [x + i * bar for x in range(len(attacks))],
            heights,
            bar * 0.9,
            yerr=spread,
            label=f"from {teacher}",
            color=COLOURS.get(teacher),
            capsize=2,
        )
    ax.set_xticks([x + 0.4 - bar / 2 for x in range(len(attacks))], attacks, fontsize=8)
    ax.set_ylabel("accuracy, sampled")
    ax.set_ylim(0, 1)


def _calibration(entries: list, found: Mapping[str, Any]):
    runs = [
        e
        for e in entries
        if e.labels["role"] == "teacher" and any("reference_kl" in s for s in e.run.steps)
    ]
    if not runs:
        return None
    panels = {
        "reward/task": "task reward",
        "reward/cal": "calibration reward, nats",
        "reference_kl": "KL to original, nats/token",
        "length": "response length, tokens",
    }
    figure, axes = panels(len(panels), width=3.6)
    for ax, (key, title) in zip(axes[0], panels.items()):
        for e in runs:
            steps = [s for s in e.run.steps if key in s]
            name = e.labels["teacher"]
            ax.plot(
                [s["step"] for s in steps],
                [s[key] for s in steps],
                color=COLOURS.get(name),
                alpha=0.8,
                lw=1.2,
                label=name if e.labels["seed"] == runs[0].labels["seed"] else None,
            )
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step")
        ax.ticklabel_format(useOffset=False)
    axes[0, 0].set_ylim(0, 1.05)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _styles(entries: list, found: Mapping[str, Any]):
    teachers = found["teachers"]
    styles = list(next(iter(teachers.values()))["styles"]) if teachers else []
    if not styles:
        return None
    figure, axes = panels(1, width=1.6 * max(len(teachers), 3))
    ax, bottom = axes[0, 0], [0.0] * len(teachers)
    for style in styles:
        shares = [t["styles"][style]["share"] for t in teachers.values()]
        ax.bar(list(teachers), shares, 0.6, bottom=bottom, label=style)
        bottom = [b + s for b, s in zip(bottom, shares)]
    ax.set_ylabel("share of sampled answers")
    ax.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0))
    return figure


def _curves(entries: list, found: Mapping[str, Any]):
    students = [e for e in entries if e.labels["role"] == "student" and len(e.evals()) > 1]
    attacks = list(dict.fromkeys(e.labels["attack"] for e in students))
    if not attacks:
        return None
    columns = min(len(attacks), 6)
    figure, axes = panels(columns, -(-len(attacks) // columns), width=3.4)
    for ax in axes.flat[len(attacks) :]:
        ax.set_axis_off()
    for ax, attack in zip(axes.flat, attacks):
        for e in (e for e in students if e.labels["attack"] == attack):
            name = e.labels["teacher"]
            ax.plot(
                [v["step"] for v in e.evals()],
                [v["eval/sampled"] for v in e.evals()],
                marker="o",
                ms=3,
                lw=1.2,
                color=COLOURS.get(name),
                label=name,
            )
        ax.set_title(attack, fontsize=9)
        ax.set_ylim(0, 1)
    for column in axes.T:  # the lowest panel that is in use
        column[max(i for i, ax in enumerate(column) if ax.axison)].set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, sampled")
    handles = {h.get_label(): h for h in axes[0, 0].get_lines()}
    axes[0, 0].legend(handles.values(), handles.keys(), frameon=False, fontsize=8)
    return figure
