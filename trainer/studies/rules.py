"""What a rule makes of an estimate over seeds: by its whole 95 % interval, and by three seeds or
more (A4 of docs/method.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from reflux.trainer.runs.stats import Estimate

from .results import Rule

MIN_SEEDS = 3  # A4: fewer give no verdict, however narrow the interval of two may be


def enough_seeds(e: Estimate) -> bool:
    return e.n >= MIN_SEEDS


def at_least(e: Estimate, limit: float) -> Rule:
    """By the whole interval. Without one, or from too few seeds, inconclusive."""
    if not enough_seeds(e):
        return "inconclusive"
    if e.low >= limit:
        return "holds"
    return "violated" if e.high < limit else "inconclusive"


def at_most(e: Estimate, limit: float) -> Rule:
    if not enough_seeds(e):
        return "inconclusive"
    if e.high <= limit:
        return "holds"
    return "violated" if e.low > limit else "inconclusive"


def worst(*rules: Rule) -> Rule:
    """Of rules that all have to hold."""
    order: tuple[Rule, ...] = ("violated", "inconclusive", "holds")
    return min(rules, key=order.index)


def has_bounds(e: Estimate) -> bool:
    """Whether its interval is there and bounded; not from one run, nor of a ratio whose bottom may
    be 0.
    """
    return e.n > 1 and math.isfinite(e.low) and math.isfinite(e.high)


@dataclass(frozen=True)
class MeanOverAttacks:
    """Of a ratio. One whose bottom may be 0 can be of any size, so it is named and not averaged,
    unless there is no other.
    """

    value: float
    attacks: int  # in the mean
    bounded: int
    unbounded: tuple[str, ...]  # attacks without a bounded interval

    def say_bounds(self) -> str:
        """Empty where every attack has a bounded interval."""
        if not self.unbounded:
            return ""
        if not self.bounded:
            return "no bounded interval"
        return (
            f"{self.bounded} of {self.bounded + len(self.unbounded)} bounded; "
            f"without a bounded interval: {', '.join(self.unbounded)}"
        )


def mean_over_attacks(scores: Mapping[str, Estimate]) -> MeanOverAttacks:
    """attack -> ratio; at least one."""
    unbounded = tuple(a for a, e in scores.items() if not has_bounds(e))
    values = [e.mean for a, e in scores.items() if a not in unbounded]
    mine = values or [e.mean for e in scores.values()]
    return MeanOverAttacks(sum(mine) / len(mine), len(mine), len(values), unbounded)
