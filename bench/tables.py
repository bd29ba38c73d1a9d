"""The tables of README.md, docs/results.md and docs/method.md, computed again from the record of a
report, with the statistics of today: python -m bench.tables [RECORD]

Everything comes from the record's own rows, one a run: intervals are over seeds (Student's t;
ratios by Fieller), so that a reader with the record and a calculator gets the same. Of two things
older records hold no run-by-run numbers: the best checkpoint (its bounds follow from the recorded
means and deviations, which determine them), and the eta sweep and ablations (the recorded means,
deviations and intervals over seeds are shown).

`--check FILE...` compares the blocks between `<!-- bench.tables NAME -->` and `<!-- end -->` of
Markdown files with what is computed; `--write` puts it there. Exit code 1 where a block differs.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflux.trainer.runs.markdown_table import points_with_interval, table, with_interval
from reflux.trainer.runs.stats import (
    Estimate,
    fieller,
    holm,
    over_seeds,
    ratio_over_seeds,
    ratio_p,
    relative_over_seeds,
    t_tail,
)
from reflux.trainer.studies.rules import at_most, worst
from reflux.trainer.studies.verdict import MIN_LOSS

from .records import FOLDER

RECORD = FOLDER / "2026-11-29_report_cpu.json"
NOT_RUN = "not run"
TEACHERS = ("original", "task_only", "distillable", "undistillable")
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
# of records whose rows do not say where a student began: random weights, and seq_kd's own student
BEGINS = {"deeper_student": "", "stronger_start": "seq_kd"}
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

BySeed = Mapping[str, float]  # seed -> accuracy


@dataclass(frozen=True)
class Attack:
    """One attack on one teacher."""

    change: Estimate  # relative, last checkpoint
    best: Estimate  # of the best one
    score: Estimate  # distillability
    p: float  # of "half of the original's", the larger of both checkpoints'


class Record:
    """The run-by-run numbers of a report's record."""

    def __init__(self, content: Mapping[str, Any]):
        self.content, self.report = content, content["report"]
        self.rows = [r for r in self.report["runs"] if "defence" not in r]

    def accuracy(self, measure: str = "sampled", **labels: str) -> BySeed:
        """ValueError where a seed has two."""
        mine = [r for r in self.rows if all(r.get(k) == v for k, v in labels.items())]
        found = [(r["seed"], r[measure]) for r in mine if measure in r]
        if len(dict(found)) < len(found):
            raise ValueError(f"the record has two runs of one seed with {labels}; want one")
        return dict(found)

    def student(self, attack: str, teacher: str, measure: str = "sampled") -> BySeed:
        return self.accuracy(measure, role="student", attack=attack, teacher=teacher)

    def begin(self, attack: str) -> BySeed:
        """Accuracy before the attack."""
        rows = [r for r in self.rows if r["role"] == "student" and r["attack"] == attack]
        if name := rows[0].get("start"):
            return self.accuracy(role="start", student=name)
        if known := self.accuracy("at_start", role="student", attack=attack, teacher="original"):
            return known
        other = BEGINS[attack]
        return self.student(other, "original") if other else {r["seed"]: 0.0 for r in rows}

    def attack(self, attack: str, teacher: str) -> Attack | None:
        after, base = self.student(attack, teacher), self.student(attack, "original")
        seeds = sorted(after.keys() & base.keys())
        if not seeds:
            return None
        begin = self.begin(attack)
        mine, others = [after[s] for s in seeds], [base[s] for s in seeds]
        best, p_best = self._best(attack, teacher)
        return Attack(
            change=relative_over_seeds(mine, others),
            best=best,
            score=ratio_over_seeds(
                [after[s] - begin[s] for s in seeds], [base[s] - begin[s] for s in seeds]
            ),
            p=max(ratio_p(mine, others, 1 + MIN_LOSS), p_best),
        )

    def _best(self, attack: str, teacher: str) -> tuple[Estimate, float]:
        """(relative change of the best checkpoint, p of half) from runs, or from moments."""
        after, base = (self.student(attack, t, "best") for t in (teacher, "original"))
        if seeds := sorted(after.keys() & base.keys()):
            mine, others = [after[s] for s in seeds], [base[s] for s in seeds]
            return relative_over_seeds(mine, others), ratio_p(mine, others, 1 + MIN_LOSS)
        row = self.report["students"][attack]
        a, b = row[teacher]["best"], row["original"]["best"]
        difference = row[teacher]["change"]["best"]["std"] * b["mean"]
        cov = (a["std"] ** 2 + b["std"] ** 2 - difference**2) / 2
        return _from_moments(a, b, cov)


