"""Statistics against values by hand, laws, and how often intervals cover the truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.runs.stats import (
    bootstrap,
    bootstrap_ratio,
    holm,
    may_be_zero,
    mean_over_prompts,
    over_seeds,
    paired_difference,
    ratio_over_runs,
    ratio_over_seeds,
    ratio_p,
    relative_change,
    relative_over_seeds,
    sign_flip_p,
    t95,
    t_tail,
)

FINITE = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


def test_three_values_by_hand():
    e = over_seeds([1.0, 2.0, 3.0])
    assert (e.mean, e.std, e.n) == (2.0, 1.0, 3)
    # Student's t, 2 degrees of freedom
    assert e.high - e.mean == pytest.approx(4.302653 / math.sqrt(3))


def test_one_value_has_no_std_and_none_has_no_mean():
    assert over_seeds([0.5]).mean == 0.5 and math.isnan(over_seeds([0.5]).low)
    assert math.isnan(over_seeds([]).mean)


@given(values=FINITE, shift=st.floats(-5, 5))
def test_a_shift_moves_the_interval_and_not_its_width(values, shift):
    a, b = over_seeds(values), over_seeds([v + shift for v in values])
    assert b.mean == pytest.approx(a.mean + shift, abs=1e-9)
    assert b.high - b.low == pytest.approx(a.high - a.low, abs=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [
        e.low <= 1.0 <= e.high for e in (over_seeds(rng.normal(1.0, 2.0, 5)) for _ in range(400))
    ]
    assert 0.91 <= np.mean(hits) <= 0.985


def test_paired_differences_use_the_pairing():
    before = np.tile([0.0, 1.0], 200)  # items differ a lot, the change does not
    after = before.copy()
    after[:20:2] = 1.0
    e = paired_difference(after, before)
    assert e.mean == pytest.approx(10 / 400) and e.low > 0
    by_hand = paired_difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    half = 1.959964 / math.sqrt(3)  # of a standard normal
    assert by_hand == pytest.approx((2.0, 1.0, 2.0 - half, 2.0 + half, 3), rel=1e-4)
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [1.0, 0.0])


def test_relative_change_of_nothing_is_no_number():
    assert relative_change(0.6, 0.4) == pytest.approx(0.5) and math.isnan(relative_change(0.6, 0.0))


def test_a_bootstrap_draws_both_sums_of_a_prompt_together():
    """Every prompt has the same ratio: however it is drawn, that is the answer."""
    e = bootstrap_ratio({i: 2.0 * (i + 1) for i in range(9)}, {i: i + 1.0 for i in range(9)})
    assert (e.mean, e.low, e.high, e.n) == (2.0, 2.0, 2.0, 9)


def test_a_bootstrap_interval_has_the_width_of_the_mean():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    e = bootstrap_ratio(dict(enumerate(values)), {i: 1.0 for i in range(400)})
    assert e.mean == pytest.approx(values.mean()) and e.std == pytest.approx(2.0 / 20, rel=0.15)
    assert e.high - e.low == pytest.approx(2 * 1.96 * 0.1, rel=0.15)
    assert mean_over_prompts(dict(enumerate(values))) == e


def test_every_bootstrap_has_the_same_draws():
    values = np.random.default_rng(0).normal(5.0, 2.0, 40)
    whole = mean_over_prompts(dict(enumerate(values)))
    any_statistic = bootstrap(lambda drawn: float(np.mean([values[i] for i in drawn])), range(40))
    assert any_statistic == pytest.approx(whole, rel=1e-12)


def test_a_change_over_several_seeds_may_be_zero():
    """One seed has no interval, so nothing is excluded."""
    assert may_be_zero(over_seeds([0.1, -0.1, 0.05])) and may_be_zero(over_seeds([0.1]))
    assert not may_be_zero(over_seeds([0.1, 0.11, 0.12]))
    assert may_be_zero(over_seeds([0.0, 0.0, 0.0])) and may_be_zero(over_seeds([-0.1]))
    assert not may_be_zero(over_seeds([-0.1, -0.11, -0.12]))


def test_a_bootstrap_without_anything_to_draw():
    assert (
        math.isnan(bootstrap_ratio({}, {}).mean) and bootstrap_ratio({0: 3.0}, {0: 2.0})[0] == 1.5
    )
    assert math.isnan(bootstrap_ratio({0: 3.0}, {0: 2.0}).low) and math.isnan(
        bootstrap_ratio({0: 1.0}, {0: 0.0}).mean
    )
    assert bootstrap(lambda drawn: 1.0, []).n == 0 and math.isnan(
        bootstrap(lambda drawn: 1.0, [4]).low
    )
    assert math.isnan(bootstrap(lambda drawn: math.nan, [1, 2]).low)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_sign_flips_are_enumerated_where_they_are_few(values):
    sums = [
        abs(sum(s * v for s, v in zip(signs, values)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    assert sign_flip_p(values) == pytest.approx(
        sum(x >= abs(sum(values)) for x in sums) / len(sums)
    )


def test_sign_flips_are_drawn_where_they_are_many():
    """Twenty of twenty of one sign: 2 in 2**20 flips are as far; half and half: nearly all are.
    Zeros change nothing.
    """
    assert sign_flip_p([1.0] * 20) == 1 / 10_001 and sign_flip_p([1.0, -1.0] * 10) == 1.0
    assert (
        sign_flip_p([]) == sign_flip_p([0.0] * 99) == 1.0
        and sign_flip_p([0.0] * 99 + [1.0] * 3) == 0.25
    )
    tenths = [0.4, -1.1, 1.4, 0.6, -0.7, -0.4]  # sums that rounding sets apart
    assert sign_flip_p(tenths) == sign_flip_p([round(10 * x) for x in tenths])
    thirteen = [1.0] * 10 + [-1.0] * 3
    assert sign_flip_p(thirteen) == 2 * sum(math.comb(13, k) for k in range(4)) / 2**13
    fourteen = [1.0] * 11 + [-1.0] * 3  # |sum| >= 8: at most 3 of one sign
    exact = 2 * sum(math.comb(14, k) for k in range(4)) / 2**14
    assert sign_flip_p(fourteen) == pytest.approx(exact, abs=0.006)


def test_under_the_null_p_is_uniform():
    g = np.random.default_rng(1)
    p = [sign_flip_p(g.normal(size=10)) for _ in range(400)]
    assert 0.03 <= np.mean(np.array(p) <= 0.05) <= 0.08 and 0.45 <= np.mean(p) <= 0.56


def test_a_bootstrap_over_many_prompts_is_drawn_in_parts():
    """2**20 // 1000 = 1048 draws at a time: the same numbers as one table of all 2000."""
    values = np.random.default_rng(0).normal(5.0, 2.0, 1000)
    e = bootstrap_ratio(dict(enumerate(values)), dict.fromkeys(range(1000), 1.0))
    draws = values[np.random.default_rng(0).integers(1000, size=(2000, 1000))].mean(1)
    assert (e.low, e.high) == tuple(pytest.approx(q) for q in np.quantile(draws, [0.025, 0.975]))


