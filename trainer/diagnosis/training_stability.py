"""Was distilling this pair stable? Read from the logs of finished runs, which may differ in
seed.
"""

import math
import os
import statistics
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reflux.trainer.config.schema import Config
from reflux.trainer.runs.logger import Run, load_run
from reflux.trainer.runs.stats import over_seeds

SPIKE = 10.0  # times the running median
SCORES = ("eval/sampled", "eval/greedy")


@dataclass(frozen=True)
class Stability:
    """Gradient norms of one run."""

    steps: int
    # share of steps whose norm is over SPIKE times the median of the steps so far, or not finite
    unstable: float
    worst: float  # largest norm / median of all


def norm_stability(norms: Sequence[float]) -> Stability:
    """Norms in the order of the steps, before clipping. The running median is that of all finite
    ones up to and with the step.
    """
    seen: list[float] = []
    spikes = 0
    for norm in norms:
        if math.isfinite(norm):
            insort(seen, norm)
        spikes += not math.isfinite(norm) or norm > SPIKE * statistics.median(seen)
    middle = statistics.median(seen) if seen else math.nan
    worst = max((x if math.isfinite(x) else math.inf for x in norms), default=math.nan)
    return Stability(
        len(norms),
        spikes / len(norms) if norms else math.nan,
        worst / middle if middle > 0 else math.nan,
    )


def read_stability(cfg: Config) -> dict[str, Any] | None:
    """diagnose.runs -> one row a run, and over the runs the share of unstable steps and the spread
    of the final score.

    None without runs. ValueError for a folder that is no finished distillation of this pair.
    """
    if not cfg.diagnose.runs:
        return None
    rows = [_row(cfg, folder, _finished(cfg, folder)) for folder in cfg.diagnose.runs]
    steps = sum(r["steps"] for r in rows)
    metric = next((m for m in SCORES if all(m in r["scores"] for r in rows)), None)
    scores = [r["scores"][metric] for r in rows] if metric else []
    return {
        "runs": rows,
        "unstable": sum(r["unstable"] * r["steps"] for r in rows) / steps,
        "worst": max(r["worst"] for r in rows),
        "score": {
            "metric": metric,
            **over_seeds(scores)._asdict(),
            "range": max(scores) - min(scores),
        }
        if scores
        else None,
    }


def _row(cfg: Config, folder: str, run: Run) -> dict[str, Any]:
    norms = [s["grad_norm"] for s in run.steps]
    last = next((e for e in reversed(run.events) if e["event"] == "eval"), {})
    return {
        "folder": folder,
        "seed": run.head["config"].get("seed", 0),
        **vars(norm_stability(norms)),
        "scores": {m: last[m] for m in SCORES if m in last},
    }


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
            f"diagnose.runs: {folder} has not ended; run its command again to finish it, or take "
            "it off the list"
        )
    for role, ours in (("model", cfg.model.path), ("teacher", cfg.teacher.path)):
        theirs = table.get(role, {}).get("path", "")
        if os.path.realpath(theirs) != os.path.realpath(ours):
            raise ValueError(
                f"diagnose.runs: {folder} has {role}.path = {theirs!r}; want this diagnosis' pair, "
                f"{ours!r}"
            )
    return run
