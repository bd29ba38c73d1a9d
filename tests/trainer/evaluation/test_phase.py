"""The phase `evaluate`: acceptance rules end the process with their exit code and say why."""

import json

import pytest
from evaluation_runs import EXACT, evaluate, verdicts_of
from runs import config, write_data

from reflux.trainer.config import loader

pytestmark = pytest.mark.usefixtures("titan_process")


def test_a_run_ends_with_0_or_3_and_says_why(talkers, tmp_path):
    base = str(tmp_path / "base")
    evaluate(talkers, tmp_path / "base", eval={"limit": 8})
    rules = {"teacher": {"metric": "greedy", "against": base, "max_drop": 0.02}}
    run, _ = evaluate(talkers, tmp_path / "same", eval={"limit": 8}, accept=rules)
    assert verdicts_of(run)["accept/teacher"].startswith("succeeded: greedy")
    rules["student"] = {"run": str(tmp_path / "same"), "against": base, "min_change": 0.15}
    run, _ = evaluate(talkers, tmp_path / "both", 3, eval={"limit": 8}, accept=rules)
    assert verdicts_of(run)["accept/teacher"].startswith("succeeded")
    assert run.summary is not None, "the run itself ended well"
    assert "want at least +15%, 15% missing" in verdicts_of(run)["accept/student"]
    assert "**student** failed: sampled" in (tmp_path / "both" / "report.md").read_text()
    saved = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert saved["accepted"] is False
    assert [v["holds"] for v in saved["accept"]] == [True, False]


def test_the_exit_code_of_a_process(talkers, tmp_path):
    from reflux.trainer import main

    for name, least, code in (("low", 0.0, 0), ("high", 1.0, 3)):
        cfg = config(
            talkers,
            tmp_path / name,
            "evaluate",
            task=EXACT,
            rollout={"max_tokens": 4},
            accept={"x": {"min": least}},
            eval={"source": str(write_data(tmp_path)), "limit": 2},
        )
        (tmp_path / "x.toml").write_text(loader.to_toml(cfg))
        assert main.main(["--config", str(tmp_path / "x.toml")]) == code
