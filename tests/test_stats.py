import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.stats import (
    bootstrap,
    bootstrap_ratio,
    over_seeds,
    paired_difference,
    relative_change,
)

FINITE = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


def test_three_values_by_hand():
    e = over_seeds([1.0, 2.0, 3.0])
    assert (e.mean, e.std, e.n) == (2.0, 1.0, 3)
    assert e.high - e.mean == pytest.approx(4.303 / math.sqrt(3))  # Student's t, 2 degrees of freedom


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert over_seeds([0.5]).mean == 0.5 and math.isnan(over_seeds([0.5]).low)
    assert math.isnan(over_seeds([]).mean)


@given(values=FINITE, shift=st.floats(-5, 5))
def test_a_shift_moves_the_interval_and_not_its_width(values, shift):
    a, b = over_seeds(values), over_seeds([v + shift for v in values])
    assert b.mean == pytest.approx(a.mean + shift, abs=1e-9)
    assert b.high - b.low == pytest.approx(a.high - a.low, abs=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [e.low <= 1.0 <= e.high for e in (over_seeds(rng.normal(1.0, 2.0, 5)) for _ in range(400))]
    assert 0.91 <= np.mean(hits) <= 0.985


def test_paired_differences_use_the_pairing():
    before = np.tile([0.0, 1.0], 200)  # items differ a lot, the change does not
    after = before.copy()
    after[:20:2] = 1.0
    e = paired_difference(after, before)
    assert e.mean == pytest.approx(10 / 400) and e.low > 0
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
    again = bootstrap_ratio(dict(enumerate(values)), {i: 1.0 for i in range(400)})
    assert again == e  # the same draws
    mean = bootstrap(lambda drawn: float(np.mean([values[i] for i in drawn])), range(400))
    assert mean.mean == pytest.approx(e.mean) and mean.high - mean.low == pytest.approx(e.high - e.low, rel=0.2)


def test_a_bootstrap_without_anything_to_draw():
    assert math.isnan(bootstrap_ratio({}, {}).mean) and bootstrap_ratio({0: 3.0}, {0: 2.0})[0] == 1.5
    assert math.isnan(bootstrap_ratio({0: 3.0}, {0: 2.0}).low) and math.isnan(bootstrap_ratio({0: 1.0}, {0: 0.0}).mean)
    assert bootstrap(lambda drawn: 1.0, []).n == 0 and math.isnan(bootstrap(lambda drawn: 1.0, [4]).low)
    assert math.isnan(bootstrap(lambda drawn: math.nan, [1, 2]).low)
