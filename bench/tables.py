"""The tables of README.md, docs/results.md, docs/method.md and docs/traps.md, computed again from
the records, with the statistics of today: python -m bench.tables [RECORD]

Everything comes from the records' own rows, one a run: intervals are over seeds (Student's t;
ratios by Fieller), so that a reader with the record and a calculator gets the same. Of two things
older records hold no run-by-run numbers: the best checkpoint (its bounds follow from the recorded
means and deviations, which determine them), and the eta sweep and ablations (the recorded means,
deviations and intervals over seeds are shown). The blocks of this file are those of the miniature,
a RECORD another report of its matrix; language_tables.py and trap_tables.py have the others.

`--check [FILE...]` compares the blocks between `<!-- bench.tables NAME -->` and `<!-- end -->` of
Markdown files with what is computed; `--write` puts it there; without a FILE it is all pages. Exit
code 1 where a block differs.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.runs.markdown_table import points_with_interval, table, with_interval
from reflux.trainer.runs.stats import Estimate, over_seeds, relative_over_seeds
from reflux.trainer.studies.results import TEACHERS
from reflux.trainer.studies.verdict import EXTREMES, FAMILY, AttackOutcome, Headline
from reflux.trainer.studies.verdict import headline as studies_headline

from . import language_tables, trap_tables
from .records import ROOT
from .report_record import (
    NOT_RUN,
    Block,
    BySeed,
    Record,
    estimate_of,
    mean_of,
    with_std,
)

RECORD = "2026-11-29_report_cpu.json"
PAGES = ("README.md", "docs/results.md", "docs/method.md", "docs/traps.md")
TEACHER_WORDS = {"task_only": "task reward only (eta = 0)"}
SHORT = {  # attack -> how README calls it
    "seq_kd": "sampled text",
    "kd_forward": "forward KL on teacher text",
    "gkd_on_policy": "reverse KL, on-policy",
    "cross_tokenizer": "spans, another tokenizer",
    "deeper_student": "sampled text, as deep as the teacher",
    "wider_student": "sampled text, wider",
    "answers_only": "answers rewritten into the easy order",
}
EASY = "left"  # the answer style that one layer learns
ATTACKS = {
    "seq_kd": "sampled text (`seq_kd`)",
    "seq_kd_filtered": "sampled text, correct only",
    "seq_kd_cold": "text at temperature 0.5",
    "seq_kd_greedy": "the most likely text",
    "seq_kd_more": "four times as much text",
    "mixed_teachers": "half of it from the original",
    "kd_forward": "forward KL on teacher text",
    "kd_top1": "from the likeliest token",
    "kd_top5": "from the five likeliest",
    "kd_top20": "from the twenty likeliest",
    "kd_top64": "from the 64 likeliest",
    "gkd_reverse": "reverse KL, half on-policy",
    "gkd_on_policy": "reverse KL, on-policy",
    "gkd_forward": "forward KL, half on-policy",
    "gkd_jsd": "JSD, half on-policy",
    "cross_tokenizer": "another tokenizer, by spans",
    "cross_class": "another tokenizer, by class masses",
    "deeper_student": "a student as deep as the teacher",
    "wider_student": "a wider student",
    "stronger_start": "one that the original taught before",
    "answers_only": "answers rewritten into the easy order",
    "learnable_only": "only those of its texts that are in it",
}
DIAGNOSES = {  # rows of `diagnoses` that docs/results.md shows, by how their titles begin
    "tail noise": "tail-noise index (trap: above 1)",
    "off-policy": "prefix ratio (trap: above 1)",
    "teacher-student gap": "wrong-trace preference (trap: 0.5 and more)",
    "recovery": "recovery after an inserted error",
    "wrong with": "wrong with confidence >= 0.9",
    "repeated": "repeated 4-grams",
}
ABLATIONS = {  # of docs/method.md; those that cannot differ in the world of the record are no rows
    "proxy_small": "proxy that has learned nothing (accuracy 0.000)",
    "proxy_deep": "proxy as good as the teacher (0.999)",
    "proxy_bpe": "proxy with another tokenizer (0.220)",
    "joint": '`normalise = "joint"`',
    "gate_degenerate": '`cal_gate = "skip_degenerate"`',
    "denominator_original": "denominator the original",
    "credit_span": '`credit = "span"`',
    "group_4": "groups of 4",
    "group_16": "groups of 16",
}

# --- blocks


def teachers(record: Record) -> str:
    original = record.accuracy(role="teacher", teacher="original")
    rows = []
    for name in TEACHERS:
        mine = record.accuracy(role="teacher", teacher=name)
        said = record.report["teachers"][name]
        style = said["styles"][EASY]
        gap = over_seeds([mine[s] - original[s] for s in sorted(original)])
        kl = estimate_of(said.get("reference_kl", said.get("anchor_kl")))
        rows.append(
            (
                TEACHER_WORDS.get(name, f"`{name}`" if name != "original" else name),
                with_std(mean_of(mine)),
                "" if name == "original" else points_with_interval(gap),
                f"{kl.mean:.3f} ± {kl.std:.3f}" if kl.n else "",
                f"{style.get('fraction', style.get('share')):.0%}",
            )
        )
    head = ("teacher", "accuracy", "against the original, points", "KL to original, nats/token")
    return table((*head, "answers in the easy order"), rows)


def students(record: Record) -> str:
    verdicts = record.judge(ATTACKS)
    rows = []
    for attack, words in ATTACKS.items():
        if not record.student(attack, "original"):
            continue
        cells = [with_std(mean_of(record.student(attack, "original")))]
        cells += [_student_cell(record, attack, t) for t in TEACHERS[1:]]
        rows.append((words, *cells, verdicts[attack].verdict))
    head = ("the same student, by", "from original", "from eta = 0", "from `distillable`")
    return table((*head, "from `undistillable`", "attack"), rows)


def short(record: Record) -> str:
    """README's: the teachers themselves, and some attacks of each kind."""
    verdicts = record.judge(ATTACKS)
    own = [with_std(mean_of(record.accuracy(role="teacher", teacher=t))) for t in TEACHERS]
    rows = [("the teacher itself", *own, "")]
    for attack, words in SHORT.items():
        cells = [with_std(mean_of(record.student(attack, "original")))]
        cells += [_student_cell(record, attack, t) for t in TEACHERS[1:]]
        rows.append((words, *cells, verdicts[attack].verdict))
    head = (
        "student, by",
        "of the original",
        "of eta = 0",
        "of `distillable`",
        "of `undistillable`",
    )
    return table((*head, "attack on the latter"), rows)


