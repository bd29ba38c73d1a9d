"""The bars of an evaluation on the page of a run: each metric that is a fraction, from 0 to 1,
between the levels it has to be read against: chance, start and original.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import IntervalRow, Level, interval_rows
from .run_log import Line
from .run_panels import evaluation_names

KINDS = {  # level -> what it is
    "chance": "a guess among the options",
    "start": "this run's first evaluation",
    "original": "the run in eval.against",
}


@dataclass(frozen=True)
class LevelKey:
    """One entry of the legend. missing: why it is not drawn; empty where it is."""

    kind: str
    words: str
    missing: str


@dataclass(frozen=True)
class EvaluationBars:
    rows: list[IntervalRow]
    keys: list[LevelKey]


def evaluation_bars(cfg: Mapping[str, Any], evaluations: Sequence[Line]) -> EvaluationBars:
    """Of the last evaluation; no rows where there is none, or none of its metrics is a fraction."""
    if not evaluations:
        return EvaluationBars([], [])
    last = evaluations[-1]
    rows = []
    for name in evaluation_names([last]):
        mean, low, high = (_number(last, f"eval/{name}{end}") for end in ("", "_low", "_high"))
        if 0 <= mean <= 1:
            rows.append((name, mean, low, high))
    levels = {name: _levels(name, evaluations) for name, *_ in rows}
    drawn = {level.kind for found in levels.values() for level in found}
    keys = [
        LevelKey(kind, words, "" if kind in drawn else _why(kind, cfg, evaluations))
        for kind, words in KINDS.items()
    ]
    return EvaluationBars(interval_rows(rows, levels), keys if rows else [])


def _levels(name: str, evaluations: Sequence[Line]) -> list[Level]:
    first, last = evaluations[0], evaluations[-1]
    # a guess is one answer: pass@k has another chance
    chance = math.nan if name.rpartition("/")[2].startswith("pass@") else _chance(last)
    start = _number(first, f"eval/{name}") if first is not last else math.nan
    original = _number(last, f"eval/{name}") - _number(last, f"eval/{name}_difference")
    found = (Level("chance", chance), Level("start", start), Level("original", original))
    return [level for level in found if math.isfinite(level.value)]


def _chance(line: Line) -> float:
    return _number(line, "eval/chance")


def _why(kind: str, cfg: Mapping[str, Any], evaluations: Sequence[Line]) -> str:
    """Why a level is known of no metric."""
    if kind == "chance":
        return "the questions have no options to guess among"
    if kind == "original":
        against = (cfg.get("eval") or {}).get("against")
        return (
            "there is no common metric with eval.against"
            if against
            else "eval.against names no run of the original model"
        )
    if cfg.get("phase") == "evaluate":
        return "the phase evaluate trains nothing; name the run before in eval.against"
    return "there is one evaluation yet" if len(evaluations) == 1 else "it was not a number"


def _number(line: Line, key: str) -> float:
    x = line.get(key)
    return float(x) if isinstance(x, int | float) else math.nan
