"""--check tries the models that grade, as it does any other grader."""

import os
import shutil

import pytest
import torch
from assets import free_port
from preflight_cases import problems
from runs import config
from transformers import AutoConfig, AutoModelForSequenceClassification

from reflux.trainer.data.tasks import RewardModelGrader
from reflux.trainer.preflight.check import examine as examine_report


def examine(cfg):
    os.environ["MASTER_PORT"] = str(free_port())
    return examine_report(cfg).findings


@pytest.fixture
def scorer(talkers, tmp_path):
    """A reward model: a talker with a head of one logit."""
    folder = shutil.copytree(talkers / "policy", tmp_path / "scorer")
    shape = AutoConfig.from_pretrained(folder)
    shape.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    return str(folder)


def evaluate(talkers, tmp_path, calibrate, task):
    source = calibrate().data.source
    return config(talkers, tmp_path / "run", "evaluate", eval={"source": source}, task=task)


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("reward_model", {}, "task.options.path is missing"),
        ("reward_model", {"path": "/nowhere"}, "reward_model: /nowhere cannot be loaded"),
        ("reward_model", {"device": "gpu"}, "device = 'gpu' is not there"),
        ("judge", {"device": "gpu"}, "device = 'gpu' is not there"),
        ("column", {"tasks": {"a": "reward_model"}}, "task.options.path is missing"),
    ],
)
def test_what_would_end_the_run_is_an_error(
    talkers, tmp_path, calibrate, scorer, name, options, says
):
    """It was "ok": a reward model was not built."""
    given = {"path": scorer, **options} if "device" in options else options
    cfg = evaluate(talkers, tmp_path, calibrate, {"name": name, "options": given})
    assert says in problems(examine(cfg))


@pytest.mark.usefixtures("titan_process")
@pytest.mark.filterwarnings("ignore")
def test_a_reward_model_scores_the_datas_own_responses(
    talkers, tmp_path, calibrate, scorer, monkeypatch
):
    task = {"name": "reward_model", "options": {"path": scorer}}
    cfg = evaluate(talkers, tmp_path, calibrate, task)
    findings = examine(cfg)
    assert not problems(findings) and "task reward_model: mean reward" in problems(findings, "ok")

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(RewardModelGrader, "__init__", out_of_memory)
    assert "no room for it" in problems(examine(cfg))


@pytest.mark.usefixtures("titan_process")
@pytest.mark.filterwarnings("ignore")
def test_without_responses_it_scores_sampled_ones(talkers, tmp_path, calibrate, scorer):
    source = tmp_path / "asked.jsonl"
    source.write_text('{"prompt": "What is 1+1?"}\n' * 3)
    options = {"path": scorer, "max_tokens": 2}  # no text fits
    task = {"name": "reward_model", "options": options}
    cfg = config(talkers, tmp_path / "run", "evaluate", eval={"source": str(source)}, task=task)
    assert "max_tokens is 2" in problems(examine(cfg))