def _student_cell(record: Record, attack: str, teacher: str) -> str:
    found = record.attack(attack, teacher)
    if found is None:
        return NOT_RUN
    accuracy = mean_of(record.student(attack, teacher))
    return f"{accuracy.mean:.3f} ± {accuracy.std:.3f} ({with_interval(found.change, '{:+.0%}')})"


def _headlines(record: Record) -> Iterator[Headline]:
    for teacher in EXTREMES:
        found = ((f"`{a}`", record.attack(a, teacher)) for a in ATTACKS)
        scores = {a: x.score for a, x in found if x is not None and x.score is not None}
        if h := studies_headline(teacher, scores):
            yield h


def _words_of(h: Headline) -> str:
    return ATTACKS[h.attack.strip("`")]


def headline(record: Record) -> str:
    rows = []
    for h in _headlines(record):
        bounds = h.mean.say_bounds()
        rows.append(
            (
                f"`{h.teacher}`",
                f"{h.word}: **{with_interval(h.score, '{:.2f}')}** ({_words_of(h)})",
                f"{h.mean.value:.2f}",
                f"{h.attacks}, n = {h.score.n} seeds each" + (f"; {bounds}" if bounds else ""),
            )
        )
    head = ("teacher", "distillability at its worst", "mean over attacks", "attacks")
    return table(head, rows)


