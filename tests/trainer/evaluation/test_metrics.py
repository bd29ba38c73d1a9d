"""Every number of an evaluation against a count by hand or an enumeration."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prediction_rows import chosen, generated, prediction

from reflux.trainer.evaluation.metrics import (
    check_same,
    compare,
    measure,
    metric_values,
    pass_at_k,
    position_stats,
)
from reflux.trainer.runs.stats import mean_over_prompts


def sampled(table):
    """{prompt: "10 0"} -> predictions: one sample a digit."""
    return [
        generated(p, k, correct=digit == "1", outcome="correct" if digit == "1" else "wrong")
        for p, digits in table.items()
        for k, digit in enumerate(digits)
    ]


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_it_cannot_draw(n, c, k):
    with pytest.raises(ValueError, match="want 0 <= c <= n and 1 <= k <= n"):
        pass_at_k(n, c, k)


def test_values_by_hand():
    rows = sampled({0: "1000", 3: "1100", 7: "0000"}) + [generated(0, mode="greedy")]
    assert metric_values(rows, "sampled") == {0: 0.25, 3: 0.5, 7: 0.0}
    assert metric_values(rows, "pass@1") == metric_values(rows, "sampled")
    assert metric_values(rows, "pass@2") == pytest.approx({0: 1 / 2, 3: 5 / 6, 7: 0.0})
    assert metric_values(rows, "pass@4") == {0: 1.0, 3: 1.0, 7: 0.0}
    assert metric_values(rows, "greedy") == {0: 1.0} and metric_values(rows, "likelihood_sum") == {}
    with pytest.raises(ValueError, match="at least 5 sampled answers"):
        metric_values(rows, "pass@5")


def test_where_no_answer_is_correct_or_wrong_the_reward_counts():
    rows = [
        generated(0, 0, correct=None, reward=-3.0),
        generated(0, 1, correct=None, reward=1.0, ended=False),
    ]
    assert metric_values(rows, "sampled") == {0: -1.0}
    cut = generated(0, 2, correct=False, ended=False, graded=False)  # no more than the least
    assert metric_values([*rows, cut], "sampled") == {0: pytest.approx((-3.0 + 1.0 - 3.0) / 3)}
    found = measure(rows, ["sampled"])
    assert found["sampled"].mean == -1.0 and found["sampled_truncated"].mean == 0.5
    assert "sampled_wrong" not in found
    with pytest.raises(ValueError, match="each correct or wrong"):
        metric_values(rows, "pass@2")


def test_intervals_are_over_prompts_not_over_answers():
    """Forty answers of two prompts say no more than two values."""
    two = mean_over_prompts(metric_values(sampled({0: "1" * 20, 1: "0" * 20}), "sampled"))
    rows = sampled({p: "10"[p % 2] for p in range(40)})
    forty = mean_over_prompts(metric_values(rows, "sampled"))
    assert two.mean == forty.mean == 0.5 and (two.low, two.high, two.n) == (0.0, 1.0, 2)
    assert 0.3 < forty.low < 0.4 and 0.6 < forty.high < 0.7 and forty.n == 40


def test_kinds_of_failure_add_up_to_one_with_the_correct_ones():
    kinds = ["correct", "wrong", "wrong", "no_answer", "refused", "truncated"]
    rows = [
        generated(
            p,
            correct=kind == "correct",
            outcome=kind,
            tokens=p,
        )
        for p, kind in enumerate(kinds)
    ]
    found = measure(rows, ["sampled"])
    names = ("wrong", "no_answer", "refused", "truncated")
    fractions = [found[n].mean for n in ("sampled", *(f"sampled_{name}" for name in names))]
    assert fractions == pytest.approx([1 / 6, 2 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert sum(fractions) == pytest.approx(1)
    assert found["sampled_length"].mean == 2.5
    assert "sampled_grader_error" not in found


def test_a_failed_grade_is_in_no_metric():
    rows = [
        generated(0, 0, correct=True, outcome="correct", tokens=2),
        generated(0, 1, correct=False, error="broken", tokens=4),
        generated(0, 2, correct=False, outcome="wrong", tokens=3),
        generated(1, 0, correct=False, error="broken", tokens=1),
        generated(1, 1, correct=False, error="broken", tokens=1),
        generated(1, 2, correct=True, outcome="correct", tokens=1),
        generated(2, 0, correct=False, error="broken", tokens=5),
        generated(2, 1, correct=False, error="broken", tokens=5),
        generated(2, 2, correct=False, error="broken", tokens=5),
    ]
    assert metric_values(rows, "sampled") == {0: 0.5, 1: 1.0}
    assert metric_values(rows, "pass@1") == {0: 0.5, 1: 1.0}
    assert metric_values(rows, "pass@2") == {0: 1.0}, "prompt 1 has one grade only"
    found = measure(rows, ["sampled"])
    assert found["sampled"].mean == 0.75 and found["sampled_wrong"].mean == 0.25
    assert found["sampled_grader_error"].mean == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert found["sampled_length"].mean == pytest.approx((3 + 1 + 5) / 3), "of all texts"
    with pytest.raises(ValueError, match="at least 4 sampled answers"):
        metric_values(rows, "pass@4")


def test_where_every_grade_failed_there_is_no_number():
    rows = [generated(p, error="broken", correct=False) for p in range(3)]
    assert metric_values(rows, "sampled") == {}
    assert math.isnan(measure(rows, ["sampled"])["sampled"].mean)


def test_a_difference_is_over_the_prompts_that_both_have():
    d = compare({0: 1.0, 1: 1.0, 2: 0.0}, {0: 0.0, 2: 0.5, 3: 1.0})
    assert (d.ours.mean, d.theirs.mean, d.difference.mean) == (0.5, 0.25, 0.25)
    assert d.ours.n == d.theirs.n == d.difference.n == 2


def test_differences_are_paired_by_prompt():
    ours, theirs = {0: 1.0, 1: 0.5, 2: 1.0, 3: 0.0}, {0: 0.5, 1: 0.0, 2: 0.5, 3: 0.0}
    d = compare(ours, theirs)
    assert (d.ours.mean, d.theirs.mean, d.difference.mean) == (0.625, 0.25, 0.375)
    assert d.change.mean == 1.5
    assert d.p == 2 / 8, (
        "three differences of one sign: only all plus and all minus are as far from 0"
    )
    shifted = compare({p: v + 0.25 for p, v in theirs.items()}, theirs)
    assert shifted.difference.low == shifted.difference.high == 0.25, (
        "a constant difference is certain, however prompts differ"
    )


@pytest.mark.parametrize("theirs", [{0: 0.0, 1: 0.0}, {0: -2.0, 1: 1.0}])
def test_a_change_relative_to_nothing_or_less_is_no_number(theirs):
    d = compare({0: 1.0, 1: 0.0}, theirs)
    assert math.isnan(d.change.mean) and math.isfinite(d.difference.mean)


def test_other_prompts_or_samples_are_refused():
    ours = [prediction(0, id="x"), prediction(1, id="y")]
    check_same(ours, [*ours, prediction(0, mode="greedy")], "f")
    check_same(ours, [prediction(0), prediction(1)], "an older run without ids")
    for theirs, says in (
        (
            [prediction(0, id="x")],
            "f: sampled has 1 answers to 1 prompts, this run 2 answers to 2 prompts",
        ),
        ([prediction(0, id="x"), prediction(1, 1, id="y")], "same prompts and samples"),
        ([prediction(0, id="x"), prediction(1, id="z")], "f: prompt 1 is another question there"),
        ([prediction(0), prediction(1, answer="b")], "answer 'b', here 'a'"),
    ):
        with pytest.raises(ValueError) as error:
            check_same(ours, theirs, "f")
        assert says in str(error.value)


def test_positions_of_options():
    """A model that always takes the first position is correct exactly where the correct option
    stands there.
    """
    logp, n_bytes = [-1.0, -4.0, -6.0, -8.0], [2, 2, 2, 4]
    rows = [
        chosen(
            p,
            "likelihood_sum",
            p % 4 == 0,
            logp=logp,
            n_bytes=n_bytes,
            position=p % 4,
            choice_at=0,
        )
        for p in range(8)
    ]
    table = position_stats(rows, "likelihood_sum")
    assert [(t.position, t.prompts, t.accuracy.mean, t.chosen) for t in table] == [
        (1, 2, 1.0, 1.0),
        (2, 2, 0.0, 0.0),
        (3, 2, 0.0, 0.0),
        (4, 2, 0.0, 0.0),
    ]
    found = measure(rows, ["likelihood_sum"])
    names = ("likelihood_sum", "likelihood_sum_at_1", "likelihood_sum_at_2")
    assert [found[name].mean for name in names] == [0.25, 1.0, 0.0]
    assert found["likelihood_sum_logp"].mean == -19 / 4
    per_byte = measure([replace(r, mode="likelihood_per_byte") for r in rows], [])
    assert per_byte["likelihood_per_byte_logp"].mean == -(0.5 + 2 + 3 + 2) / 4
    assert position_stats(sampled({0: "1"}), "sampled") == []
