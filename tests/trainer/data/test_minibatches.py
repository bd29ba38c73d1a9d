"""Mini-batches: each prompt is in one, anew in every epoch, whatever the number of ranks."""

from collections import Counter

from engine_cases import samples
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.minibatches import deal, split

SEEDS = st.integers(0, 2**63)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 9))
def test_every_prompt_is_dealt_and_every_rank_gets_equal_work(seed, count, each, world, step):
    keys = [(i * 7 % 1009, 0) for i in range(count * each * world)]
    dealt = deal(keys, count, seed=seed, step=step, epoch=0)
    assert set(dealt) == set(keys)
    for rank in range(world):
        part = keys[rank * count * each : (rank + 1) * count * each]
        assert Counter(dealt[key] for key in part) == dict.fromkeys(range(count), each)


@given(SEEDS, st.integers(2, 5))
def test_seeds_steps_and_epochs_deal_anew(seed, count):
    keys = [(i, 0) for i in range(12 * count)]
    deals = [
        deal(keys, count, seed=seed + a, step=b, epoch=c)
        for a, b, c in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))
    ]
    assert deals[0] == deal(keys, count, seed=seed, step=1, epoch=0)
    assert all(a != b for i, a in enumerate(deals) for b in deals[:i])


def test_a_prompt_that_is_there_twice_goes_to_one_minibatch_and_dropped_places_to_none():
    keys = [(5, 0), None, (5, 0), (5, 1)]
    dealt = deal(keys, 2, seed=0, step=1, epoch=0)
    assert set(dealt) == {(5, 0), (5, 1)}
    # the first place of (5, 0) decides, so it does not depend on which rank looks
    assert dealt[5, 0] == deal(keys[:2], 2, seed=0, step=1, epoch=0)[5, 0]


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_samples_follow_their_prompts(minibatches):
    every = samples()
    parts = split(every, {(i, 0): m for i, m in enumerate(minibatches)}, 3)
    assert [[s.rollout.prompt.index for s in part] for part in parts] == [
        [i for i, m in enumerate(minibatches) if m == which] for which in range(3)
    ]