def worst(record: Record) -> str:
    """README's headline, in a sentence."""
    found = list(_headlines(record))
    said = "; ".join(
        f"`{h.teacher}` {h.word} **{with_interval(h.score, '{:.2f}')}** ({_words_of(h)}), "
        f"mean {h.mean.value:.2f}"
        for h in found
    )
    return f"At its worst over {found[0].attacks} attacks, n = {found[0].score.n} seeds: {said}."


def verdicts(record: Record) -> str:
    of: dict[str, list[str]] = defaultdict(list)
    rows = record.judge(ATTACKS)
    for attack, outcome in rows.items():
        of[outcome.verdict].append(f"`{attack}`")
    body = [(v, str(len(of[v])), ", ".join(of[v])) for v in ("failed", "succeeded", "inconclusive")]
    holm_rows = [_family_row(rows, word) for word in ("failed", "succeeded")]
    return table((f"of {len(rows)} attacks", "", ""), [*body, *holm_rows])


def _family_row(rows: Mapping[str, AttackOutcome], word: str) -> tuple[str, str, str]:
    ps = {attack: o.p_family for attack, o in rows.items() if o.verdict == word}
    holding = [f"`{attack}`" for attack, p in ps.items() if p <= FAMILY]
    least = min(ps.values(), default=math.nan)
    said = ", ".join(holding) or f"none; the smallest adjusted p is {least:.2f}"
    return (
        f"{word} with a family-wise error of {100 * FAMILY:.0f} % (Holm)",
        str(len(holding)),
        said,
    )


def eta(record: Record) -> str:
    points = record.content.get("eta_sweep", record.content.get("knob"))["points"]
    rows = [
        (
            f"{p['eta']:+g}" if p["eta"] else "0",
            with_std(estimate_of(p["teacher"]), 3),
            f"{estimate_of(p.get('reference_kl', p.get('anchor_kl'))).mean:.3f}",
            with_std(estimate_of(p["student"]), 3),
            _unit(estimate_of(p["student"])),
        )
        for p in points
    ]
    head = ("eta", "teacher accuracy", "KL to original, nats/token", "student by sampled text")
    return table((*head, "its interval"), rows)


def diagnoses(record: Record) -> str:
    rows = []
    for begin, words in DIAGNOSES.items():
        title = next(t for t in record.content["diagnoses"] if t.startswith(begin))
        pairs = record.content["diagnoses"][title]
        for when, prefix in (("before", "before distillation, "), ("after", "after seq_kd, ")):
            cells = (_diagnosis_cell(pairs.get(prefix + t)) for t in TEACHERS)
            rows.append((f"{words}, {when}", *cells))
    return table(("of the pair with teacher", "original", "eta = 0", *_coded(TEACHERS[2:])), rows)


