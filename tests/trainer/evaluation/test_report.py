"""evaluation.json and report.md hold every number; a table without rows is left out."""

import json
from dataclasses import replace

from prediction_rows import generated
from runs import config, write_data

from reflux.trainer.config.evaluation import AcceptSection
from reflux.trainer.evaluation.acceptance import judge
from reflux.trainer.evaluation.metrics import compare, measure, metric_values
from reflux.trainer.evaluation.report import write_evaluation
from reflux.trainer.evaluation.results import Evaluation

FAILURES = ("wrong", "no_answer", "refused", "truncated")


def answers(correct):
    return [
        generated(
            p,
            mode="greedy",
            correct=p < correct,
            outcome="correct" if p < correct else FAILURES[p % 4],
            tokens=7,
        )
        for p in range(10)
    ]


def report(tmp_path, rows, differences=None, **parts):
    cfg = config(
        tmp_path,
        tmp_path / "run",
        "evaluate",
        task={"name": "exact"},
        eval={"source": str(write_data(tmp_path)), "samples": 0, "against": "there"},
    )
    (tmp_path / "run").mkdir()
    evaluation = Evaluation(measure(rows, ["greedy"]), differences or {}, **parts)
    write_evaluation(cfg, rows, evaluation)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    return found, (tmp_path / "run" / "report.md").read_text()


def test_everything_there_is_to_say(tmp_path):
    rows = answers(6)
    verdicts = (
        judge("good", AcceptSection(metric="greedy", min=0.5), rows),
        judge("bad", AcceptSection(metric="greedy", min=0.7), rows),
    )
    differences = {
        "greedy": compare(metric_values(rows, "greedy"), metric_values(answers(0), "greedy"))
    }
    found, page = report(
        tmp_path, rows, differences, harness={"harness/mmlu/acc": 0.25}, verdicts=verdicts
    )
    greedy = found["metrics"]["greedy"]
    assert greedy["mean"] == 0.6 and greedy["n"] == 10 and found["prompts"] == 10
    assert [v["holds"] for v in found["accept"]] == [True, False] and found["accepted"] is False
    assert found["against"]["greedy"]["change"]["mean"] is None, "JSON has no NaN"
    assert found["against"]["greedy"]["difference"]["mean"] == 0.6
    assert found["harness"] == {"harness/mmlu/acc": 0.25}
    for line in (
        "- **good** succeeded: greedy 0.600",
        "- **bad** failed: greedy 0.600",
        "| greedy | 60.0% | 10.0% | 10.0% | 10.0% | 10.0% |",
        "| greedy_length | 7.000 | [7.000, 7.000] |",
        "## Against `there`, paired by prompt",
        "| greedy | 0.000 | 0.600 | +0.600 [",
        "| mmlu/acc | 0.2500 |",
    ):
        assert line in page, line
    assert "By position" not in page


def test_nothing_more_than_there_is_to_say(tmp_path):
    rows = [
        replace(p, correct=None, generation=replace(p.generation, outcome=None)) for p in answers(0)
    ]
    found, page = report(tmp_path, rows)
    assert found["accepted"] is True and found["against"] is None and found["positions"] == {}
    assert page.count("##") == 0 and "| greedy | 0.000 |" in page
