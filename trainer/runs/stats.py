"""Small statistics with their uncertainty: pure functions of lists of numbers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

DRAWS = 2000  # of every bootstrap
FLIPS = 10_000  # of signs, where there are too many to take all
TABLE = 2**20  # numbers drawn at once, at most
# two-sided 95 % quantiles of Student's t for 1 ... 9 degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

K = TypeVar("K", bound=Any)  # a prompt, or a prompt of a run: whatever can be sorted


class Estimate(NamedTuple):
    """A mean with its uncertainty. `std`: standard deviation of the values, or as the function says
    that makes it. `low`, `high`: 95 % interval of the mean; NaN for one value.
    """

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
    half = _t95(len(x)) * std / math.sqrt(len(x))
    return Estimate(mean, std, mean - half, mean + half, len(x))


def may_be_zero(change: Estimate) -> bool:
    """Of several runs: whether the 95 % interval of the change holds 0."""
    return change.n > 1 and change.low <= 0 <= change.high


def _t95(count: int) -> float:
    """Two-sided 95 % quantile of Student's t of a mean of `count` >= 2 values; beyond the table
    within 0.01 of it.
    """
    return T95[count - 2] if count - 2 < len(T95) else 1.96 + 2.7 / (count - 1)


def jackknife(whole: float, without: Sequence[float]) -> Estimate:
    """A statistic of n independent parts, `without[i]` the same without the i-th: whole +- t
    sqrt((n - 1) / n sum (x_i - mean)^2).

    For a mean that is over_seeds. `std` is the standard error times sqrt(n). No interval from fewer
    than two parts.
    """
    x = np.asarray(without, float)
    if len(x) < 2:
        return Estimate(whole, math.nan, math.nan, math.nan, len(x))
    error = math.sqrt((len(x) - 1) / len(x) * float(((x - x.mean()) ** 2).sum()))
    half = _t95(len(x)) * error
    return Estimate(whole, error * math.sqrt(len(x)), whole - half, whole + half, len(x))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Mean of after - before over the same items, with the normal 95 % interval of a paired
    test.
    """
    if len(after) != len(before):
        raise ValueError(
            f"paired_difference: {len(after)} and {len(before)} items; want the same items in the "
            "same order"
        )
    d = np.asarray(after, float) - np.asarray(before, float)
    mean = float(d.mean()) if len(d) else math.nan
    if len(d) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, len(d))
    std = float(d.std(ddof=1))
    half = 1.96 * std / math.sqrt(len(d))
    return Estimate(mean, std, mean - half, mean + half, len(d))


def relative_change(after: float, before: float) -> float:
    """(after - before) / before; NaN when there was nothing to lose."""
    return (after - before) / before if before else math.nan


def mean_over_prompts(values: Mapping[K, float]) -> Estimate:
    """Mean of one value a prompt, with its bootstrap interval over prompts."""
    return bootstrap_ratio(values, dict.fromkeys(values, 1.0))


def bootstrap_ratio(top: Mapping[K, float], bottom: Mapping[K, float]) -> Estimate:
    """sum(top) / sum(bottom) with a 95 % percentile interval over prompts: both sums are drawn
    together, prompt by prompt, DRAWS times.

    Tokens of one prompt are not independent, so prompts are what is drawn. `std` is that of the
    draws; `n` counts prompts. NaN where the bottom is 0; no interval from one prompt.
    """
    keys = sorted(bottom)
    a, b = (np.array([x.get(k, 0.0) for k in keys], float) for x in (top, bottom))
    if not len(keys) or b.sum() == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, len(keys))
    mean = float(a.sum() / b.sum())
    if len(keys) == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [a[rows].sum(1) / b[rows].sum(1) for rows in _drawn(len(keys))]
    return _percentile(mean, np.concatenate(ratios), len(keys))


def bootstrap(statistic: Callable[[Sequence[K]], float], keys: Sequence[K]) -> Estimate:
    """The same of any statistic of drawn keys (prompts, repeated ones repeat)."""
    keys = list(keys)
    mean = statistic(keys) if keys else math.nan
    if len(keys) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, len(keys))
    values = [statistic([keys[i] for i in row]) for rows in _drawn(len(keys)) for row in rows]
    return _percentile(mean, np.array(values), len(keys))


def _drawn(count: int) -> Iterator[np.ndarray]:
    """DRAWS rows of `count` numbers below `count`, the same at every call, in tables of bounded
    size.
    """
    g, at_once = np.random.default_rng(0), max(1, TABLE // count)
    for done in range(0, DRAWS, at_once):
        yield g.integers(count, size=(min(at_once, DRAWS - done), count))


def _percentile(mean: float, draws: np.ndarray, count: int) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if len(draws) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, count)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(mean, float(draws.std(ddof=1)), float(low), float(high), count)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of "paired differences are as often negative as positive": the fraction of sign
    flips with a sum as far from 0.

    Exact (all flips) for at most 13 differences that are not 0, else (1 + hits) / (1 + FLIPS). 1
    where nothing differs.
    """
    d = np.asarray([x for x in differences if x], float)
    if not len(d):
        return 1.0
    # the observed flip counts, whatever the order of the sum rounds to
    far = abs(d.sum()) * (1 - 1e-12)
    if len(d) <= 13:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
        return float(np.mean(np.abs(signs @ d) >= far))
    g, at_once, hits = np.random.default_rng(0), max(1, TABLE // len(d)), 0
    for done in range(0, FLIPS, at_once):
        signs = 1 - 2 * g.integers(2, size=(min(at_once, FLIPS - done), len(d)), dtype=np.int8)
        hits += int((np.abs(signs @ d) >= far).sum())
    return (1 + hits) / (1 + FLIPS)
