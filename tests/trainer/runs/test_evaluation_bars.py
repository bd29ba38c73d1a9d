"""The bars of an evaluation: which levels stand beside a metric, and why others do not."""

import pytest
from page_runs import evaluation

from reflux.trainer.runs.evaluation_bars import KINDS, evaluation_bars


def levels(bars):
    """Metric -> kind -> value as it is written."""
    return {r.label: dict(m.title.split() for m in r.marks) for r in bars.rows}


def missing(bars):
    return {k.kind: k.missing for k in bars.keys}


def against(line, theirs):
    """With eval.against, whose greedy accuracy is `theirs`."""
    return line | {"eval/greedy_difference": line["eval/greedy"] - theirs}


def test_all_levels_that_are_known_are_drawn():
    first, last = evaluation(0.2), against(evaluation(0.5) | {"eval/chance": 0.25}, 0.75)
    bars = evaluation_bars({"phase": "distill"}, [first, evaluation(0.3), last])
    assert levels(bars)["greedy"] == {"chance": "0.250", "start": "0.200", "original": "0.750"}
    assert levels(bars)["sampled"] == {"chance": "0.250", "start": "0.200"}, "of another metric"
    assert missing(bars) == dict.fromkeys(KINDS, "")
    (chance, start, original) = bars.rows[0].marks
    assert (chance.at, start.at, original.at) == ("25.00", "20.00", "75.00")


def test_what_is_not_known_says_why():
    bars = evaluation_bars({"phase": "evaluate", "eval": {"against": ""}}, [evaluation(0.5)])
    assert levels(bars) == {"greedy": {}, "sampled": {}}
    assert missing(bars) == {
        "chance": "the questions have no options to guess among",
        "start": "the phase evaluate trains nothing; name the run before in eval.against",
        "original": "eval.against names no run of the original model",
    }
    bars = evaluation_bars({"phase": "distill", "eval": {"against": "runs/a"}}, [evaluation(0.5)])
    assert missing(bars)["start"] == "there is one evaluation yet"
    assert missing(bars)["original"] == "there is no common metric with eval.against"


def test_several_answers_have_another_chance_than_one():
    line = {f"eval/pass@4{end}": 0.5 for end in ("", "_low", "_high")} | {"eval/chance": 0.25}
    assert levels(evaluation_bars({}, [line])) == {"pass@4": {}}


@pytest.mark.parametrize("evaluations", [[], [{}], [{"eval/loss": 3.0}]])
def test_without_a_fraction_there_are_no_bars(evaluations):
    bars = evaluation_bars({"phase": "distill"}, evaluations)
    assert bars.rows == [] and bars.keys == []
