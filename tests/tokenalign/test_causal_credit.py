"""The expected policy gradient of reward_to_go is that of the whole sum: every text listed, merges
of 2 and 3 bytes on either side.
"""

import numpy as np
import pytest
from enumerated_texts import MERGES, World

from reflux.tokenalign.credit import prefix_to_go, reward_to_go

# pairs in which the proxy never cuts anew what stands before a token
CAUSAL = ("no merge", "the policy merges 2", "the policy merges 3")


def whole(x):
    return np.full(len(x.ids), x.total)


def to_go(x, settled=None):
    return reward_to_go(x.value_S, x.span, settled=settled, end=x.end, length=len(x.ids))


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_nothing_settled_is_exact_for_any_two_tokenizers(name, clip):
    world = World(*MERGES[name], clip=clip)
    assert sum(x.prob for x in world.trajectories) == pytest.approx(1, abs=1e-12)
    want = world.gradient(whole)
    assert np.linalg.norm(want) > 0.05
    np.testing.assert_allclose(world.gradient(to_go), want, atol=1e-12)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_leaving_out_what_is_settled_is_exact(name, seed):
    """settled: the leading spans that every continuation of the text before the token shares."""
    world = World(*MERGES[name], seed=seed)
    got = world.gradient(lambda x: to_go(x, world.settled(x)))
    np.testing.assert_allclose(got, world.gradient(whole), atol=1e-12)


@pytest.mark.parametrize("name", MERGES)
def test_every_earlier_span_is_settled_only_where_the_proxy_does_not_look_ahead(name):
    """Reward-to-go of every earlier span: exact with one tokenizer, and a bias of percents where
    a token of the proxy may cross the boundary.
    """
    world = World(*MERGES[name])
    want = world.gradient(whole)
    got = world.gradient(lambda x: to_go(x, x.following))
    bias = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert bias < 1e-12 if name in CAUSAL else bias > 0.01
    all_settled = all((world.settled(x) == x.following).all() for x in world.trajectories)
    assert all_settled == (name in CAUSAL)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("exact", [True, False], ids=["all covers", "one reading"])
@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_leaving_out_what_the_bytes_before_are_worth_is_exact(name, exact, clip):
    """The proxy merges across the token's start, the policy does, or both."""
    world = World(*MERGES[name], clip=clip)
    got = world.gradient(lambda x: prefix_to_go(x.total, *world.prefixes(x, exact)))
    np.testing.assert_allclose(got, world.gradient(whole), atol=1e-12)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("exact", [True, False], ids=["all covers", "one reading"])
def test_it_has_less_variance_than_the_whole_sum(name, exact):
    world = World(*MERGES[name])
    ours = world.variance(lambda x: prefix_to_go(x.total, *world.prefixes(x, exact)))
    assert ours < 0.95 * world.variance(whole)


def test_two_lengths_are_refused():
    with pytest.raises(ValueError, match="one value per token"):
        prefix_to_go(1.0, np.zeros(3), np.zeros(2))


def test_a_comma_settles_what_stands_before_it():
    """Between nothing and everything: less variance than the whole sum, and still exact."""
    world = World(*MERGES["a proxy that never merges across a comma"])
    settled = {x.ids: world.settled(x) for x in world.trajectories}
    assert settled[0, 2, 1].tolist() == [0, 0, 2]  # "a" may become "ab"; "a," stays as it is
    assert settled[2, 0, 1].tolist() == [0, 1, 1]
