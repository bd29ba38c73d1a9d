"""Rows of a served teacher, without a server (with one: tests/engines/test_served_teacher.py).

Shapes: V vocabulary.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.distillation.served_teacher import rows_of
from reflux.trainer.rollouts.engine_texts import ScoredText


def scored(logp, ids=None):
    logp = np.asarray(logp, np.float32)
    ids = np.arange(logp.size).reshape(logp.shape) if ids is None else ids
    return ScoredText(logp[:, 0], ids, logp, ("folder",))


@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_the_tail_is_the_mass_of_all_other_ids(seed, k):
    rng = np.random.default_rng(seed)
    logits_V = rng.normal(scale=3.0, size=9)
    logp_V = np.sort(logits_V - np.logaddexp.reduce(logits_V))[::-1]
    rows = rows_of(scored(logp_V[None, :k]))
    want = np.logaddexp.reduce(logp_V[k:])
    assert rows.logp.shape == (1, k) and rows.tail.shape == (1,)
    # what fp32 log-probabilities leave of a small tail
    assert np.exp(rows.tail[0]) == pytest.approx(np.exp(want), abs=1e-6)


def test_a_tail_of_nothing_has_no_mass():
    rows = rows_of(scored(np.log([[0.75, 0.25], [1.0, 1e-30]])))
    assert np.exp(rows.tail) == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "logp",
    [[[-0.1, np.nan]], [[-0.1, -0.2]], [[-3.0, -1.0]], [[-0.5, -np.inf]]],
    ids=["nan", "more than 1", "not in order", "-inf"],
)
def test_what_is_no_distribution_is_refused(logp):
    with pytest.raises(ValueError, match="not finite, not in order, or sum to"):
        rows_of(scored(logp))