def _diagnosis_cell(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return NOT_RUN
    e, detected = estimate_of(pair), pair.get("detected", pair.get("caught"))
    count = "" if detected is None else f" ({detected} of {e.n})"
    return f"{e.mean:.2f} ± {e.std:.2f}" + (f" n {e.n}" if e.n != 3 else "") + count


def ablations(record: Record) -> str:
    rows = []
    for name, words in {"default": "nothing", **ABLATIONS}.items():
        cells = []
        for mode in TEACHERS[2:]:
            row = record.content["ablations"][mode][name]
            gap = estimate_of(row["student_gap"])
            against = "" if name == "default" else f" ({points_with_interval(gap)})"
            cells += [
                points_with_interval(estimate_of(row["teacher_gap"])),
                with_std(estimate_of(row["student"])) + against,
            ]
        rows.append((words, *cells))
    control = record.attack("seq_kd", "task_only")
    if control is not None:
        original = record.accuracy(role="teacher", teacher="original")
        mine = record.accuracy(role="teacher", teacher="task_only")
        teacher = points_with_interval(over_seeds([mine[s] - original[s] for s in sorted(mine)]))
        student = with_std(mean_of(record.student("seq_kd", "task_only")))
        rows.insert(1, ("eta = 0 (the control)", teacher, student, teacher, student))
    head = []
    for mode in TEACHERS[2:]:
        head += [f"{mode} teacher - original, points", "its student (- default's, points)"]
    return table(("changed", *head), rows)


def defences(record: Record) -> str:
    everything = record.report["runs"]
    original = record.accuracy(role="teacher", teacher="original")
    base = record.student("seq_kd", "original")
    rows = [("task reward only (eta = 0)", *_defence_cells(record, original, base, "task_only"))]
    rows.append(("`undistillable`", *_defence_cells(record, original, base, "undistillable")))
    for name in dict.fromkeys(r["defence"] for r in everything if "defence" in r):
        mine = [r for r in everything if r.get("defence") == name]
        served = {r["seed"]: r["sampled"] for r in mine if r["role"] == "defence"}
        taken = {r["seed"]: r["sampled"] for r in mine if r["role"] == "student"}
        if name == "temperature 0.5":
            taken = dict(record.student("seq_kd_cold", "original"))
        rows.append((name, *_cells(original, base, served, taken)))
    rewritten = record.student("answers_only", "original")
    rows.append(("answers only, reasoning withheld", *_cells(original, base, original, rewritten)))
    return table(("served instead", "accuracy lost, points", "students' change"), rows)


def _defence_cells(record: Record, original: BySeed, base: BySeed, teacher: str) -> tuple[str, str]:
    served = record.accuracy(role="teacher", teacher=teacher)
    return _cells(original, base, served, record.student("seq_kd", teacher))


def _cells(original: BySeed, base: BySeed, served: BySeed, taken: BySeed) -> tuple[str, str]:
    lost = over_seeds([original[s] - served[s] for s in sorted(served.keys() & original.keys())])
    seeds = sorted(taken.keys() & base.keys())
    change = relative_over_seeds([taken[s] for s in seeds], [base[s] for s in seeds])
    return points_with_interval(lost), with_interval(change, "{:+.0%}")


def _unit(e: Estimate) -> str:
    """The interval of an accuracy, cut at 0 and 1."""
    return f"[{max(e.low, 0):.3f}, {min(e.high, 1):.3f}]"


def _coded(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"`{n}`" for n in names)


MINIATURE = (
    teachers,
    students,
    short,
    worst,
    headline,
    verdicts,
    eta,
    diagnoses,
    ablations,
    defences,
)
BLOCKS = {
    **{draw.__name__: Block(draw, (RECORD,)) for draw in MINIATURE},
    **language_tables.BLOCKS,
    **trap_tables.BLOCKS,
}
BLOCK = re.compile(r"(<!-- bench\.tables (\w+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The text with its blocks computed. ValueError where one has no table."""
    if unknown := [m[2] for m in BLOCK.finditer(text) if m[2] not in BLOCKS]:
        raise ValueError(f"bench.tables: no block {unknown[0]}; there are {', '.join(BLOCKS)}")
    return BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]].compute() + m[4], text)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.check or args.write:
        return _compare(
            [Path(name) for name in args.files] or [ROOT / p for p in PAGES], args.write
        )
    if args.files:
        record = Record(json.loads(Path(args.files[0]).read_text()))
        tables = {draw.__name__: draw(record) for draw in MINIATURE}
    else:
        tables = {name: block.compute() for name, block in BLOCKS.items()}
    for name, text in tables.items():
        print(f"{name}\n\n{text}\n")
    return 0


def _compare(pages: Sequence[Path], write: bool) -> int:
    stale = []
    for page in pages:
        text = page.read_text()
        wanted = fill(text)
        for old, new in zip(BLOCK.finditer(text), BLOCK.finditer(wanted)):
            if old[3] != new[3]:
                print(f"{page}: {old[2]} differs from its record")
        if wanted != text:
            stale.append(page)
            if write:
                page.write_text(wanted)
    print(f"{len(stale)} of {len(pages)} files differed from the records")
    return int(bool(stale) and not write)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "files", nargs="*", help="a record of a report; with --check or --write, the pages"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="exit code 1 where a block differs")
    how.add_argument("--write", action="store_true", help="put the computed blocks into the pages")
    return parser


if __name__ == "__main__":
    sys.exit(main())
