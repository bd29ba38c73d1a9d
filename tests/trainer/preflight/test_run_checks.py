"""Runs that a configuration compares with are looked at by --check."""

import pytest
from prediction_rows import prediction
from preflight_cases import problems
from runs import config

from reflux.trainer.evaluation.predictions import save_predictions
from reflux.trainer.preflight.check import examine
from reflux.trainer.preflight.run_checks import run_findings

RULE = {"metric": "pass@3", "min": 0.5}


@pytest.fixture
def evaluated(tmp_path):
    """Samples of a prompt -> the folder of a run that has them."""

    def save(samples, correct=True):
        folder = tmp_path / f"of_{samples}"
        answers = [prediction(p, k, correct=correct) for p in range(4) for k in range(samples)]
        save_predictions(folder, 0, answers)
        return str(folder)

    return save


def evaluate(talkers, tmp_path, **over):
    over = {"eval": {"source": "d", "samples": 3, "pass_at": [3]} | over.pop("eval", {})} | over
    return config(talkers, tmp_path / "run", "evaluate", task={"name": "exact"}, **over)


def test_a_run_that_has_what_the_rules_want_is_no_finding(talkers, tmp_path, evaluated):
    three = evaluated(3)
    rules = {"a": RULE | {"run": three}, "b": {"against": three, "max_drop": 0.1}, "c": RULE}
    asked = {"against": three, "by": "generation"}
    assert run_findings(evaluate(talkers, tmp_path, accept=rules)) == []
    assert run_findings(evaluate(talkers, tmp_path)) == []
    errors = problems(run_findings(evaluate(talkers, tmp_path, eval=asked)))
    assert "eval.against" in errors and "has no greedy answers" in errors


def test_too_few_samples_are_an_error_and_no_samples_yet_a_warning(talkers, tmp_path, evaluated):
    cfg = evaluate(talkers, tmp_path, accept={"a": RULE | {"run": evaluated(2)}})
    assert "pass@3: want at least 3 sampled answers" in problems(run_findings(cfg))
    later = str(tmp_path / "later")
    cfg = evaluate(talkers, tmp_path, accept={"a": RULE | {"run": later}})
    found = run_findings(cfg)
    assert f"accept.a.run = {later!r}: no evaluation there yet" in problems(found, "warning")
    assert not problems(found)


def test_a_run_that_is_still_to_come_hides_no_error_of_another(talkers, tmp_path, evaluated):
    rules = {"a": RULE | {"run": str(tmp_path / "later")}, "b": RULE | {"run": evaluated(2)}}
    found = run_findings(evaluate(talkers, tmp_path, accept=rules))
    assert [(f.level, f.what.split(" = ")[0]) for f in found] == [
        ("warning", "accept.a.run"),
        ("error", "accept.b.run"),
    ]


def test_check_shows_them(talkers, tmp_path, evaluated):
    """Beside everything else: there are no prompts here."""
    cfg = evaluate(talkers, tmp_path, accept={"a": RULE | {"run": evaluated(2)}})
    assert "accept.a.run" in problems(examine(cfg).findings)
