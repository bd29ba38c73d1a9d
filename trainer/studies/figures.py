"""The figures of the attack report. A figure is one function, (runs, results) -> matplotlib figure
or None, and one entry in FIGURES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.trainer.runs.plotting import (
    TEACHERS,
    ReferenceLine,
    draw_line,
    draw_missing,
    draw_seeds,
    legend,
    panels,
    readable,
    save_figure,
)

from .finished_runs import FinishedRun, with_role
from .results import Results, StudentResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 9  # attacks side by side
MAX_CURVES = 6  # panels side by side
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


@dataclass(frozen=True)
class Bar:
    """The students of one teacher under one attack. seeds: accuracy of each, where known."""

    mean: float
    std: float | None = None  # over seeds
    seeds: Sequence[float] = ()


def student_bars(runs: Sequence[FinishedRun], results: Results) -> Figure | None:
    cells = {
        attack: {t: _bar(runs, attack, t, of_attack.get(t)) for t in results.teachers}
        for attack, of_attack in results.students.items()
    }
    return bars_figure(cells, _rules(runs, results)) if cells else None


def _bar(
    runs: Sequence[FinishedRun], attack: str, teacher: str, found: StudentResult | None
) -> Bar | None:
    if found is None or not found.sampled.n:
        return None
    std = found.sampled.std if found.sampled.n > 1 else None
    return Bar(found.sampled.mean, std, _of_seeds(runs, attack, teacher))


def bars_figure(
    cells: Mapping[str, Mapping[str, Bar | None]], rules: Sequence[ReferenceLine]
) -> Figure:
    """Groups of bars, one for each teacher, at most MAX_BARS groups side by side. cells: attack ->
    teacher -> its bar, None where there is no student.
    """
    attacks, rows = list(cells), -(-len(cells) // MAX_BARS)
    width = -(-len(attacks) // rows)  # as evenly as it goes
    figure, axes = panels(1, rows, width=max(6.0, 1.6 * width))
    for ax, start in zip(axes[:, 0], range(0, len(attacks), width)):
        ax.set_ylim(0, 1.02)
        for rule in rules:
            draw_line(ax, rule)
        _bars(ax, {a: cells[a] for a in attacks[start : start + width]})
        ax.set_xlim(-0.3, width - 0.1)
    legend(axes[0, 0], bbox_to_anchor=(1.0, 1.0))
    return figure


def _rules(runs: Sequence[FinishedRun], results: Results) -> list[ReferenceLine]:
    """What a student starts from, what guessing gives, and the original teacher itself."""
    students, rules = [r for r in runs if r.labels["role"] == "student"], []
    original = results.teachers.get("original")
    if original is not None and original.sampled.n:
        rules.append(ReferenceLine(original.sampled.mean, "original teacher"))
    if begun := started_at(students):
        rules.append(ReferenceLine(sum(begun) / len(begun), "students at the start", ":"))
    if (guessed := chance(students)) is not None:
        rules.append(ReferenceLine(guessed, "chance", "-."))
    return rules


def started_at(runs: Iterable[FinishedRun]) -> list[float]:
    """Sampled accuracies of step 0, of the runs that were evaluated there."""
    firsts = [r.evals()[0] for r in runs if r.evals()]
    return [e["eval/sampled"] for e in firsts if e["step"] == 0 and "eval/sampled" in e]


def chance(runs: Iterable[FinishedRun]) -> float | None:
    """What blind choices among a prompt's options get, as the logs have it, the mean over runs;
    None where answers are free.
    """
    known = [e["eval/chance"] for r in runs for e in r.evals()[-1:] if "eval/chance" in e]
    return sum(known) / len(known) if known else None


def _bars(ax: Axes, cells: Mapping[str, Mapping[str, Bar | None]]) -> None:
    """A bar for each teacher with its standard deviation, seeds as points; hatched where there is
    no student.
    """
    teachers = list(dict.fromkeys(t for of_attack in cells.values() for t in of_attack))
    width = 0.8 / max(len(teachers), 1)
    for i, teacher in enumerate(teachers):
        style: dict[str, Any] = {
            "label": f"from {readable(teacher)}",
            "color": TEACHERS.get(teacher),
        }
        for x, of_attack in enumerate(cells.values()):
            place, bar = x + i * width, of_attack.get(teacher)
            if bar is None:
                draw_missing(ax, place, 0.9 * width)
                continue
            ax.bar(place, bar.mean, 0.9 * width, yerr=bar.std, capsize=2, **style)
            style.pop("label", None)  # once in the legend
            draw_seeds(ax, place, bar.seeds, 0.4 * width)
    names = [readable(a) for a in cells]
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(cells))], names, fontsize=8)
    ax.set_ylabel("accuracy, sampled")


def _of_seeds(runs: Sequence[FinishedRun], attack: str, teacher: str) -> list[float]:
    wanted = {"role": "student", "attack": attack, "teacher": teacher}
    mine = (r for r in runs if wanted.items() <= r.labels.items())
    return [r.accuracy("sampled") for r in mine if r.measures("sampled")]


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
    fractions = {
        teacher: {style: part.fraction for style, part in found.styles.items()}
        for teacher, found in results.teachers.items()
    }
    return styles_figure(fractions) if any(fractions.values()) else None


def styles_figure(fractions: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars; fractions: teacher -> style -> part of its sampled answers."""
    figure, axes = panels(1, width=1.6 * max(len(fractions), 3))
    ax, bottom = axes[0, 0], [0.0] * len(fractions)
    for style in next(iter(fractions.values())):
        parts = [of_teacher[style] for of_teacher in fractions.values()]
        ax.bar([readable(t) for t in fractions], parts, 0.6, bottom=bottom, label=readable(style))
        bottom = [b + f for b, f in zip(bottom, parts)]
    ax.set_ylabel("fraction of sampled answers")
    legend(ax, bbox_to_anchor=(1.0, 1.0))
    return figure


def student_curves(runs: Sequence[FinishedRun], results: Results) -> Figure | None:
    students = [r for r in with_role(runs, "student") if len(r.evals()) > 1]
    students = [r for r in students if r.measures("sampled")]
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
            *zip(*[(e["step"], e["eval/sampled"]) for e in r.evals() if "eval/sampled" in e]),
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
