"""What a report holds: the results of a matrix folder's finished runs as typed data.

Accuracies and fractions are in [0, 1], KLs in nats per token. An Estimate is a mean over seeds with
its standard deviation and its 95 % interval over seeds, unless its field says that it is
item-level. Attacks, teachers,
defences and proxies are named by the labels of the matrix file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from reflux.trainer.runs.stats import Estimate, ratio_p

Checkpoint = Literal["last", "best"]  # of a student's run
Verdict = Literal["succeeded", "failed", "inconclusive"]  # of an attack
Rule = Literal["holds", "violated", "inconclusive"]  # by a whole interval (rules.py)
TEACHERS = ("original", "task_only", "distillable", "undistillable")  # in this order in a report


@dataclass(frozen=True)
class StyleFraction:
    """One answer style among the texts of a model."""

    fraction: float  # of the texts
    correct: float  # fraction of these that are correct; NaN where the grader gives rewards


@dataclass(frozen=True)
class QueryCost:
    """The queries of one student run to its teacher."""

    written: int  # texts that the teacher sampled
    read: int  # texts that the teacher read to give log-probabilities
    tokens: int  # of both, estimated from the mean length of the run's texts
    seconds: float  # of the run


@dataclass(frozen=True)
class SeedPairs:
    """Accuracies of two sets of runs, seed by seed in one order."""

    seeds: tuple[str, ...]
    after: tuple[float, ...]
    before: tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """Relative change of accuracy against the same attack on the original teacher
    (stats.relative_over_seeds). n = 0 where the original's mean is 0.
    """

    sampled: Estimate
    greedy: Estimate
    best: Estimate  # sampled, of the best checkpoint
    pairs: Mapping[Checkpoint, SeedPairs] = field(default_factory=dict)  # behind sampled and best

    def at(self, checkpoint: Checkpoint) -> Estimate:
        """By sampled answers."""
        return self.best if checkpoint == "best" else self.sampled

    def p(self, checkpoint: Checkpoint, change: float) -> float:
        """Of "the relative change is `change`" (stats.ratio_p); NaN without pairs."""
        pairs = self.pairs.get(checkpoint)
        return math.nan if pairs is None else ratio_p(pairs.after, pairs.before, 1 + change)


@dataclass(frozen=True)
class AccuracyDifference:
    """Accuracy minus the original teacher's on the same prompts. `*_items`: item-level, all (seed,
    prompt, sample) items as if they were independent.
    """

    sampled: Estimate
    greedy: Estimate
    sampled_items: Estimate
    greedy_items: Estimate


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """A trained model: the runs of all seeds."""

    sampled: Estimate  # accuracy of sampled answers
    greedy: Estimate
    answered: float  # fraction of sampled texts with an answer; NaN where the grader gives rewards
    correct_if_answered: float  # fraction of these that are correct
    best: Estimate  # sampled accuracy of the best checkpoint
    styles: Mapping[str, StyleFraction]  # of sampled texts
    greedy_styles: Mapping[str, StyleFraction]
    seconds: Estimate  # of a run
    cost: QueryCost  # of the first run
    late_spike: float  # see finished_runs.late_spike; the largest of all runs


@dataclass(frozen=True, kw_only=True)
class TeacherResult(ModelResult):
    reference_kl: Estimate  # of the exported weights; without a step behind them, of the last step
    difference: AccuracyDifference


@dataclass(frozen=True, kw_only=True)
class StudentResult(ModelResult):
    """`change` and `score` are None for students of the original teacher, and without these."""

    change: Change | None = None
    score: Estimate | None = None  # distillability; None if unmeasured
    # accuracy minus that of the student of the task-only teacher (eta = 0); None without one
    over_control: Estimate | None = None


@dataclass(frozen=True)
class DefenceResult:
    """What a provider serves instead of its model, and the students of that."""

    served: Estimate  # accuracy of the served texts
    student: Estimate  # accuracy of the students
    change: Estimate  # relative, against the students of the undefended original, same attack
    score: Estimate | None  # distillability
    price: Estimate  # accuracy of the undefended original minus that of the served texts
    undefended: Estimate  # accuracy of the students of the undefended original, by the same attack


@dataclass(frozen=True)
class CalibratedByProxy:
    """A teacher calibrated against one proxy in one mode."""

    teacher: Estimate  # accuracy
    scores: Mapping[str, Estimate]  # attack -> distillability


@dataclass(frozen=True)
class ProxyResult:
    accuracy: Estimate  # of the proxy itself
    modes: Mapping[str, CalibratedByProxy]  # calibration.mode -> teacher


@dataclass(frozen=True, kw_only=True)
class Results:
    """All numbers of a report."""

    teachers: Mapping[str, TeacherResult]
    students: Mapping[str, Mapping[str, StudentResult]]  # attack -> teacher -> students
    baselines: Mapping[str, ModelResult]  # trained without a teacher
    defences: Mapping[str, DefenceResult] = field(default_factory=dict)
    proxies: Mapping[str, ProxyResult] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRow:
    """One run of the matrix: what a record can be checked by."""

    labels: Mapping[str, str]
    # of the last evaluation, by how answers were chosen; `best`: sampled, of the best checkpoint;
    # `at_start`: sampled, of step 0
    accuracy: Mapping[str, float]
    reference_kl: float | None
    seconds: float

    def flat(self) -> dict[str, Any]:
        """As report.json has it: one object, labels beside numbers."""
        numbers = {"reference_kl": self.reference_kl, "seconds": self.seconds}
        return {**self.labels, **self.accuracy, **numbers}


@dataclass(frozen=True)
class Provenance:
    """How the runs were made. Code and versions are those of the first run."""

    code: Mapping[str, Any] | None
    versions: Mapping[str, Any] | None
    seeds: tuple[str, ...]
    runs: int
    run_seconds: int  # of all runs together
    commands: tuple[str, ...]  # the first ones


@dataclass(frozen=True, kw_only=True)
class AttackReport(Results):
    """Numbers and the sentences about them; report.json."""

    title: str
    collapse: tuple[str, ...]  # one line per attack: wrong answers, or none at all?
    verdict: tuple[str, ...]  # the acceptance rules, one line each; the collapse lines among them
    conclusion: str
    head: Provenance
    runs: tuple[RunRow, ...]
    plots: Mapping[str, str]  # file -> title
    warnings: tuple[str, ...] = ()  # guards that ended a run, and alarms
