"""Verdicts by hand: each threshold from both sides, and what the interval has to say."""

import math

import pytest

from reflux.trainer.config.evaluation import AcceptSection
from reflux.trainer.evaluation.acceptance import as_row, check_rule, judge
from reflux.trainer.evaluation.predictions import save_rows


def rows(right, of=100, mode="sampled"):
    """`right` of the prompts, the first ones, are answered right."""
    return [
        {
            "mode": mode,
            "prompt": p,
            "sample": 0,
            "id": str(p),
            "answer": "a",
            "correct": p < right,
            "reward": 0.0,
        }
        for p in range(of)
    ]


@pytest.fixture
def base(tmp_path):
    save_rows(tmp_path / "base", 0, rows(50))
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    "right, rule, holds, margin",
    [
        (60, {"min": 0.5}, True, 0.1),
        (60, {"min": 0.6}, True, 0.0),
        (60, {"min": 0.61}, False, -0.01),
        (60, {"max": 0.5}, False, -0.1),
        (40, {"max": 0.5}, True, 0.1),
        (48, {"max_drop": 0.02}, True, 0.0),
        (47, {"max_drop": 0.02}, False, -0.01),
        (90, {"max_drop": 0.02}, True, 0.42),  # a gain is no drop
        (60, {"min_change": 0.15}, True, 0.05),
        (57, {"min_change": 0.15}, False, -0.01),
        (40, {"min_change": 0.15}, False, -0.35),
        (20, {"max_change": -0.5}, True, 0.1),
        (26, {"max_change": -0.5}, False, -0.02),
        (90, {"max_change": -0.5}, False, -1.3),
    ],
)
def test_a_threshold_from_both_sides(base, right, rule, holds, margin):
    rule = AcceptSection(against="" if "min" in rule or "max" in rule else base, **rule)
    verdict = judge("x", rule, rows(right))
    assert verdict.holds is holds and verdict.margin == pytest.approx(margin, abs=1e-9)
    assert verdict.words.startswith("holds: sampled" if holds else "does NOT hold: sampled")
    assert ("to spare" if holds else "missing") in verdict.words and as_row(verdict)["value"][
        "n"
    ] == 100


def test_the_words_are_plain(base):
    verdict = judge("student", AcceptSection(against=base, max_change=-0.5), rows(30))
    assert verdict.words == (
        f"does NOT hold: sampled 0.300, in {base} 0.500: -40% [{verdict.value.low:+.0%}, "
        f"{verdict.value.high:+.0%}] over 100 prompts; want at most -50%, 10% missing"
    )
    assert -0.6 < verdict.value.low < -0.45 and -0.35 < verdict.value.high < -0.2


def test_a_change_counts_only_if_its_interval_excludes_0(base, tmp_path):
    few = str(tmp_path / "few")
    save_rows(tmp_path / "few", 0, rows(2, of=4))
    unsure = judge("x", AcceptSection(against=few, min_change=0.15), rows(3, of=4))
    assert (
        not unsure.holds
        and unsure.margin > 0
        and unsure.words.endswith("35% to spare, but the 95 % interval may hold 0")
    )
    assert judge(
        "x", AcceptSection(against=few, min_change=0.15, excludes_zero=False), rows(3, of=4)
    ).holds
    assert judge("x", AcceptSection(against=base, min_change=0.15), rows(60)).holds


def test_the_whole_interval_can_be_asked_for(base):
    mean, whole = (
        judge("x", AcceptSection(against=base, max_drop=0.05, whole_interval=w), rows(47))
        for w in (False, True)
    )
    assert mean.holds and not whole.holds and whole.margin == pytest.approx(whole.value.low + 0.05)
    assert (
        judge(
            "x", AcceptSection(against=base, max_change=-0.2, whole_interval=True), rows(30)
        ).margin
        > 0
        > judge(
            "x", AcceptSection(against=base, max_change=-0.39, whole_interval=True), rows(30)
        ).margin
    )
    assert "with the whole interval" in whole.words


def test_nothing_to_compare_with_holds_nothing(tmp_path):
    save_rows(tmp_path / "zero", 0, rows(0))
    verdict = judge("x", AcceptSection(against=str(tmp_path / "zero"), min_change=0.1), rows(50))
    assert not verdict.holds and math.isnan(verdict.margin) and "no number" in verdict.words


def test_another_run_can_be_judged(base, tmp_path):
    save_rows(tmp_path / "student", 3, rows(10))
    rule = AcceptSection(run=str(tmp_path / "student"), against=base, max_change=-0.5)
    check_rule("student", rule, rows(100))
    assert judge("student", rule, rows(100)).value.mean == pytest.approx(-0.8)


def test_runs_that_cannot_be_compared_are_refused_before_anything_is_answered(base, tmp_path):
    for rule, says in (
        (
            AcceptSection(against="/nowhere", max_drop=0.1),
            "accept.x.against = '/nowhere': no predictions",
        ),
        (AcceptSection(run="/nowhere", min=0.1), "accept.x.run = '/nowhere'"),
        (AcceptSection(metric="greedy", run=base, min=0.1), "has no greedy answers"),
        (AcceptSection(metric="greedy", against=base, max_drop=0.1), "greedy has 0 answers"),
    ):
        with pytest.raises(ValueError) as error:
            check_rule("x", rule, rows(9, of=9) + rows(9, of=9, mode="greedy"))
        assert says in str(error.value)
    with pytest.raises(ValueError, match="same prompts and samples"):
        check_rule("x", AcceptSection(against=base, max_drop=0.1), rows(9, of=9))
