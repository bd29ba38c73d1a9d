"""Votes, format breaks and the price of sampling, on answers that a hand can count."""

import math

import numpy as np
import pytest

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.diagnosis.answers import answer_symptoms, own_errors, sampling_gap, vote
from reflux.trainer.diagnosis.measure import TokenStats


def student(prompt, right, answer=None, ended=True) -> TokenStats:
    rollout = Rollout(Prompt(prompt, ()), (1,), (5, 9), (0.0,) * 2, 0.0, "a", ended)
    return TokenStats(
        rollout,
        "student",
        right,
        np.zeros(2),
        1,
        np.zeros(2),
        np.zeros(2),
        np.zeros(2),
        {},
        {},
        *[np.zeros(2)] * 3,
        answer=answer,
    )


def test_the_most_frequent_answer_wins():
    assert vote(["4", "5", "4", None], [True, False, True, False]) == (0.5, True)
    # of equals the first
    assert vote(["5", "4", None, None], [False, True, False, False]) == (0.25, False)
    assert vote([None, None], [False, False]) == (0.0, False)


def test_votes_are_a_confidence():
    """Prompt 0: four of four for a wrong answer; prompt 1: three of four for the right one."""
    rows = (
        [student(0, False, "7") for _ in range(4)]
        + [student(1, True, "2")] * 3
        + [student(1, False, "3")]
    )
    got = answer_symptoms(rows, {}, names_answers=True)
    v = got["vote_confidence"]
    assert (
        v["accuracy"] == 0.5
        and v["mean"] == pytest.approx(0.875)
        and v["confident_wrong"] == 0.5
        and v["auroc"] == 0.0
    )
    assert (
        v["overconfidence"] == pytest.approx(0.375)
        and got["format_breaks"] == 0
        and "sampling" not in got
    )


def test_a_break_of_format_is_a_finished_text_without_an_answer():
    rows = [
        student(0, True, "1"),
        student(0, False, "2"),
        student(0, False, None),
        student(1, False, None, ended=False),
    ]
    assert answer_symptoms(rows, {}, names_answers=True)["format_breaks"] == 0.25
    assert answer_symptoms(rows, {}, names_answers=False) == {}


def test_what_sampling_costs():
    greedy, sampled = (
        {0: True, 1: False, 2: True, 7: True},
        {0: [True, False], 1: [False, False], 2: [False, True, True, False]},
    )
    got = sampling_gap(greedy, sampled)
    assert got["greedy"]["mean"] == pytest.approx(2 / 3) and got["sampled"][
        "mean"
    ] == pytest.approx(1 / 3)
    # nobody sampled prompt 7
    assert got["gap"]["mean"] == pytest.approx(1 / 3) and got["gap"]["n"] == 3
    assert got["gap"]["low"] == 0 and got["gap"]["high"] == pytest.approx(0.5)
    rows = [student(0, True), student(0, False), student(1, False)]
    assert answer_symptoms(rows, {0: True, 1: False}, names_answers=False)["sampling"]["gap"][
        "mean"
    ] == pytest.approx(0.25)


def test_own_errors_stand_beside_a_fresh_start():
    rows = [student(0, True), student(0, False), student(1, False), student(2, True)]
    got = own_errors({0: True, 1: False}, rows)["own_error"]
    assert (
        got["texts"] == 2
        and got["right_after"]["mean"] == 0.5
        and got["right_from_the_start"]["mean"] == 0.25
    )
    assert (
        own_errors({}, rows) == {}
        and answer_symptoms([student(0, None)], {}, names_answers=True) == {}
    )
    assert math.isnan(own_errors({0: True}, rows)["own_error"]["right_after"]["low"])
