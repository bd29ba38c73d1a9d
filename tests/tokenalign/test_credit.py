"""By every rule a span's value is conserved; reward-to-go against the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import align, side_of, tokenizations

from reflux.tokenalign.credit import (
    RULES,
    before_each,
    credit,
    following_span,
    mean_at,
    reward_to_go,
    span_to_go,
)

SEEDS = st.integers(0, 2**32 - 1)


def case(sides, seed):
    """Values of an alignment, with tokens outside the spans put among the tokens of side a."""
    rng = np.random.default_rng(seed)
    alignment = align(*sides)
    span, lens = alignment.span_a, side_of(sides[0]).lens
    at = rng.integers(0, len(span) + 1, 3)
    span, lens = np.insert(span, at, -1), np.insert(lens, at, 5)
    logp = np.where(rng.random(len(span)) < 0.2, 0.0, -rng.exponential(2.0, len(span)))
    return rng.normal(size=alignment.num_spans), span, {"logp": logp, "lens": lens}


@given(tokenizations(), SEEDS, st.sampled_from(RULES))
def test_every_rule_conserves_every_span(sides, seed, rule):
    value, span, per_token = case(sides, seed)
    got = credit(value, span, rule, **per_token)
    live = span >= 0
    np.testing.assert_allclose(
        np.bincount(span[live], weights=got[live], minlength=len(value)),
        value,
        rtol=1e-12,
        atol=1e-12,
    )
    assert (got[~live] == 0).all()
    assert (got[live] * value[span[live]] >= 0).all(), "no token is paid against its span's sign"


@pytest.mark.parametrize(
    "rule, want",
    [
        ("uniform", [2, 2, 2, 0, 5]),
        ("bytes", [1, 2, 3, 0, 5]),
        ("surprisal", [3, 0, 3, 0, 5]),
        ("first", [6, 0, 0, 0, 5]),
        ("last", [0, 0, 6, 0, 5]),
    ],
)
def test_rules_by_hand(rule, want):
    got = credit(
        [6, 5], np.array([0, 0, 0, -1, 1]), rule, logp=[-4, 0, -4, -9, 0], lens=[1, 2, 3, 4, 7]
    )
    # the second span is certain (log p = 0): surprisal falls back to uniform
    assert got.tolist() == want


def test_rounding_above_zero_is_certainty():
    assert credit([1.0], np.array([0, 0]), "surprisal", logp=[3e-8, -1.0]).tolist() == [0, 1]


@given(tokenizations(), SEEDS)
def test_reward_to_go_is_the_sum_at_and_after(sides, seed):
    value, span, _ = case(sides, seed)
    want = []
    for t in range(len(span)):
        following = [s for s in span[t:] if s >= 0]
        want.append(value[following[0] :].sum() if following else 0.0)
    got = reward_to_go(value, span, settled=following_span(span, len(value)))
    np.testing.assert_allclose(got, want, atol=1e-12)


@given(tokenizations(), SEEDS, st.floats(-5, 5), st.integers(0, 3))
def test_unless_spans_are_settled_every_token_gets_the_whole_sum(sides, seed, end, extra):
    value, span, _ = case(sides, seed)
    got = reward_to_go(value, span, end=end, length=len(span) + extra)
    np.testing.assert_allclose(got, np.full(len(span) + extra, value.sum() + end), atol=1e-12)


@given(tokenizations(), SEEDS)
def test_only_what_is_settled_is_left_out(sides, seed):
    value, span, _ = case(sides, seed)
    following = following_span(span, len(value))
    settled = np.random.default_rng(seed).integers(0, following + 1)
    got = reward_to_go(value, span, settled=settled)
    np.testing.assert_allclose(got, [value[k:].sum() for k in settled], atol=1e-12)


@given(tokenizations(), SEEDS)
def test_a_settled_span_reaches_no_later_token(sides, seed):
    """With all earlier spans settled a span's value reaches the tokens up to its own last."""
    value, span, _ = case(sides, seed)
    k, settled = seed % len(value), following_span(span, len(value))
    bump = np.zeros(len(value))
    bump[k] = 1.0
    before, after = (reward_to_go(v, span, settled=settled) for v in (value, value + bump))
    reached = np.abs(after - before) > 0.5
    last = np.flatnonzero(span == k)[-1]
    assert np.array_equal(reached, np.arange(len(span)) <= last)


