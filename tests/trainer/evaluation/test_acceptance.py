"""Verdicts by hand: each threshold from both sides, by the mean and by the whole interval."""

import math

import pytest
from prediction_rows import generated, prediction

from reflux.trainer.config.evaluation import AcceptSection
from reflux.trainer.config.sections import TaskSection
from reflux.trainer.evaluation.acceptance import check_rule, judge
from reflux.trainer.evaluation.predictions import save_predictions

TASKS = {"": TaskSection(name="exact")}


def rows(correct, of=100, mode="sampled"):
    """`correct` of the prompts, the first ones, have a correct answer."""
    return [prediction(p, mode=mode, correct=p < correct, id=str(p)) for p in range(of)]


@pytest.fixture
def base(tmp_path):
    save_predictions(tmp_path / "base", 0, rows(50))
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    "correct, rule, holds, margin",
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
def test_a_threshold_from_both_sides(base, correct, rule, holds, margin):
    rule = AcceptSection(against="" if "min" in rule or "max" in rule else base, **rule)
    verdict = judge("x", rule, rows(correct))
    assert verdict.holds is holds and verdict.margin == pytest.approx(margin, abs=1e-9)
    assert verdict.outcome == ("succeeded" if holds else "failed")
    assert verdict.words.startswith(f"{verdict.outcome}: sampled")
    assert ("to spare" if holds else "missing") in verdict.words and verdict.value.n == 100


def test_the_words_are_plain(base):
    verdict = judge("student", AcceptSection(against=base, max_change=-0.5), rows(30))
    assert verdict.words == (
        f"failed: sampled 0.300, in {base} 0.500: -40% [{verdict.value.low:+.0%}, "
        f"{verdict.value.high:+.0%}] over 100 prompts; want at most -50%, 10% missing"
    )
    assert -0.6 < verdict.value.low < -0.45 and -0.35 < verdict.value.high < -0.2


def test_a_change_counts_only_if_its_interval_excludes_0(base, tmp_path):
    few = str(tmp_path / "few")
    save_predictions(tmp_path / "few", 0, rows(2, of=4))
    unsure = judge("x", AcceptSection(against=few, min_change=0.15), rows(3, of=4))
    assert unsure.outcome == "inconclusive" and not unsure.holds and unsure.margin > 0
    assert unsure.words.endswith("35% to spare, but the 95 % interval may hold 0")
    assert judge(
        "x", AcceptSection(against=few, min_change=0.15, excludes_zero=False), rows(3, of=4)
    ).holds
    assert judge("x", AcceptSection(against=base, min_change=0.15), rows(60)).holds


def test_the_whole_interval_can_decide(base):
    mean, whole = (
        judge("x", AcceptSection(against=base, max_drop=0.05, whole_interval=w), rows(47))
        for w in (False, True)
    )
    assert mean.holds and not whole.holds and whole.margin == pytest.approx(whole.value.low + 0.05)
    assert "with the whole interval" in whole.words


@pytest.mark.parametrize(
    "rule, outcome",
    [
        ({"max_change": -0.2}, "succeeded"),  # -40 % [-50 %, -30 %], about
        ({"max_change": -0.39}, "inconclusive"),
        ({"max_change": -0.6}, "failed"),
        ({"max_drop": 0.35}, "succeeded"),  # -0.20 [-0.28, -0.12], about
        ({"max_drop": 0.2}, "inconclusive"),
        ({"max_drop": 0.02}, "failed"),
    ],
)
def test_an_interval_on_both_sides_of_the_threshold_is_inconclusive(base, rule, outcome):
    verdict = judge("x", AcceptSection(against=base, whole_interval=True, **rule), rows(30))
    assert verdict.outcome == outcome and (verdict.margin >= 0) == (outcome == "succeeded")
    assert verdict.words.startswith(f"{outcome}: sampled 0.300")


def test_nothing_to_compare_with_is_inconclusive(tmp_path):
    save_predictions(tmp_path / "zero", 0, rows(0))
    verdict = judge("x", AcceptSection(against=str(tmp_path / "zero"), min_change=0.1), rows(50))
    assert verdict.outcome == "inconclusive" and not verdict.holds
    assert math.isnan(verdict.margin) and "not a number" in verdict.words


