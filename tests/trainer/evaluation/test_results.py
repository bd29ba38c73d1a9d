"""The fields of the log, of every part of an evaluation."""

from reflux.trainer.evaluation.acceptance import RuleVerdict
from reflux.trainer.evaluation.metrics import Difference
from reflux.trainer.evaluation.results import Evaluation, log_fields
from reflux.trainer.runs.stats import Estimate


def estimate(mean):
    return Estimate(mean, 0.1, mean - 1, mean + 1, 4)


def verdict(name, outcome):
    return RuleVerdict(name, outcome, estimate(0), 0.0, 0.0, f"{outcome}: in words")


def test_the_fields_of_the_log():
    evaluation = Evaluation(
        {"greedy": estimate(2), "greedy_length": estimate(5)},
        {"greedy": Difference(estimate(2), estimate(3), estimate(-1), estimate(7), 0.25)},
        (verdict("a", "succeeded"), verdict("b", "inconclusive")),
        {"harness/x/acc": 0.5},
        chance=0.25,
    )
    assert log_fields(evaluation, ("greedy",)) == {
        "eval/greedy": 2,
        "eval/greedy_low": 1,
        "eval/greedy_high": 3,
        "eval/greedy_length": 5,
        "eval/chance": 0.25,
        "eval/greedy_difference": -1,
        "eval/greedy_difference_low": -2,
        "eval/greedy_difference_high": 0,
        "eval/greedy_change": 7,
        "eval/greedy_change_low": 6,
        "eval/greedy_change_high": 8,
        "eval/greedy_p": 0.25,
        "harness/x/acc": 0.5,
        "accept/a": "succeeded: in words",
        "accept/b": "inconclusive: in words",
    }


def test_without_options_there_is_no_chance():
    assert "eval/chance" not in log_fields(Evaluation({"greedy": estimate(2)}, {}), ("greedy",))


def test_only_what_succeeded_is_accepted():
    assert Evaluation({}, {}).accepted
    assert Evaluation({}, {}, (verdict("a", "succeeded"),)).accepted
    for outcome in ("failed", "inconclusive"):
        assert not Evaluation({}, {}, (verdict("a", "succeeded"), verdict("b", outcome))).accepted
