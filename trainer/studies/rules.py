"""What a rule makes of an estimate over seeds: by its whole 95 % interval, and by three seeds or
more (A4 of docs/method.md).
"""

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
