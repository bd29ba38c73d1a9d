"""Truncated texts beside the graded ones of their group."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.truncated_grades import beside_their_group

CUT = Grade(0.0, False, graded=False)
FAILED = Grade(0.0, False, error="no such column")


def texts(*prompts, parts=None):
    """One text of each of these prompts."""
    named = parts or [""] * len(prompts)
    rows = [Prompt(i, (), part=part) for i, part in zip(prompts, named)]
    return [Rollout(prompt, (1,), (5,), (0.0,), 0.0, "x", True) for prompt in rows]


def reward(value: float) -> Grade:
    return Grade(value, None)


@pytest.mark.parametrize(
    "group, want",
    [
        ([reward(-1.0), CUT, reward(1.0)], Grade(-1.0, None, graded=False)),
        ([CUT, reward(0.5), reward(2.0)], Grade(0.0, None, graded=False)),
        ([reward(-3.0), reward(-2.0), CUT], Grade(-3.0, None, graded=False)),
        ([Grade(-1.0, False), Grade(1.0, True), CUT], Grade(-1.0, False, graded=False)),
        ([Grade(0.0, False), Grade(1.0, True), CUT], CUT),
        ([Grade(1.0, True), CUT], CUT),
        ([FAILED, CUT], CUT),
        ([CUT], CUT),
    ],
)
def test_a_truncated_text_has_at_most_the_least_reward_of_its_group(group, want):
    (place,) = [i for i, grade in enumerate(group) if grade is CUT]
    got = beside_their_group(group, texts(*[0] * len(group)))
    assert got[place] == want
    assert [g for i, g in enumerate(got) if i != place] == [g for g in group if g is not CUT]


def test_other_groups_do_not_count():
    grades = [reward(-1.0), CUT, reward(-5.0), CUT]
    got = beside_their_group(grades, texts(0, 0, 1, 1))
    assert [g.reward for g in got] == [-1.0, -1.0, -5.0, -5.0]


def test_a_group_that_is_all_cut_has_no_right_and_wrong_where_no_other_has():
    by_rewards = beside_their_group([reward(-1.0), CUT, CUT], texts(0, 1, 1))
    assert [g.correct for g in by_rewards[1:]] == [None, None]
    assert [g.reward for g in by_rewards[1:]] == [0.0, 0.0]
    graded = [Grade(1.0, True), reward(1.0), CUT]
    assert beside_their_group(graded, texts(0, 2, 1))[2] == CUT
    parts = texts(0, 2, 1, parts=("a", "b", "b"))
    assert beside_their_group(graded, parts)[2] == replace(CUT, correct=None)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0]))))
def test_rewards_from_0_to_1_are_left_as_they_are(rows):
    grades = [CUT if cut else Grade(x, x == 1.0) for cut, _, x in rows]
    assert beside_their_group(grades, texts(*(group for _, group, _ in rows))) == grades