def _from_moments(a: Mapping[str, float], b: Mapping[str, float], cov: float) -> tuple[Any, float]:
    n, keep = int(a["n"]), 1 + MIN_LOSS
    low, high = fieller(a["mean"], b["mean"], a["std"] ** 2, cov, b["std"] ** 2, n)
    change = Estimate(a["mean"] / b["mean"] - 1, math.nan, max(low, 0) - 1, high - 1, n)
    gap = a["mean"] - keep * b["mean"]
    variance = max(a["std"] ** 2 + keep**2 * b["std"] ** 2 - 2 * keep * cov, 0.0)
    if not variance:
        return change, 0.0 if gap else 1.0
    return change, t_tail(gap / math.sqrt(variance / n), n - 1)


# --- blocks


def teachers(record: Record) -> str:
    original = record.accuracy(role="teacher", teacher="original")
    rows = []
    for name in TEACHERS:
        mine = record.accuracy(role="teacher", teacher=name)
        said = record.report["teachers"][name]
        style = said["styles"][EASY]
        gap = over_seeds([mine[s] - original[s] for s in sorted(original)])
        kl = _estimate(said.get("reference_kl", said.get("anchor_kl")))
        rows.append(
            (
                TEACHER_WORDS.get(name, f"`{name}`" if name != "original" else name),
                _pm(over_seeds(list(mine.values()))),
                "" if name == "original" else points_with_interval(gap),
                f"{kl.mean:.3f} ± {kl.std:.3f}" if kl.n else "",
                f"{style.get('fraction', style.get('share')):.0%}",
            )
        )
    head = ("teacher", "accuracy", "against the original, points", "KL to original, nats/token")
    return table((*head, "answers in the easy order"), rows)


def students(record: Record) -> str:
    verdicts = _verdicts(record)
    rows = []
    for attack, words in ATTACKS.items():
        if not record.student(attack, "original"):
            continue
        cells = [_pm(over_seeds(list(record.student(attack, "original").values())))]
        cells += [_student_cell(record, attack, t) for t in TEACHERS[1:]]
        rows.append((words, *cells, verdicts[attack][0]))
    head = ("the same student, by", "from original", "from eta = 0", "from `distillable`")
    return table((*head, "from `undistillable`", "attack"), rows)


def short(record: Record) -> str:
    """README's: the teachers themselves, and some attacks of each kind."""
    verdicts = _verdicts(record)
    own = [
        _pm(over_seeds(list(record.accuracy(role="teacher", teacher=t).values())))
        for t in TEACHERS[:1] + TEACHERS[2:]
    ]
    rows = [("the teacher itself", *own, "")]
    for attack, words in SHORT.items():
        cells = [_pm(over_seeds(list(record.student(attack, "original").values())))]
        cells += [_student_cell(record, attack, t) for t in TEACHERS[2:]]
        rows.append((words, *cells, verdicts[attack][0]))
    head = ("student, by", "of the original", "of `distillable`", "of `undistillable`")
    return table((*head, "attack on the latter"), rows)


def _student_cell(record: Record, attack: str, teacher: str) -> str:
    found = record.attack(attack, teacher)
    if found is None:
        return NOT_RUN
    accuracy = over_seeds(list(record.student(attack, teacher).values()))
    return f"{accuracy.mean:.3f} ± {accuracy.std:.3f} ({with_interval(found.change, '{:+.0%}')})"


def _verdicts(record: Record) -> dict[str, tuple[str, float, float]]:
    """attack on the undistillable teacher -> (verdict, p, p by Holm)."""
    found = {a: record.attack(a, "undistillable") for a in ATTACKS}
    known = {a: x for a, x in found.items() if x is not None}
    family = holm([x.p for x in known.values()])
    words = {"holds": "failed", "violated": "succeeded", "inconclusive": "inconclusive"}
    return {
        a: (words[worst(at_most(x.change, MIN_LOSS), at_most(x.best, MIN_LOSS))], x.p, p)
        for (a, x), p in zip(known.items(), family)
    }


def headline(record: Record) -> str:
    rows = []
    for teacher, pick, word in (
        ("undistillable", max, "largest"),
        ("distillable", min, "smallest"),
    ):
        scores = {a: x.score for a in ATTACKS if (x := record.attack(a, teacher)) is not None}
        attack = pick(scores, key=lambda a, s=scores: s[a].mean)
        mean = sum(s.mean for s in scores.values()) / len(scores)
        score = scores[attack]
        rows.append(
            (
                f"`{teacher}`",
                f"{word}: **{with_interval(score, '{:.2f}')}** ({ATTACKS[attack]})",
                f"{mean:.2f}",
                f"{len(scores)}, n = {score.n} seeds each",
            )
        )
    head = ("teacher", "distillability at its worst", "mean over attacks", "attacks")
    return table(head, rows)


