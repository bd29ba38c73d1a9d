"""The finished runs of a matrix folder, and what is compared between them."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflux.trainer.runs.answer_files import kept_step
from reflux.trainer.runs.logger import Run, load_run
from reflux.trainer.runs.stats import (
    Estimate,
    over_seeds,
    paired_difference,
    ratio_over_runs,
    relative_over_seeds,
)

from .labels import refuse_shared_places
from .results import Change, Checkpoint, QueryCost, SeedPairs

MODES = ("sampled", "greedy")
# (seed, prompt) -> fraction of the prompt's sampled answers that are correct, or their mean reward
AccuracyByPrompt = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class FinishedRun:
    """A run of the matrix that has ended and was evaluated: its labels, log, and predictions."""

    labels: Mapping[str, str]
    run: Run
    folder: Path

    @property
    def seconds(self) -> float:
        assert self.run.summary is not None, f"{self.folder}: has not ended"
        return self.run.summary["wall_s"]

    @property
    def kept_step(self) -> float:
        """The step of the exported weights, where a guard went back to one; else inf."""
        return kept_step(self.run.events)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of the steps that the exported weights have made."""
        return [s for s in self.run.steps if s["step"] <= self.kept_step]

    @property
    def reference_kl(self) -> float | None:
        """KL(policy || original), nats per token. The numbers of a step are of the weights before
        its update: those of weights that a guard went back to stand a step later. Of weights that
        no later step measured, those of the last step; None where none was measured.
        """
        logged = [s for s in self.run.steps if "reference_kl" in s]
        measured = [s for s in logged if s["step"] == self.kept_step + 1]
        measured += [s for s in logged if s["step"] <= self.kept_step][-1:]
        return measured[0]["reference_kl"] if measured else None

    def evals(self) -> list[dict[str, Any]]:
        """The evaluations of weights that were kept, in order."""
        evals = (e for e in self.run.events if e["event"] == "eval")
        return [e for e in evals if e["step"] <= self.kept_step]

    def measures(self, mode: str) -> bool:
        """Whether the last evaluation has this accuracy: `eval.samples` = 0 has no sampled one,
        `eval.by` = "likelihood" neither that nor a greedy one.
        """
        return f"eval/{mode}" in self.evals()[-1]

    def accuracy(self, mode: str) -> float:
        """Of the last evaluation; `mode`: sampled, greedy, likelihood_sum, ... One that it
        measures.
        """
        return self.evals()[-1][f"eval/{mode}"]

    def best_accuracy(self) -> float:
        """Sampled accuracy of the best checkpoint after the start: what an attacker gets who stops
        early.
        """
        after_start = (e["eval/sampled"] for e in self.evals() if e["step"] and "eval/sampled" in e)
        return max(after_start, default=self.accuracy("sampled"))

    def predictions(self, step: int | None = None) -> list[dict[str, Any]]:
        """Of the last evaluation, or of the one at `step`, those that have a grade: a failed one
        says nothing of its text. Empty if there was none at that step.
        """
        last = self.evals()[-1]["step"]
        file = self.folder / "predictions" / f"step-{last if step is None else step}.jsonl"
        if step is not None and not file.exists():
            return []
        rows = [json.loads(line) for line in file.read_text().split("\n") if line]
        return [row for row in rows if row.get("error") is None]


# --- finding runs


def load_finished_runs(folder: Path, family: str = "") -> list[FinishedRun]:
    """The runs of a matrix folder that have ended, were evaluated, and have a label `role`. family:
    only those of it, and those that name none. ValueError where two would count as two seeds.
    """
    found: dict[str, FinishedRun] = {}
    for cell in json.loads((folder / "matrix.json").read_text())["cells"]:
        labels = cell["labels"]
        if "role" in labels and family in ("", labels.get("family", family)):
            run = _finished(labels, folder / cell["folder"])
            found |= {cell["name"]: run} if run else {}
    refuse_shared_places(folder, [(name, r.labels) for name, r in found.items()])
    return list(found.values())


def _finished(labels: Mapping[str, str], folder: Path) -> FinishedRun | None:
    """None for a run without an end or an evaluation, and for one that was killed before the first
    line of its log was whole (run_warnings names it).
    """
    try:
        run = FinishedRun(labels, load_run(folder), folder)
    except ValueError:
        return None
    return run if run.run.summary is not None and run.evals() else None


def with_role(runs: Iterable[FinishedRun], role: str) -> list[FinishedRun]:
    return [r for r in runs if r.labels["role"] == role]


def labelled(runs: Iterable[FinishedRun], **labels: str) -> list[FinishedRun]:
    return [r for r in runs if all(r.labels.get(k) == v for k, v in labels.items())]


