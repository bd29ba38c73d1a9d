"""A rule is decided by a whole interval over three seeds or more."""

import pytest

from reflux.trainer.runs.stats import over_seeds, ratio_over_seeds
from reflux.trainer.studies.rules import (
    at_least,
    at_most,
    enough_seeds,
    has_bounds,
    mean_over_attacks,
    worst,
)


@pytest.mark.parametrize(
    "values, least, most",
    [
        ([0.5, 0.5, 0.5], "holds", "violated"),
        ([0.0, 0.0, 0.0], "violated", "holds"),
        ([0.0, 0.5, 0.3], "inconclusive", "inconclusive"),
        ([0.5, 0.5], "inconclusive", "inconclusive"),  # an interval of no width
        ([0.5], "inconclusive", "inconclusive"),
        ([], "inconclusive", "inconclusive"),
    ],
)
def test_a_verdict_takes_three_seeds_and_the_whole_interval(values, least, most):
    e = over_seeds(values)
    assert (at_least(e, 0.2), at_most(e, 0.2)) == (least, most)
    assert enough_seeds(e) == (len(values) >= 3)


def test_of_rules_that_all_have_to_hold_the_worst_counts():
    assert worst("holds", "inconclusive") == "inconclusive"
    assert worst("inconclusive", "violated", "holds") == "violated"
    assert worst("holds", "holds") == "holds"


def test_a_ratio_whose_bottom_may_be_0_is_named_and_not_averaged():
    unbounded = ratio_over_seeds([0.5, 0.6, 0.4], [0.01, 0.2, 0.0])
    scores = {"a": over_seeds([0.2, 0.4]), "b": unbounded, "c": over_seeds([0.5, 0.7])}
    assert [has_bounds(e) for e in scores.values()] == [True, False, True] and unbounded.mean > 7
    mean = mean_over_attacks(scores)
    assert (mean.value, mean.attacks) == (pytest.approx(0.45), 2)
    assert mean.say_bounds() == "2 of 3 bounded; without a bounded interval: b"
    mean = mean_over_attacks({"a": scores["a"]})
    assert (mean.value, mean.attacks, mean.say_bounds()) == (pytest.approx(0.3), 1, "")


def test_one_seed_bounds_no_attack():
    mean = mean_over_attacks({"a": over_seeds([0.25]), "b": over_seeds([0.75])})
    assert (mean.value, mean.attacks, mean.bounded) == (0.5, 2, 0)
    assert mean.say_bounds() == "no bounded interval"
