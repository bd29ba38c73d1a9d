"""An AttackReport as Markdown. Nothing is computed here.

**A section of the report is one function over typed results**, AttackReport -> Section | None, and
one entry in SECTIONS, which is their order. None leaves the section out. report.md.jinja lays
sections out and knows none of them. To add one: put what it shows into results.AttackReport, write
the function, append it to SECTIONS.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reflux.trainer.runs.files import to_json
from reflux.trainer.runs.markdown_table import mean_and_std, render_template, score
from reflux.trainer.runs.stats import Estimate

from .figures import FIGURES
from .results import TEACHERS, AttackReport, StudentResult

TEMPLATE = Path(__file__).with_name("report.md.jinja")
NOTE = (
    "Accuracies are fractions of held-out prompts answered correctly, sampled at temperature 1 "
    "unless stated otherwise; +- is the standard deviation over seeds, intervals are 95 %. "
    "Verdicts are from the attacker's side: an attack on the undistillable teacher succeeded, "
    'failed, or is inconclusive. "Undistillable" means: reduces what the students tested here '
    "gain through the channels tested here at this budget."
)


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One heading. The template writes the parts in this order and leaves empty ones out."""

    title: str
    text: str = ""  # a paragraph
    items: tuple[str, ...] = ()  # bullet points
    table: Table | None = None
    notes: tuple[str, ...] = ()  # paragraphs behind the table
    image: str = ""  # file name
    code: str = ""


SectionOf = Callable[[AttackReport], Section | None]


def render(report: AttackReport) -> str:
    """report.md."""
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    return render_template(TEMPLATE, title=report.title or "Report", sections=sections)


def in_plain_words(report: AttackReport) -> Section | None:
    return Section("In plain words", report.conclusion) if report.conclusion else None


def rules(report: AttackReport) -> Section:
    lines = tuple(line for line in report.verdict if line not in report.collapse)
    return Section("The rules, one by one", items=lines, notes=(NOTE,))


def warnings(report: AttackReport) -> Section | None:
    return Section("Warnings", items=report.warnings) if report.warnings else None


def teachers(report: AttackReport) -> Section:
    first = next(iter(report.teachers.values()), None)
    styles = first.styles if first else {}
    head = ("teacher", "sampled", "greedy", "difference, points", "KL to original")
    rows = []
    for name, t in report.teachers.items():
        d = t.difference.sampled
        points = f"{d.mean * 100:+.1f} [{d.low * 100:+.1f}, {d.high * 100:+.1f}] n {d.n}"
        kl = f"{t.reference_kl.mean:.4f}" if t.reference_kl.n else ""
        row = (name, mean_and_std(t.sampled), mean_and_std(t.greedy))
        fractions = (f"{s.fraction:.0%} / {s.correct:.0%}" for s in t.styles.values())
        rows.append((*row, "" if name == "original" else points, kl, *fractions))
    columns = (f"{style}: fraction / correct" for style in styles)
    return Section("Teachers", table=Table((*head, *columns), tuple(rows)))


def students(report: AttackReport) -> Section:
    names = tuple(report.teachers)
    rows = [
        (
            attack,
            *(_with_change(row.get(n)) for n in names),
            " / ".join(f"{row[n].greedy.mean:.3f}" if n in row else "-" for n in names),
        )
        for attack, row in report.students.items()
    ]
    head = ("attack", *(f"from {n}" for n in names), "greedy: " + " / ".join(names))
    baselines = (
        f"Without a teacher, {name}: {mean_and_std(b.sampled)} sampled, {b.greedy.mean:.3f} greedy."
        for name, b in report.baselines.items()
    )
    return Section("Students", table=Table(head, tuple(rows)), notes=tuple(baselines))


def _with_change(student: StudentResult | None) -> str:
    """Accuracy, and its change against the original's student."""
    if student is None:
        return ""
    change = student.change.sampled if student.change else None
    return mean_and_std(student.sampled) + _percent(change)