def grouped(runs: Iterable[FinishedRun], label: str) -> dict[str, list[FinishedRun]]:
    groups = defaultdict(list)
    for r in runs:
        groups[r.labels[label]].append(r)
    return dict(groups)


def same_seed(
    after: Iterable[FinishedRun], before: Iterable[FinishedRun]
) -> list[tuple[FinishedRun, FinishedRun]]:
    """Pairs of runs with the same seed, in the order of `after`."""
    base = {r.labels["seed"]: r for r in before}
    return [(r, base[r.labels["seed"]]) for r in after if r.labels["seed"] in base]


def both_measure(
    pairs: Iterable[tuple[FinishedRun, FinishedRun]], mode: str
) -> list[tuple[FinishedRun, FinishedRun]]:
    return [(a, b) for a, b in pairs if a.measures(mode) and b.measures(mode)]


# --- comparing them


def mean_accuracy(runs: Iterable[FinishedRun], mode: str = "sampled") -> Estimate:
    return over_seeds([r.accuracy(mode) for r in runs if r.measures(mode)])


def gap_by_seed(
    after: Iterable[FinishedRun], before: Iterable[FinishedRun], mode: str = "sampled"
) -> list[float]:
    """Differences of accuracy between runs of the same seed that both have one."""
    pairs = both_measure(same_seed(after, before), mode)
    return [a.accuracy(mode) - b.accuracy(mode) for a, b in pairs]


def paired_by_prompt(pairs: Iterable[tuple[FinishedRun, FinishedRun]], mode: str) -> Estimate:
    """Accuracy difference on the same prompts, items of all seeds pooled: an item-level interval,
    blind to what another seed would give.
    """
    after: list[float] = []
    before: list[float] = []
    for run, base in pairs:
        mine, others = _correct(run, mode), _correct(base, mode)
        keys = sorted(mine.keys() & others.keys())
        after += [mine[k] for k in keys]
        before += [others[k] for k in keys]
    return paired_difference(after, before)


def _correct(run: FinishedRun, mode: str) -> dict[tuple[int, int], float]:
    rows = [p for p in run.predictions() if p["mode"] == mode]
    return {(p["prompt"], p["sample"]): grade for p, grade in zip(rows, grades(rows))}


def knows_correct(predictions: Iterable[Mapping[str, Any]]) -> bool:
    """Whether their grader tells correct answers from wrong ones; a reward model does not."""
    return all(p["correct"] is not None for p in predictions)


