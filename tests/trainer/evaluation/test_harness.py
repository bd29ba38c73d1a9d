"""The harness is called once, with the folder and the seeds, and its numbers keep their names."""

import sys
import types
from dataclasses import replace

import pytest
from runs import config, run_here, write_data

from reflux.trainer.data.chat import Chat
from reflux.trainer.evaluation.harness import load_harness, run_harness
from reflux.trainer.evaluation.phase import EvaluatePhase


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for the package: it remembers how it was called. lm-eval 0.4.13 returns numbers
    like these.
    """
    stub = types.ModuleType("lm_eval")
    stub.calls = []

    def simple_evaluate(**options):
        stub.calls.append(options)
        row = {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 1,
            "exact_match,strict": 0.25,
            "other": "N/A",
        }
        return {"results": {"arc_easy": row}}

    stub.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", stub)
    return stub


def test_numbers_under_their_names(harness, talkers):
    chat = Chat(str(talkers / "policy"))
    found = run_harness(chat, ("arc_easy",), device="cpu", rows=8, limit=3, seed=5)
    assert found == {
        "harness/arc_easy/acc": 0.5,
        "harness/arc_easy/acc_stderr": 0.1,
        "harness/arc_easy/acc_norm": 1.0,
        "harness/arc_easy/exact_match,strict": 0.25,
    }
    (call,) = harness.calls
    want = {
        "model": "hf",
        "tasks": ["arc_easy"],
        "limit": 3,
        "batch_size": 8,
        "device": "cpu",
        "fewshot_random_seed": 5,
        "apply_chat_template": True,
    }
    assert {key: call[key] for key in want} == want
    assert call["model_args"].keys() == {"pretrained", "tokenizer"}
    assert call["model_args"]["pretrained"] == str(talkers / "policy")
    assert call["model_args"]["tokenizer"] is not chat.tokenizer, "the harness changes its own"


@pytest.mark.parametrize("template", ["{{ mood }}: {{ messages[0].content }}", ""])
def test_its_prompts_are_those_of_the_run(harness, talkers, tmp_path, titan_process, template):
    """lm-eval's HFLM: tokenizer.apply_chat_template(..., **chat_template_args)."""
    own, arguments = tmp_path / "own.jinja", {"mood": "kind"}
    own.write_text(template)
    cfg = evaluate(talkers, tmp_path / "run")
    model = replace(cfg.model, template=str(own), template_arguments=arguments)
    run_here(replace(cfg, model=model))
    (call,) = harness.calls
    assert call["apply_chat_template"] is bool(template)
    tokenizer, given = (call["model_args"][k] for k in ("tokenizer", "chat_template_args"))
    assert given == arguments and tokenizer.chat_template == template
    if template:
        ask = [{"role": "user", "content": "Why?"}]
        assert tokenizer.apply_chat_template(ask, tokenize=False, **given) == "kind: Why?"


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"(?s)not installed .*-m pip install 'lm-eval\[hf\]"):
        load_harness()


def evaluate(talkers, folder):
    return config(
        talkers,
        folder,
        "evaluate",
        task={"name": "small_tasks:is_even"},
        rollout={"max_tokens": 4},
        eval={"source": str(write_data(folder.parent, 3)), "samples": 0, "harness": ["arc_easy"]},
    )


def test_in_a_whole_run(harness, talkers, tmp_path, titan_process):
    run = run_here(evaluate(talkers, tmp_path / "run"))
    assert run.events[0]["harness/arc_easy/acc"] == 0.5 and len(harness.calls) == 1
    assert "| arc_easy/acc | 0.5000 |" in (tmp_path / "run" / "report.md").read_text()


def test_two_ranks_are_refused(harness, talkers, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="eval.harness on 2 ranks: .* Start it with one process"):
        EvaluatePhase(evaluate(talkers, tmp_path / "run"), engine=None)


def test_in_a_run_without_the_package(talkers, tmp_path, monkeypatch, titan_process):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="not installed"):
        run_here(evaluate(talkers, tmp_path / "run"))
    assert not (tmp_path / "run" / "predictions").exists()