@given(tokenizations(), SEEDS, st.floats(-5, 5), st.integers(0, 3))
def test_the_end_is_added_to_every_token_and_is_all_the_stop_gets(sides, seed, end, extra):
    value, span, _ = case(sides, seed)
    length = len(span) + extra
    settled = following_span(span, len(value), length)
    plain = reward_to_go(value, span, settled=settled[: len(span)])
    got = reward_to_go(value, span, settled=settled, end=end, length=length)
    np.testing.assert_allclose(got[: len(span)], plain + end, atol=1e-12)
    assert (got[len(span) :] == end).all() and len(got) == len(span) + extra


@given(tokenizations(), SEEDS)
def test_the_span_that_follows(sides, seed):
    value, span, _ = case(sides, seed)
    following = following_span(span, len(value))
    for t, k in enumerate(following):
        assert k == next((s for s in span[t:] if s >= 0), len(value))
    assert np.array_equal(
        span_to_go(value)[following], reward_to_go(value, span, settled=following)
    )


@given(st.lists(st.floats(-3, 3), max_size=6), st.floats(-3, 3))
def test_to_go_telescopes(value, end):
    to_go = span_to_go(value, end)
    np.testing.assert_allclose(to_go[:-1] - to_go[1:], value, atol=1e-12)
    assert to_go[-1] == end and len(to_go) == len(value) + 1


def test_a_baseline_by_span_number_keeps_the_expected_gradient():
    """Enumerated: texts of two binary tokens, one per span. Advantage to_go(mine) -
    to_go(another's) at the same span, averaged over pairs of texts, gives the gradient of the
    expected reward.
    """
    logits = np.array([0.3, -0.7])  # of token 1 at each position
    p = 1 / (1 + np.exp(-logits))
    reward = {(x, y): np.array([0.5 * x - 0.2, 1.5 * x * y - y]) for x in (0, 1) for y in (0, 1)}
    prob = {t: np.prod(np.where(t, p, 1 - p)) for t in reward}
    want, got = np.zeros(2), np.zeros(2)
    for t in reward:
        score = np.array(t) - p  # d log p / d logit
        want += prob[t] * reward[t].sum() * score
        for other in reward:
            at = following_span(np.array([0, 1]), 2)
            got += (
                prob[t]
                * prob[other]
                * (span_to_go(reward[t])[at] - span_to_go(reward[other])[at])
                * score
            )
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_reward_to_go_of_no_spans():
    assert reward_to_go(np.empty(0), np.array([-1, -1])).tolist() == [0, 0]
    assert reward_to_go(np.empty(0), np.empty(0, np.int32)).tolist() == []


def test_what_people_get_wrong():
    span = np.array([0, 0])
    with pytest.raises(ValueError, match="rule = 'overlap'; want one of uniform"):
        credit([1.0], span, "overlap")
    with pytest.raises(ValueError, match="needs logp, one per token; got nothing"):
        credit([1.0], span, "surprisal")
    with pytest.raises(ValueError, match=r"needs lens, one per token; got shape \[3\] for 2"):
        credit([1.0], span, "bytes", lens=[1, 2, 3])
    with pytest.raises(ValueError, match="logp must be finite and at most 0.*got 0.5"):
        credit([1.0], span, "surprisal", logp=[-1, 0.5])
    with pytest.raises(ValueError, match="span 1 is worth 2.0 and has no token here"):
        credit([1.0, 2.0], span, "uniform")
    with pytest.raises(ValueError, match="length = 1 for 2 tokens"):
        reward_to_go([1.0], span, length=1)
    with pytest.raises(ValueError, match="spans up to 0"):
        reward_to_go([], span)
    for settled, message in (
        (np.array([0]), r"settled is int64 \[1\]; want a whole number for each of the 2 tokens"),
        (np.zeros(2), "settled is float64"),
        (np.array([0, 1]), r"settled\[1\] = 1, but only 0 spans end before token 1"),
        (np.array([-1, 0]), r"settled\[0\] = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            reward_to_go([1.0], span, settled=settled)


@given(st.lists(st.integers(-1000, 1000)))
def test_before_each_is_the_sum_in_front(values):
    want = [sum(values[:k]) for k in range(len(values))]
    assert before_each(np.array(values, float)).tolist() == want


def test_a_shorter_text_counts_with_its_last_value():
    others = [np.array([1.0, 3.0, 5.0]), np.array([7.0])]
    assert mean_at(np.arange(4), others).tolist() == [4, 5, 6, 6]
    assert mean_at(np.arange(0), others).tolist() == []
