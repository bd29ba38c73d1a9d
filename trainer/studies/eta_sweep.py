"""Teacher and student against signed eta, as one table and one figure of a matrix folder.

    python -m reflux.trainer.studies.eta_sweep FOLDER

for a matrix whose calibrated teachers carry a label `eta`, like configs/eta_sweep.toml. A point is
the teachers of one eta and their students by one attack; eta = 0 is the teacher trained on the task
alone. The recommended range is where the teacher satisfies A1 and the student differs from that at
eta = 0, both by the whole interval of the differences over seeds (docs/method.md, "Acceptance").
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.trainer.runs.files import write_json
from reflux.trainer.runs.markdown_table import (
    mean_and_std,
    points_with_interval,
    render_template,
)
from reflux.trainer.runs.plotting import (
    BLUE,
    ReferenceLine,
    draw_line,
    draw_missing,
    draw_seeds,
    legend,
    panels,
    save_figure,
)
from reflux.trainer.runs.stats import Estimate, over_seeds

from .figures import chance, started_at
from .finished_runs import (
    FinishedRun,
    gap_by_seed,
    labelled,
    last_steps,
    load_finished_runs,
    mean_accuracy,
    with_role,
)
from .labels import ATTACK
from .report_command import print_report
from .results import Rule
from .rules import MIN_SEEDS, enough_seeds
from .run_warnings import as_markdown, run_warnings
from .verdict import A1_WORDS, within_a1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("eta_sweep.md.jinja")
SHOWN = {  # column of the figure -> number of a teacher's run
    "teacher accuracy": "accuracy",
    "KL to original, nats/token": "reference_kl",
    "calibration reward, nats": "reward/cal",
}


@dataclass(frozen=True)
class EtaPoint:
    """One eta and one attack, over seeds."""

    attack: str
    eta: float  # signed: negative for undistillable
    accuracy_preserved: Rule  # A1
    teacher: Estimate  # accuracy
    teacher_gap: Estimate  # minus the original teacher's, paired by seed
    student: Estimate
    student_gap: Estimate  # minus the student's at eta = 0, paired by seed
    reference_kl: Estimate  # of the teacher, nats per token
    reward: Estimate  # its calibration reward, nats


@dataclass(frozen=True)
class Recommended:
    """The etas of each mode that preserve the teacher's accuracy and move the student, by every
    attack of the sweep.
    """

    distillable: tuple[float, ...] = ()
    undistillable: tuple[float, ...] = ()


@dataclass(frozen=True)
class EtaSweep:
    points: tuple[EtaPoint, ...]  # attack by attack, by rising eta
    recommended: Recommended

    def by_attack(self) -> dict[str, list[EtaPoint]]:
        """Sampled text first."""
        attacks = dict.fromkeys(p.attack for p in self.points)
        return {attack: [p for p in self.points if p.attack == attack] for attack in attacks}


def eta_sweep(runs: Sequence[FinishedRun]) -> EtaSweep:
    originals = labelled(with_role(runs, "teacher"), teacher="original")
    of_sweep = [r for r in runs if "eta" in r.labels]
    etas = sorted({float(r.labels["eta"]) for r in of_sweep})
    attacks = {_attack(r) for r in with_role(of_sweep, "student")} or {ATTACK}
    points = tuple(
        _point(runs, originals, eta, attack)
        for attack in sorted(attacks, key=lambda a: (a != ATTACK, a))
        for eta in etas
    )
    return EtaSweep(points, recommended(points))


def _attack(run: FinishedRun) -> str:
    return run.labels.get("attack", ATTACK)


def _at(runs: Sequence[FinishedRun], eta: float) -> list[FinishedRun]:
    return [r for r in runs if float(r.labels.get("eta", "nan")) == eta]


def _students(runs: Sequence[FinishedRun], eta: float, attack: str) -> list[FinishedRun]:
    return [r for r in with_role(_at(runs, eta), "student") if _attack(r) == attack]


def _point(
    runs: Sequence[FinishedRun], originals: Sequence[FinishedRun], eta: float, attack: str
) -> EtaPoint:
    teachers, students = with_role(_at(runs, eta), "teacher"), _students(runs, eta, attack)
    teacher_gap = over_seeds(gap_by_seed(teachers, originals))
    return EtaPoint(
        attack=attack,
        eta=eta,
        accuracy_preserved=within_a1(teacher_gap),
        teacher=mean_accuracy(teachers),
        teacher_gap=teacher_gap,
        student=mean_accuracy(students),
        student_gap=over_seeds(gap_by_seed(students, _students(runs, 0.0, attack))),
        reference_kl=last_steps(teachers, "reference_kl"),
        reward=last_steps(teachers, "reward/cal"),
    )


def recommended(points: Sequence[EtaPoint]) -> Recommended:
    """Empty without a point at eta = 0."""
    if not any(p.eta == 0 for p in points):
        return Recommended()
    left_out = {p.eta for p in points if not _recommends(p)}
    etas = [eta for eta in dict.fromkeys(p.eta for p in points) if eta not in left_out]
    return Recommended(
        distillable=tuple(eta for eta in etas if eta > 0),
        undistillable=tuple(eta for eta in etas if eta < 0),
    )


def _recommends(p: EtaPoint) -> bool:
    moved = p.student_gap.low > 0 if p.eta > 0 else p.student_gap.high < 0
    return p.accuracy_preserved == "holds" and enough_seeds(p.student_gap) and moved


def _range_in_words(points: Sequence[EtaPoint], etas: Sequence[float]) -> str:
    """points: those of one mode; etas: the recommended ones of them."""
    seeds = [min(p.student_gap.n, p.teacher_gap.n) for p in points]
    if not any(seeds):
        return (
            "not measured: no eta here has a student beside one at eta = 0 and a teacher beside "
            "the original"
        )
    if max(seeds) < MIN_SEEDS:
        return "no range is recommended from fewer than three seeds (A4)"
    if not etas:
        return (
            "no eta here moves the student beyond its interval and preserves the teacher's accuracy"
        )
    between = [p.eta for p in points if min(etas) <= p.eta <= max(etas)]
    which = f"from {min(etas):+g} to {max(etas):+g}"
    if len(between) > len(etas):
        which = f"of {', '.join(f'{eta:+g}' for eta in etas)}, not of all between them,"
    return f"eta {which} moves the student and preserves the teacher's accuracy"


def render(sweep: EtaSweep) -> str:
    attacks = sweep.by_attack()
    ranges = {}
    for attack, points in attacks.items():
        found = recommended(points) if len(attacks) > 1 else sweep.recommended
        for mode, sign in (("distillable", 1), ("undistillable", -1)):
            mine = [p for p in points if p.eta * sign > 0]
            title = f"{mode}, by {attack}" if len(attacks) > 1 else mode
            ranges[title] = _range_in_words(mine, getattr(found, mode))
    return render_template(
        TEMPLATE,
        points=sweep.points,
        several=len(attacks) > 1,
        ranges=ranges,
        seeds=max((max(p.student.n, p.teacher.n) for p in sweep.points), default=0),
        mean_and_std=mean_and_std,
        points_of=points_with_interval,
        words=A1_WORDS,
    )


@dataclass(frozen=True)
class Column:
    """One panel of the sweep: an estimate for each eta, and its seeds where they are known."""

    estimates: Sequence[Estimate]
    seeds: Sequence[Sequence[float]] = ()
    is_accuracy: bool = False


def plot(sweep: EtaSweep, path: Path, runs: Sequence[FinishedRun] = ()) -> None:
    """runs: where the seeds of each point come from."""
    attacks = sweep.by_attack()
    points = next(iter(attacks.values()))
    estimates = {
        "teacher accuracy": [p.teacher for p in points],
        "KL to original, nats/token": [p.reference_kl for p in points],
        "calibration reward, nats": [p.reward for p in points],
    }
    columns = {}
    for title, found in estimates.items():
        teachers = [with_role(_at(runs, p.eta), "teacher") for p in points]
        seeds = [_of_seeds(rows, SHOWN[title]) for rows in teachers]
        columns[title] = Column(found, seeds, SHOWN[title] == "accuracy")
    for attack, of_attack in attacks.items():
        title = f"student accuracy, {attack}" if len(attacks) > 1 else "student accuracy"
        seeds = [_of_seeds(_students(runs, p.eta, attack), "accuracy") for p in of_attack]
        columns[title] = Column([p.student for p in of_attack], seeds, True)
    save_figure(sweep_figure([p.eta for p in points], columns, _rules(runs)), path)


def sweep_figure(
    etas: Sequence[float], columns: Mapping[str, Column], rules: Sequence[ReferenceLine]
) -> "Figure":
    """A panel for each column, every eta with its label; rules: of the last panel."""
    figure, axes = panels(len(columns), width=3.6)
    for ax, (title, column) in zip(axes[0], columns.items()):
        if column.is_accuracy:
            ax.set_ylim(0, 1.02)
        _line(ax, etas, column.estimates)
        for x, seeds in enumerate(column.seeds):
            draw_seeds(ax, x, seeds)
        for x in (i for i, e in enumerate(column.estimates) if not e.n):
            draw_missing(ax, x, 0.5, "not measured")
        names = [f"{eta:+g}" if eta else "0" for eta in etas]
        ax.set_xticks(range(len(etas)), names, fontsize=8, rotation=45 * (len(etas) > 5))
        ax.set(xlabel="eta (below 0: undistillable)", title=title)
    for rule in rules:
        draw_line(axes[0, -1], rule)
    if rules:
        legend(axes[0, -1], bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return figure


def _line(ax: "Axes", etas: Sequence[float], estimates: Sequence[Estimate]) -> None:
    """Etas stand side by side at equal distances, so that each has room for its label."""
    means = [e.mean if e.n else math.nan for e in estimates]  # NaN leaves a gap
    std = [e.std if e.n > 1 else 0.0 for e in estimates]
    style: dict[str, Any] = {"marker": "o", "ms": 3, "lw": 1.2, "capsize": 2, "color": BLUE}
    ax.errorbar(range(len(etas)), means, yerr=std, **style)
    if zero := [x for x, eta in enumerate(etas) if eta == 0]:
        ax.axvline(zero[0], color="black", lw=0.6)


def _rules(runs: Sequence[FinishedRun]) -> list[ReferenceLine]:
    students, rules = with_role(runs, "student"), []
    if begun := started_at(students):
        rules.append(ReferenceLine(sum(begun) / len(begun), "at the start", ":"))
    if (guessed := chance(students)) is not None:
        rules.append(ReferenceLine(guessed, "chance", "-."))
    return rules


def _of_seeds(runs: Sequence[FinishedRun], number: str) -> list[float]:
    """accuracy, or a field of the last step that has it."""
    if number == "accuracy":
        return [r.accuracy("sampled") for r in runs if r.measures("sampled")]
    found = ([s[number] for s in r.steps if number in s] for r in runs)
    return [values[-1] for values in found if values]


def write_eta_sweep(folder: Path) -> str:
    """eta_sweep.md, eta_sweep.json and eta_sweep.png in the matrix folder; returns the page.
    ValueError without a label eta.
    """
    folder = Path(folder)
    runs = load_finished_runs(folder)
    sweep = eta_sweep(runs)
    if not sweep.points:
        raise ValueError(
            f"{folder}: no finished run carries a label eta; want the folder of a matrix like "
            "configs/eta_sweep.toml"
        )
    text = render(sweep) + as_markdown(run_warnings(folder))
    write_json(folder / "eta_sweep.json", sweep)
    plot(sweep, folder / "eta_sweep.png", runs)
    (folder / "eta_sweep.md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(print_report("eta_sweep", write_eta_sweep))
