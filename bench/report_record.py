"""The run-by-run numbers of a record, and what they say over seeds: what bench/tables.py makes the
tables of the pages of.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reflux.trainer.runs.stats import (
    Estimate,
    fieller,
    over_seeds,
    ratio_over_seeds,
    ratio_p,
    relative_over_seeds,
    t_tail,
)
from reflux.trainer.studies.verdict import (
    MIN_LOSS,
    AttackOutcome,
    adjust_for_family,
    judge_attack,
)

from .records import FOLDER

NOT_RUN = "not run"
# of records whose rows do not say where a student began: random weights, and seq_kd's own student
BEGINS = {"deeper_student": "", "stronger_start": "seq_kd"}
BySeed = Mapping[str, float]  # seed -> accuracy


@dataclass(frozen=True)
class Attack:
    """One attack on one teacher, from a number of each run: the studies' StudentResult is read from
    the answers in the runs' folders, which no record holds.
    """

    change: Estimate  # relative, last checkpoint
    best: Estimate  # of the best one
    score: Estimate | None  # distillability; None where the record's report gives none
    p: float  # of "half of the original's"
    p_best: float  # of the best one


class Record:
    """What a file of bench/records holds; `report` and `rows` are empty where it is no report's."""

    def __init__(self, content: Mapping[str, Any]):
        self.content, self.report = content, content.get("report", {})
        self.rows = [r for r in self.report.get("runs", ()) if "defence" not in r]

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
        mine, others = [after[s] for s in seeds], [base[s] for s in seeds]
        best, p_best = self._best(attack, teacher)
        return Attack(
            change=relative_over_seeds(mine, others),
            best=best,
            score=self._score(attack, teacher, after, base),
            p=ratio_p(mine, others, 1 + MIN_LOSS),
            p_best=p_best,
        )

    def _score(self, attack: str, teacher: str, after: BySeed, base: BySeed) -> Estimate | None:
        """Whether the original's students gained enough for one was decided by items (gain_ratio of
        the studies). A record has no items, but the answer.
        """
        if self.report["students"][attack][teacher].get("score") is None:
            return None
        begin = self.begin(attack)
        seeds = sorted(after.keys() & base.keys())
        return ratio_over_seeds(
            [after[s] - begin[s] for s in seeds], [base[s] - begin[s] for s in seeds]
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

    def judge(self, attacks: Iterable[str]) -> dict[str, AttackOutcome]:
        """Those of them that were run, a family of their own."""
        found = ((a, self.attack(a, "undistillable")) for a in attacks)
        outcomes = [
            judge_attack(a, {"last": x.change, "best": x.best}, {"last": x.p, "best": x.p_best})
            for a, x in found
            if x is not None
        ]
        return {o.attack: o for o in adjust_for_family(outcomes)}


def _from_moments(a: Mapping[str, float], b: Mapping[str, float], cov: float) -> tuple[Any, float]:
    n, keep = int(a["n"]), 1 + MIN_LOSS
    low, high = fieller(a["mean"], b["mean"], a["std"] ** 2, cov, b["std"] ** 2, n)
    change = Estimate(a["mean"] / b["mean"] - 1, math.nan, max(low, 0) - 1, high - 1, n)
    gap = a["mean"] - keep * b["mean"]
    variance = max(a["std"] ** 2 + keep**2 * b["std"] ** 2 - 2 * keep * cov, 0.0)
    if not variance:
        return change, 0.0 if gap else 1.0
    return change, t_tail(gap / math.sqrt(variance / n), n - 1)


def estimate_of(x: Mapping[str, Any] | None) -> Estimate:
    """As a record writes it, null for NaN."""
    if x is None:
        return over_seeds([])
    number = {k: math.nan if x[k] is None else x[k] for k in ("mean", "std", "low", "high")}
    return Estimate(**number, n=x["n"])


def with_std(e: Estimate, seeds: int = 3) -> str:
    """0.123 ± 0.004; says n where it is not `seeds`, that of the page."""
    return f"{e.mean:.3f} ± {e.std:.3f}" + (f" (n {e.n})" if e.n != seeds else "")


def mean_of(values: BySeed) -> Estimate:
    return over_seeds(list(values.values()))


@lru_cache
def read_record(name: str) -> Record:
    """Of bench/records."""
    return Record(json.loads((FOLDER / name).read_text()))


@dataclass(frozen=True)
class Block:
    """A table of a page, and the records that `draw` makes it of, in its order."""

    draw: Callable[..., str]
    records: tuple[str, ...]

    def compute(self) -> str:
        return self.draw(*map(read_record, self.records))
