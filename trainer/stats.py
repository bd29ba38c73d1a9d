"""Small statistics with their uncertainty: pure functions of lists of numbers."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# two-sided 95 % quantiles of Student's t for 1 ... 9 degrees of freedom; 1.96 beyond 30, linear steps are not needed
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean with its spread. `low`, `high`: 95 % interval of the mean; NaN for one value."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean, sample standard deviation and Student-t interval over independent runs."""
    x = np.asarray(values, float)
    if len(x) == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    std = float(x.std(ddof=1))
    t = T95[len(x) - 2] if len(x) - 2 < len(T95) else 1.96 + 2.7 / (len(x) - 1)
    half = t * std / math.sqrt(len(x))
    return Estimate(mean, std, mean - half, mean + half, len(x))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Mean of after - before over the same items, with the normal 95 % interval of a paired test."""
    if len(after) != len(before):
        raise ValueError(f"paired_difference: {len(after)} and {len(before)} items; want the same items in the same order")
    d = np.asarray(after, float) - np.asarray(before, float)
    if len(d) < 2:
        return Estimate(float(d.mean()) if len(d) else math.nan, math.nan, math.nan, math.nan, len(d))
    half = 1.96 * float(d.std(ddof=1)) / math.sqrt(len(d))
    return Estimate(float(d.mean()), float(d.std(ddof=1)), float(d.mean()) - half, float(d.mean()) + half, len(d))


def relative_change(after: float, before: float) -> float:
    """(after - before) / before; NaN when there was nothing to lose."""
    return (after - before) / before if before else math.nan
