"""Small statistics with their uncertainty: pure functions of lists of numbers.

What an interval is over decides what may be said. Over **runs** (over_seeds, ratio_over_seeds,
relative_over_seeds, ratio_over_runs): another seed would give a number in it. Over **items**
(paired_difference, mean_over_prompts, bootstrap_ratio, bootstrap): another set of prompts would,
for these very weights; it says nothing about another seed, and is called item-level wherever a
number stands for several runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

DRAWS = 2000  # of every bootstrap
FLIPS = 10_000  # of signs, where there are too many to take all
TABLE = 2**20  # numbers drawn at once, at most
MAX_UNDEFINED = 0.05  # of the draws
MANY_SEEDS = 10  # from here on a bootstrap over seeds and items; below, Student's t over seeds

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
    half = t95(len(x)) * std / math.sqrt(len(x))
    return Estimate(mean, std, mean - half, mean + half, len(x))


def ratio_over_seeds(top: Sequence[float], bottom: Sequence[float]) -> Estimate:
    """mean(top) / mean(bottom) over paired runs, with Fieller's 95 % interval: the ratios r for
    which top - r bottom has a Student-t interval over runs that holds 0 (Fieller, 1954).

    So r outside the interval is the same as a paired t test at 5 %, the spread of the bottom
    included. `std`: of (top - ratio bottom) / mean(bottom). No mean where the bottom is 0; no
    interval from one run, or where the bottom's own interval holds 0 (then it is unbounded).
    """
    a, b = np.asarray(top, float), np.asarray(bottom, float)
    if len(a) != len(b):
        raise ValueError(
            f"ratio_over_seeds: {len(a)} and {len(b)} runs; want the same seeds in the same order"
        )
    if not len(a) or not b.mean():
        return over_seeds([])
    n, ratio = len(a), float(a.mean() / b.mean())
    if n == 1:
        return Estimate(ratio, math.nan, math.nan, math.nan, 1)
    std = float((a - ratio * b).std(ddof=1)) / abs(float(b.mean()))
    (aa, ab), (_, bb) = np.cov(a, b, ddof=1).tolist()
    low, high = fieller(float(a.mean()), float(b.mean()), aa, ab, bb, n)
    return Estimate(ratio, std, min(low, ratio), max(high, ratio), n)  # NaN stays NaN


def fieller(
    top: float, bottom: float, var_top: float, cov: float, var_bottom: float, n: int
) -> tuple[float, float]:
    """(low, high) of top / bottom, the means of n pairs with these sample (co)variances; NaN where
    the set of ratios is unbounded.
    """
    k = t95(n) ** 2 / n
    # r^2 (bottom^2 - k var_bottom) - 2 r (top bottom - k cov) + top^2 - k var_top <= 0
    square, half, constant = (
        bottom**2 - k * var_bottom,
        top * bottom - k * cov,
        top**2 - k * var_top,
    )
    if square <= 0:
        return math.nan, math.nan
    root = math.sqrt(max(half**2 - square * constant, 0.0))
    return (half - root) / square, (half + root) / square


def relative_over_seeds(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Relative change of a number that cannot be negative: ratio_over_seeds - 1, its interval cut
    at -1, for nothing loses more than all of it.
    """
    r = ratio_over_seeds(after, before)
    low = r.low if math.isnan(r.low) else max(r.low, 0.0)
    return Estimate(r.mean - 1, r.std, low - 1, r.high - 1, r.n)


def ratio_p(top: Sequence[float], bottom: Sequence[float], ratio: float) -> float:
    """Two-sided p of mean(top) = ratio mean(bottom), a paired t test over runs; NaN for fewer than
    two. Below 0.05 just where the interval of ratio_over_seeds leaves `ratio` out.
    """
    d = np.asarray(top, float) - ratio * np.asarray(bottom, float)
    if len(d) < 2:
        return math.nan
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    if not error:
        return 1.0 if not d.mean() else 0.0
    return t_tail(float(d.mean()) / error, len(d) - 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: rejecting where it is at most 0.05 has a chance of at most 5 % to reject
    any true hypothesis of the family, however they depend on each other (Holm, 1979). NaN stays NaN
    and counts in the family.
    """
    adjusted, largest = list(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = math.nan if math.isnan(p[i]) else largest
    return adjusted


def may_be_zero(change: Estimate) -> bool:
    """Whether the 95 % interval of the change holds 0, or there is none (one run)."""
    return not (change.low > 0 or change.high < 0)


@lru_cache
def t95(count: int) -> float:
    """Two-sided 95 % quantile of Student's t of a mean of `count` >= 2 values."""
    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, count - 1) > 0.05 else (low, middle)
    return high


def t_tail(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4), within 1e-12.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for j in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * j / (j + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(1 - inside, 0.0)


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
    half = t95(len(x)) * error
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


def ratio_over_runs(
    top: Mapping[K, Sequence[float]], bottom: Mapping[K, Sequence[float]]
) -> Estimate:
    """mean over seeds of the items' mean of the top / the same of the bottom; seed -> one value an
    item, the same items on both sides. Interval over runs: ratio_over_seeds of the seeds' means
    below MANY_SEEDS, else a percentile bootstrap that draws seeds, and items inside each.
    """
    keys = sorted(top.keys() & bottom.keys())
    rows = [np.array([top[k], bottom[k]], float) for k in keys]
    means = np.array([row.mean(1) for row in rows]).reshape(-1, 2)
    whole = ratio_over_seeds(means[:, 0].tolist(), means[:, 1].tolist())
    if len(keys) < MANY_SEEDS or not whole.n:
        return whole
    g, drawn = np.random.default_rng(0), len(rows)
    chosen = g.integers(drawn, size=(DRAWS, drawn))  # seeds
    sums = np.zeros((DRAWS, drawn, 2))
    for i, row in enumerate(rows):
        count = int((chosen == i).sum())
        items = g.integers(row.shape[1], size=(count, row.shape[1]))  # anew in every draw
        sums[chosen == i] = row[:, items].mean(2).T
    top_sum, bottom_sum = sums.sum(1).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return _percentile(whole.mean, top_sum / bottom_sum, len(keys))


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
    """No interval without a mean, nor where over MAX_UNDEFINED of the draws are no number: the rest
    would be a selection.
    """
    defined = draws[np.isfinite(draws)]
    if math.isnan(mean) or len(defined) < (1 - MAX_UNDEFINED) * len(draws) or len(defined) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, count)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(mean, float(defined.std(ddof=1)), float(low), float(high), count)


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
