"""Credit by tokens against the whole sequence's reward, by enumeration of all texts: the expected
gradient is the same, within one tokenizer and across two.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from calibration_cases import score
from enumerated_texts import MERGES, World
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.calibration.advantages import (
    prefix_advantage,
    span_advantage,
)

SEEDS = st.integers(0, 2**32 - 1)


def sequence_policy(theta):
    """Two binary tokens, the second's logit depends on the first: log p and its gradient per
    token.
    """
    out = {}
    for first, second in product((0, 1), repeat=2):
        p = 1 / (1 + np.exp(-np.array([theta[0], theta[1 + first]])))
        bits = np.array([first, second])
        grad = np.zeros((2, 3))
        grad[0, 0], grad[1, 1 + first] = bits - p
        out[first, second] = np.log(np.where(bits, p, 1 - p)).sum(), grad
    return out


@given(SEEDS)
def test_span_credit_keeps_the_expected_gradient(seed):
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=3)
    value = {y: (rng.normal(size=2), float(rng.normal())) for y in product((0, 1), repeat=2)}
    for a in (0, 1):  # a span's value is known when the span is: the first does not look ahead
        value[a, 1][0][0] = value[a, 0][0][0]

    def expected(th):
        policy = sequence_policy(th).items()
        return sum(np.exp(lp) * (value[y][0].sum() + value[y][1]) for y, (lp, _) in policy)

    eye = 1e-6 * np.eye(3)
    truth = np.array([(expected(theta + e) - expected(theta - e)) / 2e-6 for e in eye])
    policy, got = sequence_policy(theta), np.zeros(3)
    # the expectation over groups of two, the other one being the baseline
    for pair in product(policy, repeat=2):
        weight = np.exp(sum(policy[y][0] for y in pair))
        members = [score(0.0, span=value[y][0], stop=value[y][1]) for y in pair]
        for g, y in enumerate(pair):
            got += weight * span_advantage(members, g, 2, np.arange(2)) @ policy[y][1] / 2
    np.testing.assert_allclose(got, truth, atol=1e-7)


@pytest.mark.parametrize("name", MERGES)
def test_span_credit_across_tokenizers_keeps_the_expected_gradient(name):
    """Every text and every pair of texts listed, the other one being the baseline."""
    world = World(*MERGES[name], tokens=2)
    settled = {x.ids: world.settled(x) for x in world.trajectories}

    def expected(rule):
        scores = [
            replace(score(x.total, span=x.value_S, stop=x.end), span=x.span)
            for x in world.trajectories
        ]
        credit = {
            x.ids: sum(
                other.prob * span_advantage([mine, baseline], 0, len(x.ids), rule(x))
                for other, baseline in zip(world.trajectories, scores)
            )
            for x, mine in zip(world.trajectories, scores)
        }
        return world.gradient(lambda x: credit[x.ids])

    want = world.gradient(lambda x: np.full(len(x.ids), x.total))
    np.testing.assert_allclose(expected(lambda x: None), want, atol=1e-12)
    np.testing.assert_allclose(expected(lambda x: settled[x.ids]), want, atol=1e-12)


@pytest.mark.parametrize("name", MERGES)
def test_prefix_credit_keeps_the_expected_gradient(name):
    """Any two tokenizers; every pair of texts listed, the other one being the baseline."""
    world = World(*MERGES[name], tokens=2)
    scores = []
    for x in world.trajectories:
        proxy, policy = world.prefixes(x, exact=False)
        scores.append(replace(score(x.total), before=proxy - policy))
    credit = {
        x.ids: sum(
            other.prob * prefix_advantage([mine, baseline], 0, len(x.ids))
            for other, baseline in zip(world.trajectories, scores)
        )
        for x, mine in zip(world.trajectories, scores)
    }
    want = world.gradient(lambda x: np.full(len(x.ids), x.total))
    np.testing.assert_allclose(world.gradient(lambda x: credit[x.ids]), want, atol=1e-12)
