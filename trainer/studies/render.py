"""An AttackReport as Markdown. Nothing is computed here.

**A section of the report is one function over typed results**, AttackReport -> Section | None, and
one entry in SECTIONS, which is their order. None leaves the section out. report.md.jinja lays
sections out and knows none of them. To add one: put what it shows into results.AttackReport, write
the function, append it to SECTIONS.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reflux.trainer.runs.files import to_json
from reflux.trainer.runs.markdown_table import (
    interval,
    mean_and_std,
    points_with_interval,
    render_template,
    score,
)
from reflux.trainer.runs.stats import Estimate

from .figures import FIGURES
from .results import TEACHERS, AttackReport, StudentResult, TeacherResult
from .verdict import FAMILY, attack_outcomes

TEMPLATE = Path(__file__).with_name("report.md.jinja")
NOTE = (
    "Accuracies are fractions of held-out prompts answered correctly, sampled at temperature 1 "
    "unless stated otherwise; +- is the standard deviation over seeds, intervals are 95 % over "
    "seeds (Student's t; ratios by Fieller) unless called item-level. Verdicts are those of the "
    "whole interval, from the attacker's side: an attack on the undistillable teacher succeeded, "
    "failed, or is inconclusive; fewer than three seeds give none. No relative interval goes "
    'below -100 %. "Undistillable" means: reduces what the students tested here gain through the '
    "channels tested here at this budget."
)
NOT_RUN = "not run"


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


def _seeds(report: AttackReport) -> int:
    return len(report.head.seeds)


def _n(report: AttackReport) -> str:
    return f"n = {_seeds(report)} seeds where a cell names no other."


def arms(report: AttackReport) -> tuple[str, ...]:
    """The teachers' names in a table's order; the control is among them, run or not."""
    others = (n for n in report.teachers if n not in TEACHERS)
    known = (n for n in TEACHERS if n in report.teachers or n == "task_only")
    return (*known, *others) if report.teachers else ()


def teachers(report: AttackReport) -> Section:
    first = next(iter(report.teachers.values()), None)
    styles = first.styles if first else {}
    head = ("teacher", "sampled", "greedy", "difference, points", "item-level", "KL to original")
    rows = tuple(
        _teacher_row(name, report.teachers.get(name), len(head) + len(styles), _seeds(report))
        for name in arms(report)
    )
    columns = (f"{style}: fraction / correct" for style in styles)
    notes = (f"task_only is the control, eta = 0. {_n(report)}",) if rows else ()
    return Section("Teachers", table=Table((*head, *columns), rows), notes=notes)


def _teacher_row(name: str, t: TeacherResult | None, columns: int, seeds: int) -> tuple[str, ...]:
    if t is None:
        return (name, NOT_RUN, *[""] * (columns - 2))
    d = t.difference
    gaps = (
        points_with_interval(d.sampled),
        f"{points_with_interval(d.sampled_items)} n {d.sampled_items.n}",
    )
    return (
        name,
        mean_and_std(t.sampled, seeds),
        mean_and_std(t.greedy, seeds),
        *(gaps if name != "original" else ("", "")),
        f"{t.reference_kl.mean:.4f}" if t.reference_kl.n else "",
        *(f"{s.fraction:.0%} / {_share(s.correct)}" for s in t.styles.values()),
    )


def _share(fraction: float) -> str:
    return "not measured" if math.isnan(fraction) else f"{fraction:.0%}"


def students(report: AttackReport) -> Section:
    names, seeds = arms(report), _seeds(report)
    rows = [
        (
            attack,
            *(_with_change(row.get(n), seeds) for n in names),
            " / ".join(f"{row[n].greedy.mean:.3f}" if n in row else "-" for n in names),
        )
        for attack, row in report.students.items()
    ]
    head = ("attack", *(f"from {n}" for n in names), "greedy: " + " / ".join(names))
    baselines = (
        f"Without a teacher, {name}: {mean_and_std(b.sampled)} sampled, {b.greedy.mean:.3f} greedy."
        for name, b in report.baselines.items()
    )
    note = f"In brackets the relative change against the original's student. {_n(report)}"
    return Section("Students", table=Table(head, tuple(rows)), notes=(note, *baselines))


def _with_change(student: StudentResult | None, seeds: int) -> str:
    """Accuracy, and its change against the original's student."""
    if student is None:
        return NOT_RUN
    change = student.change.sampled if student.change else None
    return mean_and_std(student.sampled, seeds) + _percent(change)


def _best_with_change(student: StudentResult | None, seeds: int) -> str:
    if student is None:
        return NOT_RUN
    change = student.change.best if student.change else None
    return mean_and_std(student.best, seeds) + _percent(change)