def grades(predictions: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 or 0 of each answer, or its reward where the grader knows no correct ones, as `eval/...` of
    the log has them: a truncated text that no grader saw counts at most as the least of the others.
    """
    if knows_correct(predictions):
        return [float(p["correct"]) for p in predictions]
    seen = [p.get("graded", True) for p in predictions]
    least = min([0.0, *(p["reward"] for p, graded in zip(predictions, seen) if graded)])
    return [p["reward"] if graded else least for p, graded in zip(predictions, seen)]


def accuracy_change(after: Sequence[FinishedRun], before: Sequence[FinishedRun]) -> Change:
    """See Change. A mean of per-seed ratios would be ruled by the seed with the lowest baseline.
    Rewards below 0 have no ratios.
    """
    runs = same_seed(after, before)

    def paired(accuracy: Callable[[FinishedRun], float], mode: str = "sampled") -> SeedPairs:
        pairs = both_measure(runs, mode)
        return SeedPairs(
            seeds=tuple(a.labels["seed"] for a, _ in pairs),
            after=tuple(accuracy(a) for a, _ in pairs),
            before=tuple(accuracy(b) for _, b in pairs),
        )

    pairs: dict[Checkpoint, SeedPairs] = {
        "last": paired(lambda r: r.accuracy("sampled")),
        "best": paired(FinishedRun.best_accuracy),
    }
    greedy = paired(lambda r: r.accuracy("greedy"), "greedy")
    return Change(
        sampled=_relative(pairs["last"]),
        greedy=_relative(greedy),
        best=_relative(pairs["best"]),
        pairs=pairs,
    )


def _relative(pairs: SeedPairs) -> Estimate:
    if min([*pairs.after, *pairs.before], default=0.0) < 0:
        return over_seeds([])
    return relative_over_seeds(pairs.after, pairs.before)


# --- distillability


def distillability(runs: Sequence[FinishedRun], attack: str, teacher: str) -> Estimate | None:
    """Of a teacher under an attack; see gain_ratio."""
    students = labelled(runs, role="student", attack=attack, teacher=teacher)
    originals = labelled(runs, role="student", attack=attack, teacher="original")
    return gain_ratio(students, originals, before_attack(students, runs))


def before_attack(students: Sequence[FinishedRun], runs: Sequence[FinishedRun]) -> AccuracyByPrompt:
    """Accuracy of the students before the attack: of the run that the label `start` names, else 0
    for random weights, which answer nothing, else of their own evaluation at step 0. Empty where
    none of these is there.
    """
    if start := students[0].labels.get("start"):
        return accuracy_by_prompt(labelled(runs, role="start", student=start))
    if students[0].run.head["config"].get("model", {}).get("from_scratch"):
        return dict.fromkeys(accuracy_by_prompt(students), 0.0)
    return accuracy_by_prompt(students, step=0)


def gain_ratio(
    students: Sequence[FinishedRun], originals: Sequence[FinishedRun], before: AccuracyByPrompt
) -> Estimate | None:
    """What students gained from a teacher / what they gained from the original by the same attack
    at the same budget, by sampled answers, over the prompts that all have; interval over seeds
    (stats.ratio_over_runs). None without `before`, or where the gain from the original is less than
    three of its item-level standard errors.
    """
    if not before or not originals or not students:
        return None
    after, base = accuracy_by_prompt(students), accuracy_by_prompt(originals)
    keys = sorted(after.keys() & base.keys() & before.keys())
    gain = paired_difference([base[k] for k in keys], [before[k] for k in keys])
    if len(keys) < 2 or not gain.mean > 3 * gain.std / math.sqrt(len(keys)):
        return None
    top: dict[str, list[float]] = defaultdict(list)
    bottom: dict[str, list[float]] = defaultdict(list)
    for seed, prompt in keys:
        top[seed].append(after[seed, prompt] - before[seed, prompt])
        bottom[seed].append(base[seed, prompt] - before[seed, prompt])
    return ratio_over_runs(top, bottom)


def accuracy_by_prompt(runs: Iterable[FinishedRun], step: int | None = None) -> AccuracyByPrompt:
    """At the last evaluation, or at that of a step."""
    answers: dict[tuple[str, int], list[float]] = defaultdict(list)
    for r in runs:
        rows = [p for p in r.predictions(step) if p["mode"] == "sampled"]
        for p, grade in zip(rows, grades(rows)):
            answers[r.labels["seed"], p["prompt"]].append(grade)
    return {key: sum(found) / len(found) for key, found in answers.items()}


# --- one run


def query_cost(run: FinishedRun) -> QueryCost:
    config = run.run.head["config"]
    distill, rollout = config.get("distill", {}), config.get("rollout", {})
    texts = config.get("steps", 0) * rollout.get("prompts", 0) * rollout.get("group", 0)
    on_policy = round(texts * distill.get("on_policy", 0))
    written = 0
    if from_teacher := distill.get("source") == "teacher":
        budget = distill.get("query_budget")
        written = budget * rollout["group"] if budget else texts - on_policy
    read = dict.fromkeys(("kl", "class", "byte", "policy_gradient"), texts)
    read["span"] = on_policy if from_teacher else texts
    n_read = read.get(distill.get("objective"), 0)
    lengths = [s["length"] for s in run.run.steps if "length" in s]
    tokens = round((written + n_read) * sum(lengths) / max(len(lengths), 1))
    return QueryCost(written=written, read=n_read, tokens=tokens, seconds=run.seconds)


def last_steps(runs: Iterable[FinishedRun], key: str) -> Estimate:
    """Over runs: the mean of a metric over the last five steps that logged it."""
    rows = [[s[key] for s in r.steps if key in s][-5:] for r in runs]
    return over_seeds([sum(row) / len(row) for row in rows if row])


def length_ratio(run: FinishedRun) -> float:
    """Mean length of the run's texts over its last five steps / in its first; NaN without."""
    lengths = [s["length"] for s in run.steps if "length" in s]
    last = lengths[-5:]
    return sum(last) / len(last) / lengths[0] if lengths and lengths[0] else math.nan


def late_spike(run: FinishedRun) -> float:
    """Largest gradient norm of the second half of a run / their median there (the first half holds
    the warm-up); inf where a loss or norm of the run is not finite, NaN without steps.
    """
    rows = [(s["loss"], s["grad_norm"]) for s in run.run.steps if "grad_norm" in s]
    if not all(math.isfinite(x) for row in rows for x in row):
        return math.inf
    norms = [norm for _, norm in rows[len(rows) // 2 :]]
    median = statistics.median(norms) if norms else 0.0
    return max(norms) / median if median else math.nan