def test_students_t_against_tables():
    """Two-sided 95 % quantiles as every table prints them, and P(|T| > 1) of one and two degrees of
    freedom by their closed forms.
    """
    table = {2: 12.706, 3: 4.303, 4: 3.182, 6: 2.571, 10: 2.262, 31: 2.042, 121: 1.980}
    assert {n: round(t95(n), 3) for n in table} == table
    assert t_tail(1.0, 1) == pytest.approx(0.5)
    assert t_tail(-1.0, 2) == pytest.approx(1 - 1 / math.sqrt(3))
    assert t_tail(0.0, 5) == 1.0


def test_a_ratio_over_seeds_is_fiellers():
    """By definition: the bounds are the r for which top - r bottom has a t interval that ends at
    0.
    """
    top, bottom = [0.1, 0.02, 0.05], [0.25, 0.2, 0.3]
    e = ratio_over_seeds(top, bottom)
    assert e.mean == pytest.approx(0.17 / 0.75) and e.n == 3
    for bound, end in ((e.low, "low"), (e.high, "high")):
        rest = over_seeds([a - bound * b for a, b in zip(top, bottom)])
        assert min(abs(rest.low), abs(rest.high)) == pytest.approx(0, abs=1e-9), end
    assert ratio_p(top, bottom, e.high) == pytest.approx(0.05, abs=1e-6)
    assert ratio_p(top, bottom, 0.5) == pytest.approx(
        t_tail(-0.205 / 3 / (np.std([-0.025, -0.08, -0.1], ddof=1) / math.sqrt(3)), 2)
    )


def test_a_ratio_whose_bottom_may_be_nothing_has_no_bounds():
    e = ratio_over_seeds([0.3, 0.3, 0.3], [0.5, 0.01, 0.02])
    assert e.n == 3 and math.isfinite(e.mean) and math.isnan(e.low) and math.isnan(e.high)
    assert ratio_over_seeds([0.1], [0.2]).mean == 0.5 and math.isnan(ratio_over_seeds([1], [2]).low)
    assert ratio_over_seeds([1.0, 2.0], [0.0, 0.0]).n == ratio_over_seeds([], []).n == 0
    assert math.isnan(ratio_p([1.0], [2.0], 0.5))
    assert ratio_p([0.25] * 3, [0.5] * 3, 0.5) == 1.0 and ratio_p([0.25] * 3, [0.5] * 3, 0.4) == 0.0
    with pytest.raises(ValueError, match="the same seeds in the same order"):
        ratio_over_seeds([1.0], [1.0, 2.0])


def test_no_relative_interval_below_minus_all():
    """Fieller's lower bound is below 0 of the original here, and accuracies are not."""
    after, before = [0.0, 0.1, 0.0], [0.25, 0.17, 0.25]
    assert ratio_over_seeds(after, before).low < 0
    e = relative_over_seeds(after, before)
    assert e.low == -1.0 and e.mean == pytest.approx(0.1 / 0.67 - 1) and e.high > e.mean
    alike = ratio_over_seeds([0.81] * 3, [0.32] * 3)  # rounding puts both bounds above the ratio
    assert alike.low <= alike.mean <= alike.high


