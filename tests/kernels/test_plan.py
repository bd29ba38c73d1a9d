"""The cut of a call into chunks and groups: least bytes within the budget, by brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels._plan import (
    MIB,
    STEPS,
    TILE,
    WORKSPACE_MB,
    Plan,
    Work,
    bytes_held,
    bytes_moved,
    plan_for,
    workspace_for,
)

QWEN = Work(8192, 151_936, 2048, 4096, 2, 8, 2)
WORKS = st.builds(
    Work,
    tokens=st.integers(0, 1500),
    vocab=st.sampled_from([1, 100, 5000, 151_936]),
    student=st.sampled_from([1, 64, 2048]),
    teacher=st.sampled_from([0, 64, 4096]),
    itemsize=st.just(2),
    logit_bytes=st.sampled_from([4, 8]),
    grad_bytes=st.just(2),
    dhidden=st.booleans(),
    dhead=st.booleans(),
)


@given(work=WORKS, mib=st.sampled_from([1e-5, 0.01, 1.0, 40.0, 600.0]))
def test_a_plan_is_the_cheapest_that_fits(work, mib):
    budget = int(mib * MIB)
    plan = plan_for(work, budget)
    assert plan.chunk >= 1 and plan.group % plan.chunk == 0
    least = bytes_held(work, Plan(1, 1))
    assert bytes_held(work, plan) <= max(budget, least)
    tile = TILE if bytes_held(work, Plan(TILE, TILE)) <= budget else 1
    assert plan.chunk % tile == 0
    rows = range(tile, work.tokens + tile, tile) if tile == TILE else range(1, 40)
    fitting = [
        candidate
        for chunk in rows
        for most in range(1, work.tokens // chunk + 2)
        if bytes_held(work, candidate := Plan(chunk, chunk * most)) <= budget
    ]
    for other in fitting[:: max(1, len(fitting) // 200)]:
        # of equally cheap ones the one that holds least
        assert (bytes_moved(work, plan), bytes_held(work, plan)) <= (
            bytes_moved(work, other),
            bytes_held(work, other),
        )


def test_a_group_is_worth_its_memory_at_the_size_of_a_real_model():
    """dhead is read and written 4 times where one chunk a group takes 11, in the same memory."""
    plan = plan_for(QWEN, WORKSPACE_MB * MIB)
    alone = Plan(768, 768)
    assert plan == Plan(512, 2048) and bytes_held(QWEN, plan) <= bytes_held(QWEN, Plan(832, 832))
    heads = 2 * 151_936 * (2048 + 4096)
    dhead = 10 * 151_936 * 2048
    assert bytes_moved(QWEN, plan) == 16 * heads + 4 * dhead
    assert bytes_moved(QWEN, alone) == 11 * (heads + dhead)
    assert bytes_moved(QWEN, plan) < 0.8 * bytes_moved(QWEN, alone)


def test_of_two_plans_of_equal_bytes_the_smaller_is_taken():
    work = Work(1825, 100, 16, 32, 4, 4, 2)
    larger = Plan(512, 1024)  # found first
    plan = plan_for(work, 454_234)
    assert plan == Plan(640, 640) and bytes_moved(work, plan) == bytes_moved(work, larger)
    assert bytes_held(work, plan) < bytes_held(work, larger) <= 454_234


def test_nothing_is_held_that_a_short_call_cannot_use():
    for tokens, most in ((1, TILE), (300, 384), (2048, 2048)):
        plan = plan_for(Work(tokens, 1000, 64, 64, 2, 8, 2), 1200 * MIB)
        assert plan.group <= most, plan


def test_a_workspace_is_a_step_that_fits_the_memory_and_the_call():
    asked = [workspace_for(int(gib * 2**30), 8192, 151_936) for gib in (0.5, 4, 12, 23, 60, 130)]
    assert asked == [300, 600, 2400, 4800, 4800, 4800] and set(asked) <= {
        int(WORKSPACE_MB * step) for step in STEPS
    }
    # what a call can use: 1,000 tokens of 32,000 classes are 305 MiB
    assert workspace_for(130 * 2**30, 1000, 32_000) == 600
    assert workspace_for(130 * 2**30, 10, 32_000) == 300
    assert workspace_for(20 * 2**30, 8192, 151_936, itemsize=8) == 4800
    for free in range(0, 2**36, 2**28):  # never more than its share, once one step fits
        got = workspace_for(free, 2**20, 2**18, share=0.25)
        assert got == 300 or got * MIB <= 0.25 * free
    with pytest.raises(ValueError, match="share is 0.0; want 0 < share <= 1"):
        workspace_for(2**34, 1, 1, share=0.0)
