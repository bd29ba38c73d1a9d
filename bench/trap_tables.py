"""The tables of numbers of docs/traps.md (blocks of bench/tables.py).

The record holds no diagnosis run by run: its means and intervals over seeds are shown, the
differences paired by seed. Accuracies are computed from the runs.
"""

from collections.abc import Mapping
from typing import Any

from reflux.trainer.runs.markdown_table import table, with_interval
from reflux.trainer.studies.results import TEACHERS

from .report_record import Block, Record, estimate_of, mean_of, with_std

TRAPS = "2026-11-30_traps_five_seeds.json"
TEACHER_WORDS = {"task_only": "task reward only (eta = 0)"}
STYLES = ("left", "short")
STUDENTS = ("seq_kd", "kd_forward")
STATED = {  # a diagnosis' title -> how the page calls it, decimals of the differences
    "teacher-student gap: wrong-trace preference": ("wrong-trace preference", 3),
    "wrong with confidence >= 0.9": ("wrong with confidence >= 0.9", 3),
    "KL on student / on teacher prefixes, reverse": ("prefix ratio, reverse KL", 2),
    "tail noise: tail-noise index": ("tail-noise index", 3),
    "recovery after an inserted error": ("recovery after an inserted error", 3),
    "repeated 4-grams": ("repeated 4-grams", 3),
}
NOT_STATED = {
    "forward KL, teacher's prefixes, nats/token": (
        "forward KL on the teacher's prefixes, nats/token",
        3,
    ),
    "reverse KL, student's prefixes, nats/token": (
        "reverse KL on the student's prefixes, nats/token",
        3,
    ),
    "correct after half of an own wrong text": ("correct after half of an own wrong text", 3),
}
WHEN = ("before distillation", "after seq_kd")


def traps_teachers(record: Record) -> str:
    starts = mean_of(record.accuracy(role="start"))
    rows = []
    for name in TEACHERS:
        accuracy = mean_of(record.accuracy(role="teacher", teacher=name))
        styles = record.report["teachers"][name]["styles"]
        students = (mean_of(record.student(attack, name)) for attack in STUDENTS)
        rows.append(
            (
                TEACHER_WORDS.get(name, name),
                with_std(accuracy, starts.n),
                " / ".join(f"{100 * styles[s]['fraction']:.0f} %" for s in STYLES),
                *(with_std(e, starts.n) for e in students),
            )
        )
    head = ("teacher", "its accuracy, sampled", "`left` / `short` of its answers")
    students_head = (f"student by `seq_kd` (start {starts.mean:.3f})", "by `kd_forward`")
    return table((*head, *students_head), rows)


def traps_measures(record: Record) -> str:
    rows = [_measure_row(record, title, *words) for title, words in STATED.items()]
    rows.append(("*not among the statements:*", *[""] * 5))
    rows += [_measure_row(record, title, *words) for title, words in NOT_STATED.items()]
    head = ("measure", "at eta = 0, before / after", "distillable, before", "after")
    return table((*head, "undistillable, before", "after"), rows)


def _measure_row(record: Record, title: str, words: str, digits: int) -> tuple[str, ...]:
    pairs = record.content["diagnoses"][title]
    control = " / ".join(f"{pairs[f'{when}, task_only']['mean']:.3f}" for when in WHEN)
    differences = pairs["minus control"]
    cells = (
        _difference(differences[f"{when}, {teacher}"], digits)
        for teacher in TEACHERS[2:]
        for when in WHEN
    )
    return words, control, *cells


def _difference(pair: Mapping[str, Any], digits: int) -> str:
    """0 where no seed differs."""
    e = estimate_of(pair)
    return with_interval(e, f"{{:+.{digits}f}}") if e.mean or e.std else "0"


BLOCKS = {draw.__name__: Block(draw, (TRAPS,)) for draw in (traps_teachers, traps_measures)}