def test_intervals_over_runs_cover_the_truth_and_items_do_not():
    """True ratio 0.5. Seeds differ by +-0.1 around 0.3 and 0.6, with 100 items of each: the
    interval over runs covers about as often as it says, with 3 seeds by t and with 12 by the
    bootstrap of seeds and items; pooling the items covers far less often.
    """
    g, hits = np.random.default_rng(2), {"t": [], "bootstrap": [], "pooled": []}
    for kind, seeds, rounds in (("t", 3, 100), ("bootstrap", 12, 40)):
        for _ in range(rounds):
            chances = [(g.normal(0.3, 0.1), g.normal(0.6, 0.1)) for _ in range(seeds)]
            top = {s: (g.random(100) < a).astype(float) for s, (a, _) in enumerate(chances)}
            bottom = {s: (g.random(100) < b).astype(float) for s, (_, b) in enumerate(chances)}
            e = ratio_over_runs(top, bottom)
            hits[kind].append(e.low <= 0.5 <= e.high)
            if kind == "t":
                flat = (np.concatenate(list(x.values())) for x in (top, bottom))
                pooled = bootstrap_ratio(*(dict(enumerate(x)) for x in flat))
                hits["pooled"].append(pooled.low <= 0.5 <= pooled.high)
    assert 0.9 <= np.mean(hits["t"]) and 0.8 <= np.mean(hits["bootstrap"])
    assert np.mean(hits["pooled"]) < 0.75


@pytest.mark.parametrize(
    "between, within", [(0.0, 0.5), (0.1, 0.0), (0.1, 0.5)], ids=["items", "seeds", "both"]
)
def test_from_ten_seeds_on_seeds_and_their_items_are_drawn(between, within):
    """12 seeds of 50 items against a bottom of ones: seeds spread around 0.5 by `between`, items
    around their seed by `within`. A drawn mean has the variance of both, anew in every draw.
    """
    seeds, items, sign = 12, 50, np.array([1.0, -1.0])
    top = {
        s: 0.5 + between * sign[s % 2] + within * np.tile(sign, items // 2) for s in range(seeds)
    }
    e = ratio_over_runs(top, dict.fromkeys(top, np.ones(items)))
    error = math.sqrt(between**2 / seeds + within**2 / (seeds * items))
    assert e.mean == pytest.approx(0.5) and e.n == seeds
    assert e.std == pytest.approx(error, rel=0.06)
    assert (e.low, e.high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), rel=0.02)


def test_both_sides_of_a_ratio_over_runs_draw_the_same_items():
    """Each seed's top is half of its bottom, item by item: however drawn, that is the ratio."""
    g = np.random.default_rng(0)
    bottom = {s: g.random(30) for s in range(10)}
    e = ratio_over_runs({s: x / 2 for s, x in bottom.items()}, bottom)
    assert e[:1] + e[2:4] == pytest.approx((0.5, 0.5, 0.5)) and e.std < 1e-12


def test_a_ratio_over_fewer_than_ten_seeds_is_that_of_their_means():
    g = np.random.default_rng(0)
    for seeds in (1, 9, 10):
        sides = [{s: g.random(30) for s in range(seeds)} for _ in range(2)]
        means = [[x.mean() for x in side.values()] for side in sides]
        same = ratio_over_runs(*sides) == pytest.approx(ratio_over_seeds(*means), nan_ok=True)
        assert same == (seeds < 10)


def test_holms_family():
    """0.01 x 3, 0.02 x 2, 0.04 x 1; what follows is never smaller; an unknown one counts."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.03, 0.02]) == pytest.approx([0.04, 0.04]) and holm([0.9, 0.8]) == [1.0, 1.0]
    first, unknown = holm([0.02, math.nan])
    assert first == 0.04 and math.isnan(unknown) and holm([]) == []


def test_a_statistic_that_draws_cannot_compute_has_no_interval():
    """The mean is no number though most draws are; and a mean with a third of its draws
    undefined.
    """

    def without_mean(drawn):
        return math.nan if len(set(drawn)) == 8 else 1.0

    assert math.isnan(bootstrap(without_mean, range(8)).low)

    def often_undefined(drawn):
        return math.nan if 0 not in drawn else float(np.mean(drawn))

    assert math.isnan(bootstrap(often_undefined, range(8)).low)  # (7/8)^8 = 34 % without 0

    def without(some):
        """A mean over draws of 8 that is undefined in ((8 - some) / 8)^8 of them."""
        return bootstrap(lambda drawn: 1.0 if min(drawn) < some else math.nan, range(8))

    assert math.isnan(without(2).low)  # 10 %
    assert without(3).low == 1.0  # 2.3 %
    assert math.isfinite(bootstrap(lambda drawn: float(np.mean(drawn)), range(8)).low)