def test_another_run_can_be_judged(base, tmp_path):
    save_predictions(tmp_path / "student", 3, rows(10))
    rule = AcceptSection(run=str(tmp_path / "student"), against=base, max_change=-0.5)
    check_rule("student", rule, rows(100), TASKS)
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
            check_rule("x", rule, rows(9, of=9) + rows(9, of=9, mode="greedy"), TASKS)
        assert says in str(error.value)
    with pytest.raises(ValueError, match="same prompts and samples"):
        check_rule("x", AcceptSection(against=base, max_drop=0.1), rows(9, of=9), TASKS)


@pytest.mark.parametrize("option", ["run", "against"])
@pytest.mark.parametrize("failed, refused", [(100, True), (6, True), (5, False), (0, False)])
def test_a_run_with_too_many_failed_grades_decides_nothing(tmp_path, base, option, failed, refused):
    """All of them: what an older run left on data without answers."""
    wrong = [generated(p, id=str(p), correct=False) for p in range(100)]
    broken = [generated(p, id=str(p), correct=False, error="no answer") for p in range(failed)]
    save_predictions(tmp_path / "other", 0, broken + wrong[failed:])
    other = str(tmp_path / "other")
    runs = {"run": other, "against": base} if option == "run" else {"against": other}
    rule = AcceptSection(max_drop=1.0, **runs)
    if not refused:
        check_rule("x", rule, rows(100), TASKS)
        return
    with pytest.raises(ValueError) as error:
        check_rule("x", rule, rows(100), TASKS)
    says = f"accept.x.{option} = {other!r}: there, task exact: grading failed on {failed} of 100"
    assert says in str(error.value) and "the first error: no answer" in str(error.value)


def test_the_answers_of_a_part_have_the_budget_of_its_task(tmp_path):
    """Of a part that only the other run has, that of [task]."""
    broken = [generated(p, id=str(p), part="q", correct=False, error="boom") for p in range(9)]
    save_predictions(tmp_path / "other", 0, broken)
    ours = [generated(p, id=str(p), part="q", correct=False) for p in range(9)]
    rule = AcceptSection(against=str(tmp_path / "other"), max_drop=1.0)
    lenient = {"": TaskSection("exact"), "q": TaskSection("exact", max_failed=1.0)}
    check_rule("x", rule, ours, lenient)
    for tasks in ({"": TaskSection("exact", max_failed=1.0), "q": TaskSection("exact")}, TASKS):
        with pytest.raises(ValueError, match="task exact of part q: grading failed on 9 of 9"):
            check_rule("x", rule, ours, tasks)


@pytest.mark.parametrize("known", [True, False])
def test_pass_at_k_of_a_run_with_fewer_samples_is_refused_before(tmp_path, known):
    """All questions were answered first. A reward without right and wrong has no pass@K, either."""
    for name, samples, correct in (("two", 2, True), ("three", 3, True), ("rewards", 3, None)):
        answers = [prediction(p, k, correct=correct) for p in range(4) for k in range(samples)]
        save_predictions(tmp_path / name, 0, answers)
    ours = [prediction(p, k) for p in range(4) for k in range(3)] if known else None
    two, three, rewards = (str(tmp_path / name) for name in ("two", "three", "rewards"))
    pass_at_3 = {"metric": "pass@3"}
    check_rule("x", AcceptSection(run=three, min=0.5, **pass_at_3), ours, TASKS)
    check_rule("x", AcceptSection(against=three, max_drop=0.5, **pass_at_3), ours, TASKS)
    for rule, says in (
        (AcceptSection(run=two, min=0.5, **pass_at_3), f"accept.x.run = {two!r}: pass@3: want at"),
        (AcceptSection(run=rewards, min=0.5, **pass_at_3), "rewards': pass@3: want at least 3"),
        (AcceptSection(against=rewards, max_drop=0.5, **pass_at_3), "accept.x.against = "),
        (AcceptSection(against=two, run=three, max_drop=0.5, **pass_at_3), "sampled has 8 answers"),
        (AcceptSection(metric="greedy", run=two, min=0.5), "has no greedy answers"),
    ):
        with pytest.raises(ValueError) as error:
            check_rule("x", rule, ours, TASKS)
        assert says in str(error.value)


def test_a_run_is_looked_at_by_itself_where_the_questions_are_not_known(base):
    check_rule("x", AcceptSection(against=base, max_drop=0.1), None, TASKS)
    with pytest.raises(ValueError, match="accept.x.against = .*has no greedy answers"):
        check_rule("x", AcceptSection(metric="greedy", against=base, max_drop=0.1), None, TASKS)
