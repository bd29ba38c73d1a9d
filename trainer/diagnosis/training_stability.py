"""Was distilling this pair stable? Read from the logs of finished runs, which may differ in
seed.
"""

import math
import os
import statistics
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reflux.trainer.config.schema import Config
from reflux.trainer.runs import commands
from reflux.trainer.runs.logger import Run, load_run
from reflux.trainer.runs.stats import over_seeds

SPIKE = 10.0  # times the running median
SCORES = ("eval/sampled", "eval/greedy")


@dataclass(frozen=True)
class NormStability:
    """Gradient norms of one run."""

    steps: int
    # fraction of steps whose norm is over SPIKE times the median of the steps so far, or not finite
    unstable: float
    worst: float  # largest norm / median of all


@dataclass(frozen=True)
class RunStability:
    """One finished distillation."""

    folder: str
    seed: int
    steps: int
    unstable: float  # as in NormStability
    worst: float
    scores: dict[str, float]  # of the last evaluation, by log field


@dataclass(frozen=True)
class FinalScore:
    """One log field of the last evaluation over all runs, with Student's t interval."""

    metric: str
    mean: float
    std: float
    low: float
    high: float
    n: int
    range: float


@dataclass(frozen=True)
class TrainingStability:
    """Over all runs: fraction of unstable steps, the worst norm, and the final score."""

    runs: tuple[RunStability, ...]
    unstable: float
    worst: float
    score: FinalScore | None  # None: no field that every run has


def norm_stability(norms: Sequence[float]) -> NormStability:
    """Norms in the order of the steps, before clipping. The running median is that of all finite
    ones up to and with the step.
    """
    finite: list[float] = []
    spikes = 0
    for norm in norms:
        if math.isfinite(norm):
            insort(finite, norm)
        spikes += not math.isfinite(norm) or norm > SPIKE * statistics.median(finite)
    middle = statistics.median(finite) if finite else math.nan
    worst = max((x if math.isfinite(x) else math.inf for x in norms), default=math.nan)
    return NormStability(
        len(norms),
        spikes / len(norms) if norms else math.nan,
        worst / middle if middle > 0 else math.nan,
    )


def read_stability(cfg: Config) -> TrainingStability | None:
    """The runs of diagnose.runs, and all of them together. None without runs. ValueError for a
    folder that is no finished distillation of this pair.
    """
    if not cfg.diagnose.runs:
        return None
    runs = tuple(_stability(folder, _finished(cfg, folder)) for folder in cfg.diagnose.runs)
    steps = sum(r.steps for r in runs)
    return TrainingStability(
        runs,
        unstable=sum(r.unstable * r.steps for r in runs) / steps,
        worst=max(r.worst for r in runs),
        score=_final_score(runs),
    )


def _final_score(runs: Sequence[RunStability]) -> FinalScore | None:
    metric = next((m for m in SCORES if all(m in r.scores for r in runs)), None)
    if metric is None:
        return None
    scores = [r.scores[metric] for r in runs]
    e = over_seeds(scores)
    return FinalScore(metric, e.mean, e.std, e.low, e.high, e.n, max(scores) - min(scores))


def _stability(folder: str, run: Run) -> RunStability:
    norms = norm_stability([s["grad_norm"] for s in run.steps])
    last: Mapping[str, Any] = next((e for e in reversed(run.events) if e["event"] == "eval"), {})
    return RunStability(
        folder,
        run.head["config"].get("seed", 0),
        norms.steps,
        norms.unstable,
        norms.worst,
        {m: last[m] for m in SCORES if m in last},
    )


def _finished(cfg: Config, folder: str) -> Run:
    try:
        run = load_run(folder)
    except ValueError as error:
        raise ValueError(f"diagnose.runs: {error}") from None
    table = run.head["config"]
    if table.get("phase") != "distill" or not run.steps:
        raise ValueError(
            f"diagnose.runs: {folder} is a run of phase = {table.get('phase')!r} with "
            f"{len(run.steps)} steps; want a distillation"
        )
    if run.summary is None:
        raise ValueError(
            f"diagnose.runs: {folder} has not ended; take it off the list, or finish it:\n"
            f"  {commands.finish(folder, run.head.get('ranks', 1))}"
        )
    for role, ours in (("model", cfg.model.path), ("teacher", cfg.teacher.path)):
        theirs = table.get(role, {}).get("path", "")
        if os.path.realpath(theirs) != os.path.realpath(ours):
            raise ValueError(
                f"diagnose.runs: {folder} has {role}.path = {theirs!r}; want this diagnosis' pair, "
                f"{ours!r}"
            )
    return run