def _best_with_change(student: StudentResult | None) -> str:
    if student is None:
        return ""
    change = student.change.best if student.change else None
    return mean_and_std(student.best) + _percent(change)


def _percent(change: Estimate | None) -> str:
    return f" ({change.mean:+.0%})" if change is not None and change.n else ""


def attacks(report: AttackReport) -> Section | None:
    """Query cost, the best checkpoint of an attacker who stops early, and distillability."""
    if not any(s.change for row in report.students.values() for s in row.values()):
        return None
    names = [n for n in TEACHERS if any(n in row for row in report.students.values())]
    calibrated = [n for n in names if n != "original"]
    head = (
        *("attack", "teacher texts written / read", "their tokens, about", "seconds"),
        *(f"best, {n}" for n in names),
        *(f"distillability, {n}" for n in calibrated),
    )
    rows = tuple(
        _attack_row(attack, row, names, calibrated) for attack, row in report.students.items()
    )
    text = (
        "Cost is that of one run. The best checkpoint is the one that scored highest on these "
        "same prompts, an attacker's luck included. Distillability: what students gain / what "
        "they gain from the original."
    )
    return Section("Attacks in detail", text, table=Table(head, rows))


def _attack_row(
    attack: str, row: Mapping[str, StudentResult], names: list[str], calibrated: list[str]
) -> tuple[str, ...]:
    first = next(iter(row.values()))
    return (
        attack,
        f"{first.cost.written} / {first.cost.read}",
        f"{first.cost.tokens}",
        f"{first.seconds.mean:.0f}",
        *(_best_with_change(row.get(n)) for n in names),
        *(score(row[n].score if n in row else None) for n in calibrated),
    )


def collapse(report: AttackReport) -> Section | None:
    if not report.collapse:
        return None
    return Section("Collapse or format failure", items=report.collapse)


def defences(report: AttackReport) -> Section | None:
    if len(report.defences) < 2:
        return None
    head = (
        *("defence", "accuracy of what is served", "student by sampled text", "change"),
        "distillability",
    )
    rows = tuple(
        (
            name,
            mean_and_std(d.served),
            mean_and_std(d.student),
            "" if name == "none" or not d.change.n else f"{d.change.mean:+.0%}",
            score(d.score),
        )
        for name, d in report.defences.items()
    )
    text = "By what students of sampled text gain; accuracy is that of the texts served."
    return Section("Other defences", text, table=Table(head, rows))


def proxies(report: AttackReport) -> Section | None:
    """Proxies down; for each mode the teacher and its scores across."""
    if len(report.proxies) < 2:
        return None
    rows = report.proxies.values()
    modes = [m for m in TEACHERS if any(m in p.modes for p in rows)]
    scores = [a for p in rows for m in p.modes.values() for a in m.scores]
    names = list(dict.fromkeys(scores))
    head = ["proxy", "its accuracy"]
    for mode in modes:
        head += [f"teacher, {mode}", *(f"{mode}: {attack}" for attack in names)]
    table = []
    for name, p in report.proxies.items():
        row = [name, mean_and_std(p.accuracy)]
        for mode in modes:
            teacher = p.modes.get(mode)
            row.append(mean_and_std(teacher.teacher) if teacher else "")
            row += [score(teacher.scores.get(a) if teacher else None) for a in names]
        table.append(tuple(row))
    text = "Teachers calibrated against other proxies: distillability by attack."
    return Section("Sensitivity to the proxy", text, table=Table(tuple(head), tuple(table)))


def figure(report: AttackReport, file: str) -> Section | None:
    return Section(report.plots[file], image=file) if file in report.plots else None


def how_it_was_made(report: AttackReport) -> Section:
    return Section("How it was made", code=json.dumps(to_json(report.head), indent=1))


SECTIONS: tuple[SectionOf, ...] = (
    in_plain_words,
    rules,
    warnings,
    teachers,
    students,
    attacks,
    collapse,
    defences,
    proxies,
    *(partial(figure, file=file) for file in FIGURES),
    how_it_was_made,
)
