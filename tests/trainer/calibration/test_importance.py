"""Truncated importance weights against the listed expectation over a whole vocabulary.

Shapes: V vocabulary.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.calibration.importance import are_truncated, importance_weights
from reflux.trainer.calibration.phase import CalibratePhase
from reflux.trainer.engine.metrics import MetricSums


def log_softmax(x):
    return x - np.logaddexp.reduce(x)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.1, 1.0]))
def test_without_truncation_the_expected_gradient_is_the_trainers_own(seed, gap):
    """sum_v p_sampler(v) w(v) A(v) grad log p(v) = sum_v p(v) A(v) grad log p(v)."""
    rng = np.random.default_rng(seed)
    trainer_V = log_softmax(rng.normal(size=5))
    sampler_V = log_softmax(trainer_V + gap * rng.normal(size=5))
    advantage_V = rng.normal(size=5)
    grad_VV = np.eye(5) - np.exp(trainer_V)[None]  # of log p(v) by the logits
    weight_V = importance_weights(trainer_V, sampler_V, 1e9)
    weighted = np.exp(sampler_V) * weight_V * advantage_V @ grad_VV
    own = np.exp(trainer_V) * advantage_V @ grad_VV
    assert np.allclose(weighted, own, rtol=0, atol=1e-12)
    assert not gap == 1.0 or not np.allclose(np.exp(sampler_V) * advantage_V @ grad_VV, own)


def test_a_weight_ends_at_the_limit_and_is_finite_at_any_gap():
    gaps = np.array([-1000.0, -1.0, 0.0, np.log(2.0), 5.0, 1000.0])
    got = importance_weights(gaps, np.zeros(6), 2.0)
    assert got == pytest.approx([0.0, np.exp(-1.0), 1.0, 2.0, 2.0, 2.0])


@given(st.floats(1.0, 1e6) | st.sampled_from([5.0, 7.0, 8.0]), st.floats(1e-3, 1e3))
def test_a_token_beyond_the_limit_counts_as_truncated_at_every_limit(limit, beyond):
    gaps = np.log(limit) + np.array([beyond, -beyond])
    assert are_truncated(gaps, np.zeros(2), limit).tolist() == [True, False]


def test_a_weight_of_one_is_not_truncated_at_the_limit_of_one():
    """An engine that is the trainer, with policy.max_is = 1."""
    assert not are_truncated(np.zeros(2), np.zeros(2), 1.0).any()


@pytest.mark.parametrize("limit", [2.0, 5.0])
def test_the_log_counts_the_truncated_tokens(limit):
    sums = MetricSums()
    policy = SimpleNamespace(max_is=limit)
    phase = SimpleNamespace(cfg=SimpleNamespace(policy=policy), metric_sums=sums)
    rollout = SimpleNamespace(logp=(-9.0, -9.0, -1.0, -1.0))
    CalibratePhase._weights(phase, rollout, np.array([0.0, 0.0, -1.0, -2.0]))
    assert sums.sums["is/truncated"] == [2.0, 4.0], "two of four"
