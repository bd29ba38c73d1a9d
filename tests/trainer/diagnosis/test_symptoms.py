"""Symptoms on texts and grades that a hand can judge."""

import math

import numpy as np
import pytest

from reflux.trainer.diagnosis.symptoms import (
    auroc,
    confidence_report,
    insert_error,
    loops,
    recovery,
    repeated_ngrams,
    revises,
)


def test_repetition():
    assert (
        repeated_ngrams([1, 2, 3, 4, 5]) == 0
        and repeated_ngrams([]) == 0
        and repeated_ngrams([7, 7]) == 0
    )
    # five 4-grams, the last is the first again
    assert repeated_ngrams([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repeated_ngrams([7] * 10) == pytest.approx(6 / 7)


def test_loops_need_a_whole_window_and_a_short_period():
    assert loops(list(range(100)) + [1, 2, 3] * 22) and loops([5] * 64)
    assert not loops([5] * 63) and not loops(list(range(64))) and not loops(list(range(17)) * 4)
    assert loops(list(range(16)) * 4)


def test_confidence_by_hand():
    got = confidence_report([0.95, 0.95, 0.5, 0.2], [True, False, False, True], bins=2)
    assert (
        got.accuracy == 0.5
        and got.mean == pytest.approx(0.65)
        and got.overconfidence == pytest.approx(0.15)
    )
    assert got.confident_wrong == 0.25
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


def test_an_inserted_error_is_one_controlled_change():
    draw = np.random.default_rng(0)
    wrong = {insert_error("so 3 + 09 = 12", draw) for _ in range(20)}
    assert wrong == {"so 3 + 09 = 11", "so 3 + 09 = 13"}
    assert {insert_error("x = 0", draw) for _ in range(9)} == {"x = 1"}  # never negative
    assert insert_error("007", np.random.default_rng(1)) in ("006", "008")  # the width stays
    assert insert_error("a + b", draw) == "a - b"
    assert insert_error("the answer is B", draw) in {f"the answer is {o}" for o in "ACD"}
    assert insert_error("nothing here", draw) is None


def test_recovery_and_revision_words():
    assert recovery([True, False], [True, True]) == 0.5 and math.isnan(recovery([True], [False]))
    assert (
        revises("Wait, that is wrong") and revises("let me check") and not revises("waiting for it")
    )
