"""A rule is decided by a whole interval over three seeds or more."""

import pytest

from reflux.trainer.runs.stats import over_seeds
from reflux.trainer.studies.rules import at_least, at_most, enough_seeds, worst


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