def verdicts(record: Record) -> str:
    of: dict[str, list[str]] = defaultdict(list)
    rows = _verdicts(record)
    for attack, (verdict, _, _) in rows.items():
        of[verdict].append(f"`{attack}`")
    body = [(v, str(len(of[v])), ", ".join(of[v])) for v in ("failed", "succeeded", "inconclusive")]
    holm_rows = [_family_row(rows, verdict) for verdict in ("failed", "succeeded")]
    return table((f"of {len(rows)} attacks", "", ""), [*body, *holm_rows])


def _family_row(rows: Mapping[str, tuple[str, float, float]], verdict: str) -> tuple[str, str, str]:
    ps = {attack: p for attack, (v, _, p) in rows.items() if v == verdict}
    holding = [f"`{attack}`" for attack, p in ps.items() if p <= 0.05]
    least = min(ps.values(), default=math.nan)
    said = ", ".join(holding) or f"none; the smallest adjusted p is {least:.2f}"
    return f"{verdict} with a family-wise error of 5 % (Holm)", str(len(holding)), said


def eta(record: Record) -> str:
    points = record.content.get("eta_sweep", record.content.get("knob"))["points"]
    rows = [
        (
            f"{p['eta']:+g}" if p["eta"] else "0",
            _pm(_estimate(p["teacher"]), 3),
            f"{_estimate(p.get('reference_kl', p.get('anchor_kl'))).mean:.3f}",
            _pm(_estimate(p["student"]), 3),
            _unit(_estimate(p["student"])),
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
    e, detected = _estimate(pair), pair.get("detected", pair.get("caught"))
    count = "" if detected is None else f" ({detected} of {e.n})"
    return f"{e.mean:.2f} ± {e.std:.2f}" + (f" n {e.n}" if e.n != 3 else "") + count


def ablations(record: Record) -> str:
    rows = []
    for name, words in {"default": "nothing", **ABLATIONS}.items():
        cells = []
        for mode in TEACHERS[2:]:
            row = record.content["ablations"][mode][name]
            gap = _estimate(row["student_gap"])
            against = "" if name == "default" else f" ({points_with_interval(gap)})"
            cells += [
                points_with_interval(_estimate(row["teacher_gap"])),
                _pm(_estimate(row["student"])) + against,
            ]
        rows.append((words, *cells))
    control = record.attack("seq_kd", "task_only")
    if control is not None:
        original = record.accuracy(role="teacher", teacher="original")
        mine = record.accuracy(role="teacher", teacher="task_only")
        teacher = points_with_interval(over_seeds([mine[s] - original[s] for s in sorted(mine)]))
        student = _pm(over_seeds(list(record.student("seq_kd", "task_only").values())))
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


def _estimate(x: Mapping[str, Any] | None) -> Estimate:
    if x is None:
        return over_seeds([])
    number = {k: math.nan if x[k] is None else x[k] for k in ("mean", "std", "low", "high")}
    return Estimate(**number, n=x["n"])


def _pm(e: Estimate, seeds: int = 3) -> str:
    return f"{e.mean:.3f} ± {e.std:.3f}" + (f" (n {e.n})" if e.n != seeds else "")


def _unit(e: Estimate) -> str:
    """The interval of an accuracy, cut at 0 and 1."""
    return f"[{max(e.low, 0):.3f}, {min(e.high, 1):.3f}]"


def _coded(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"`{n}`" for n in names)


BLOCKS = {
    f.__name__: f
    for f in (teachers, students, short, headline, verdicts, eta, diagnoses, ablations, defences)
}
BLOCK = re.compile(r"(<!-- bench\.tables (\w+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def fill(text: str, record: Record) -> str:
    """The text with its blocks computed."""
    return BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](record) + m[4], text)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.check or args.write:
        record = Record(json.loads(RECORD.read_text()))
        pages = [Path(name) for name in args.files]
        stale = [page for page in pages if fill(page.read_text(), record) != page.read_text()]
        for page in stale if args.write else ():
            page.write_text(fill(page.read_text(), record))
        print(f"{len(stale)} of {len(pages)} files differed from the record")
        return int(bool(stale) and not args.write)
    record = Record(json.loads(Path(args.files[0] if args.files else RECORD).read_text()))
    for name, block in BLOCKS.items():
        print(f"{name}\n\n{block(record)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("files", nargs="*", help="a record; with --check or --write, the pages")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="exit code 1 where a block differs")
    how.add_argument("--write", action="store_true", help="put the computed blocks into the pages")
    return parser


if __name__ == "__main__":
    sys.exit(main())