def _percent(change: Estimate | None) -> str:
    """(+20% [+10%, +30%]) over seeds."""
    if change is None or not change.n:
        return ""
    return f" ({change.mean:+.0%} {interval(change, '{:+.0%}')}".rstrip() + ")"


def outcomes(report: AttackReport) -> Section | None:
    """Every attack on the undistillable teacher with its verdict, alone and in its family."""
    rows = tuple(
        (
            o.attack,
            o.verdict,
            o.checkpoint,
            f"{o.p:.3f}" if o.p == o.p else "",
            f"{o.p_family:.3f}" if o.p_family == o.p_family else "",
        )
        for o in attack_outcomes(report.students)
    )
    if not rows:
        return None
    head = ("attack", "verdict", "decided by", "p", "p, Holm")
    text = (
        "p: of a student that keeps just half of what the original gives (paired t test over "
        f"seeds, the larger of both checkpoints'). Holm: below {FAMILY} with a chance of at most "
        f"{FAMILY:.0%} that any of the {len(rows)} is wrong."
    )
    return Section("Attacks on the undistillable teacher", text, table=Table(head, rows))


def attacks(report: AttackReport) -> Section | None:
    """Query cost, the best checkpoint of an attacker who stops early, and distillability."""
    if not any(s.change for row in report.students.values() for s in row.values()):
        return None
    found = [n for n in TEACHERS if any(n in row for row in report.students.values())]
    names = [n for n in TEACHERS if n in found or n == "task_only"]
    calibrated = [n for n in names if n != "original"]
    head = (
        *("attack", "teacher texts written / read", "their tokens, about", "seconds"),
        *(f"best, {n}" for n in names),
        *(f"distillability, {n}" for n in calibrated),
    )
    rows = tuple(
        _attack_row(attack, row, names, _seeds(report)) for attack, row in report.students.items()
    )
    text = (
        "Cost is that of one run. The best checkpoint is the one that scored highest on these "
        "same prompts, an attacker's luck included. Distillability: what students gain / what "
        "they gain from the original; the interval is unbounded where the original's own gain is "
        f"not certain over seeds. {_n(report)}"
    )
    return Section("Attacks in detail", text, table=Table(head, rows))


def _attack_row(
    attack: str, row: Mapping[str, StudentResult], names: list[str], seeds: int
) -> tuple[str, ...]:
    first = next(iter(row.values()))
    return (
        attack,
        f"{first.cost.written} / {first.cost.read}",
        f"{first.cost.tokens}",
        f"{first.seconds.mean:.0f}",
        *(_best_with_change(row.get(n), seeds) for n in names),
        *(score(row[n].score) if n in row else NOT_RUN for n in names if n != "original"),
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
    seeds = _seeds(report)
    rows: tuple[tuple[str, ...], ...] = tuple(
        (
            name,
            mean_and_std(d.served, seeds),
            mean_and_std(d.student, seeds),
            "" if name == "none" else _percent(d.change).strip(" ()"),
            score(d.score),
        )
        for name, d in report.defences.items()
    )
    if "task_only" not in report.defences:
        rows = (*rows, ("task_only", NOT_RUN, *[""] * (len(head) - 2)))
    text = (
        "By what students of sampled text gain, or of the attack that a row names, against the "
        f"original's by the same attack; accuracy is that of the texts served. {_n(report)}"
    )
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
        row = [name, mean_and_std(p.accuracy, _seeds(report))]
        for mode in modes:
            teacher = p.modes.get(mode)
            row.append(mean_and_std(teacher.teacher, _seeds(report)) if teacher else "")
            row += [score(teacher.scores.get(a) if teacher else None) for a in names]
        table.append(tuple(row))
    table.append(_control_row(report, modes, names))
    text = f"Teachers calibrated against other proxies: distillability by attack. {_n(report)}"
    return Section("Sensitivity to the proxy", text, table=Table(tuple(head), tuple(table)))


def _control_row(report: AttackReport, modes: list[str], attacks: list[str]) -> tuple[str, ...]:
    """The teacher that no proxy had a say in: eta = 0, the same under every mode."""
    teacher = report.teachers.get("task_only")
    row = ["none (eta = 0)", ""]
    for _ in modes:
        row.append(mean_and_std(teacher.sampled, _seeds(report)) if teacher else NOT_RUN)
        students = [report.students.get(a, {}).get("task_only") for a in attacks]
        row += [score(s.score) if s else NOT_RUN for s in students]
    return tuple(row)


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
    outcomes,
    attacks,
    collapse,
    defences,
    proxies,
    *(partial(figure, file=file) for file in FIGURES),
    how_it_was_made,
)
