"""Mixtures: shares of the parts, epochs of their own, indices that name a row."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.fitted_prompts import Fit, FittedPrompts
from reflux.trainer.data.mixture import Mixture
from reflux.trainer.data.prompts import Prompts, epoch_indices


def part(name: str, rows: int, left=None) -> FittedPrompts:
    import numpy as np

    table = [{"prompt": f"{name} {i}"} for i in range(rows)]
    prompts = Prompts(table, lambda i: f"{name}.jsonl, line {i + 1}", "plain", {})
    kept = None if left is None else np.array(left)
    dropped = 0 if left is None else rows - len(left)
    return FittedPrompts(prompts, Fit(rows, too_long=dropped, dropped=dropped, longest=rows), kept)


def mixture(sizes, weights) -> Mixture:
    parts = {f"p{k}": part(f"p{k}", size) for k, size in enumerate(sizes)}
    return Mixture(parts, {f"p{k}": w for k, w in enumerate(weights)})


@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=4),
    steps=st.integers(1, 12),
    count=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_part_has_its_share_of_all_prompts(weights, steps, count, seed):
    mixed = mixture([5] * len(weights), weights)
    had = Counter()
    for step in range(steps):
        batch = mixed.batch(step, count, seed=seed)
        assert len(batch) == count
        had.update(p.part for p in batch)
        for k, weight in enumerate(weights):
            due = weight / sum(weights) * (step + 1) * count
            assert abs(had[f"p{k}"] - due) < len(weights), "less than a prompt a part"


@given(seed=st.integers(0, 99), start=st.integers(0, 20))
def test_a_batch_is_a_function_of_the_step(seed, start):
    """Whatever was asked before: a resumed run goes on with the same prompts."""
    mixed = mixture([4, 7], [1, 2])
    before = [mixed.batch(step, 6, seed=seed) for step in range(start + 1)]
    assert mixture([4, 7], [1, 2]).batch(start, 6, seed=seed) == before[start]


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(0, 9), st.booleans())
def test_some_of_the_prompts_are_drawn_as_all_of_them(rows, seed, shuffle):
    """A query budget's. Of one source: epochs of the rows that are left, in the source's order.
    Records of runs depend on that order.
    """
    some = part("p", 10).only(rows)
    for step in range(3):
        entries = epoch_indices(len(rows), step, 4, seed=seed, shuffle=shuffle)
        got = [p.index for p in some.batch(step, 4, seed=seed, shuffle=shuffle)]
        assert got == [sorted(rows)[i] for i in entries]


@given(st.sets(st.integers(0, 8), min_size=1), st.integers(0, 9))
def test_some_prompts_of_a_mixture_keep_their_parts_shares(rows, seed):
    """Those of parts without a prompt go to the others."""
    mixed = mixture([4, 5], [1, 3])
    some = mixed.only(rows)
    drawn = [p for step in range(4) for p in some.batch(step, 6, seed=seed)]
    assert {p.index for p in drawn} <= rows and len(some) == len(rows)
    assert all(p.messages == mixed.of_row(p.index).messages for p in drawn)
    had, left = Counter(p.part for p in drawn), {"p0" if row < 4 else "p1" for row in rows}
    want = {"p0": 6, "p1": 18} if len(left) == 2 else dict.fromkeys(left, 24)
    assert all(abs(had[name] - n) <= 1 for name, n in want.items()) and set(had) == left


def test_every_epoch_of_a_part_has_each_of_its_rows_once():
    mixed = mixture([4, 6], [1, 1])
    drawn = [p for step in range(12) for p in mixed.batch(step, 4, seed=3)]
    for name, rows in (("p0", 4), ("p1", 6)):
        mine = [p.messages[0]["content"] for p in drawn if p.part == name]
        assert len(mine) == 24
        for start in range(0, 24, rows):
            assert len(set(mine[start : start + rows])) == rows
    plain = mixed.batch(0, 4, seed=3, shuffle=False)
    assert [p.messages[0]["content"] for p in plain] == ["p0 0", "p1 0", "p0 1", "p1 1"]


def test_a_prompt_that_is_drawn_twice_in_a_step_is_numbered():
    batch = mixture([1, 8], [1, 1]).batch(0, 6, seed=0)
    assert [p.repeat for p in batch if p.part == "p0"] == [0, 1, 2]


def test_an_index_names_a_row_of_a_part():
    mixed = Mixture({"a": part("a", 5, left=[1, 4]), "b": part("b", 3)}, {"a": 1, "b": 1})
    assert len(mixed) == 5 and mixed.fit == Fit(8, too_long=3, dropped=3, longest=5)
    seen = [(p.index, p.part, p.messages[0]["content"]) for p in mixed]
    assert seen == [
        (1, "a", "a 1"),
        (4, "a", "a 4"),
        (5, "b", "b 0"),
        (6, "b", "b 1"),
        (7, "b", "b 2"),
    ]
    for index, name, text in seen:
        assert mixed.of_row(index).messages[0]["content"] == text
        assert mixed.location(index) == f"{name}.jsonl, line {int(text[2:]) + 1}"
    assert mixed[-1] == mixed[4] and mixed[1:3] == [mixed[1], mixed[2]]
    with pytest.raises(IndexError):
        mixed[5]
