"""Symptoms on texts, answers and grades that a hand can judge."""

import math

import numpy as np
import pytest
from token_stats_cases import token_stats

from reflux.trainer.diagnosis.symptoms import (
    CutOutcome,
    Symptoms,
    auroc,
    confidence_report,
    correction,
    insert_error,
    loops,
    own_error,
    recovery,
    repeated_ngrams,
    revises,
    sampling_gap,
    vote,
    with_answers,
)


def student(prompt, correct, answer=None, ended=True):
    return token_stats(prompt, "student", correct, answer=answer, ended=ended)


def test_repetition():
    assert repeated_ngrams([1, 2, 3, 4, 5]) == repeated_ngrams([]) == repeated_ngrams([7, 7]) == 0
    # five 4-grams, the last is the first again
    assert repeated_ngrams([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repeated_ngrams([7] * 10) == pytest.approx(6 / 7)


def test_loops_need_a_whole_window_and_a_short_period():
    assert loops(list(range(100)) + [1, 2, 3] * 22) and loops([5] * 64)
    assert not loops([5] * 63) and not loops(list(range(64))) and not loops(list(range(17)) * 4)
    assert loops(list(range(16)) * 4)


def test_confidence_by_hand():
    got = confidence_report([0.95, 0.95, 0.5, 0.2], [True, False, False, True], bins=2)
    assert got.accuracy == 0.5 and got.mean == pytest.approx(0.65)
    assert got.overconfidence == pytest.approx(0.15) and got.confident_wrong == 0.25
    assert got.ece == pytest.approx((2 * abs(0.35 - 0.5) + 2 * abs(0.95 - 0.5)) / 4)
    # pairs: (.95,.95) (.95,.5) (.2,.95) (.2,.5)
    assert got.auroc == pytest.approx((0.5 + 1 + 0 + 0) / 4)


def test_perfect_confidence_has_no_error():
    got = confidence_report([1.0, 1.0, 0.0, 0.0], [True, True, False, False], bins=2)
    assert got.ece == 0 and got.auroc == 1 and got.confident_wrong == 0


def test_confidence_needs_one_grade_each():
    with pytest.raises(ValueError, match="2 confidences and 1 grades"):
        confidence_report([0.5, 0.5], [True])


def test_auroc_against_counting():
    g = np.random.default_rng(0)
    a, b = g.integers(0, 5, 30), g.integers(1, 6, 20)
    want = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auroc(a, b) == pytest.approx(want) and math.isnan(auroc([], [1]))


def test_the_most_frequent_answer_wins():
    assert vote(["4", "5", "4", None], [True, False, True, False]) == (0.5, True)
    # of equals the first
    assert vote(["5", "4", None, None], [False, True, False, False]) == (0.25, False)
    assert vote([None, None], [False, False]) == (0.0, False)


def test_votes_are_a_confidence():
    """Prompt 0: four of four for a wrong answer; prompt 1: three of four for the correct one."""
    stats = [student(0, False, "7")] * 4 + [student(1, True, "2")] * 3 + [student(1, False, "3")]
    got = with_answers(Symptoms(looping=0.5), stats, {}, names_answers=lambda s: True)
    v = got.vote_confidence
    assert v.accuracy == 0.5 and v.mean == pytest.approx(0.875)
    assert v.confident_wrong == 0.5 and v.auroc == 0.0
    assert v.overconfidence == pytest.approx(0.375)
    assert got.format_breaks == 0 and got.sampling is None and got.looping == 0.5


def test_a_break_of_format_is_a_finished_text_without_an_answer():
    stats = [
        student(0, True, "1"),
        student(0, False, "2"),
        student(0, False, None),
        student(1, False, None, ended=False),
    ]
    assert with_answers(Symptoms(), stats, {}, names_answers=lambda s: True).format_breaks == 0.25
    assert with_answers(Symptoms(), stats, {}, names_answers=lambda s: False) == Symptoms()
    first = with_answers(Symptoms(), stats, {}, names_answers=lambda s: s.prompt == 0)
    assert first.format_breaks == 1 / 3, "the texts of one grader of two"
    assert (
        with_answers(Symptoms(), [student(0, None)], {}, names_answers=lambda s: True) == Symptoms()
    )


def test_what_sampling_costs():
    greedy = {0: True, 1: False, 2: True, 7: True}
    sampled = {0: [True, False], 1: [False, False], 2: [False, True, True, False]}
    got = sampling_gap(greedy, sampled)
    assert got.greedy.mean == pytest.approx(2 / 3)
    assert got.sampled.mean == pytest.approx(1 / 3)
    # prompt 7 has no sampled text
    assert got.gap.mean == pytest.approx(1 / 3) and got.gap.n == 3
    assert got.gap.low == 0 and got.gap.high == pytest.approx(0.5)
    stats = [student(0, True), student(0, False), student(1, False)]
    joined = with_answers(Symptoms(), stats, {0: True, 1: False}, names_answers=lambda s: False)
    assert joined.sampling.gap.mean == pytest.approx(0.25)


def test_own_errors_stand_beside_a_fresh_start():
    stats = [student(0, True), student(0, False), student(1, False), student(2, True)]
    got = own_error({0: True, 1: False}, stats)
    assert got.texts == 2
    assert got.correct_after.mean == 0.5 and got.correct_from_the_start.mean == 0.25
    assert own_error({}, stats) is None
    assert math.isnan(own_error({0: True}, stats).correct_after.low)
    failed = [*stats, student(0, None), student(1, None)]
    assert own_error({0: True, 1: False}, failed) == got, "a failed grade is no wrong answer"


def test_an_inserted_error_is_one_controlled_change():
    draw = np.random.default_rng(0)
    wrong = {insert_error("so 3 + 09 = 12", draw) for _ in range(20)}
    assert wrong == {"so 3 + 09 = 11", "so 3 + 09 = 13"}
    assert {insert_error("x = 0", draw) for _ in range(9)} == {"x = 1"}  # never negative
    assert insert_error("007", np.random.default_rng(1)) in ("006", "008")  # the width stays
    assert insert_error("a + b", draw) == "a - b"
    assert {insert_error("9" * 5000, draw) for _ in range(20)} == {
        "1" + "0" * 5000,
        "9" * 4999 + "8",
    }, "a model that repeats a digit"
    assert insert_error("the answer is B", draw) in {f"the answer is {o}" for o in "ACD"}
    assert insert_error("nothing here", draw) is None


def test_recovery_and_revision_words():
    assert recovery([True, False], [True, True]) == 0.5 and math.isnan(recovery([True], [False]))
    assert revises("Wait, that is wrong") and revises("let me check")
    assert not revises("waiting for it")


def test_correction_is_a_mean_over_cuts():
    cuts = [CutOutcome(True, True, True, (1.0, 3.0)), CutOutcome(True, False, False, (-2.0, 1.0))]
    got = correction(cuts)
    assert got.cuts == 2 and got.correct_after_clean == 1.0
    assert got.correct_after_error == got.recovery == got.revises == 0.5
    assert got.correct_if_revised == 1.0 and (got.student_gain, got.teacher_gain) == (-0.5, 2.0)
    assert math.isnan(correction(cuts[1:]).correct_if_revised) and correction([]) is None
    more = correction([*cuts, CutOutcome(False, False, False, None)])  # no room for a correction
    assert (more.cuts, more.gains, more.student_gain, more.teacher_gain) == (3, 2, -0.5, 2.0)
    assert more.correct_after_clean == pytest.approx(2 / 3)
    assert math.isnan(correction([CutOutcome(True, True, True, None)]).teacher_gain)
