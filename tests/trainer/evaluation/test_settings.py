"""Answers are compared where they were asked for and graded alike."""

import json
import warnings

import pytest
from evaluation_runs import CHOICE, EXACT, evaluate, write_choices

from reflux.trainer.evaluation.settings import FILE, check_settings, load_settings

NOTED = {
    "rollout.max_tokens": 14,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "task.name": "exact",
    "task.options": {"marker": "=>"},
    "task.thinking_end": "",
    "shown": "a",
    "tokenizer": "b",
    "template": "c",
    "template_arguments": {},
}
GREEDY, LIKELIHOOD = ["greedy"], ["likelihood_sum"]


@pytest.mark.parametrize(
    "change, modes, says",
    [
        ({}, ["greedy", "sampled"], None),
        ({"rollout.temperature": 0.2}, ["greedy", "sampled"], "temperature = 0.2 there and 1.0"),
        ({"rollout.temperature": 0.2, "rollout.top_p": 0.5, "rollout.top_k": 3}, GREEDY, None),
        ({"rollout.max_tokens": 3}, GREEDY, "rollout.max_tokens = 3 there and 14 here"),
        ({"rollout.max_tokens": 3}, LIKELIHOOD, None),
        ({"task.options": {}}, GREEDY, r"task.options = {} there and {'marker': '=>'} here"),
        ({"task.thinking_end": "</think>"}, GREEDY, "task.thinking_end"),
        ({"shown": "x"}, LIKELIHOOD, "options in another order.*eval.list_options.* seed"),
        ({"template": "x"}, GREEDY, "another chat template.*the same model.template"),
        ({"template_arguments": {"thinks": False}}, LIKELIHOOD, "template_arguments = .*False"),
        # another model: each has its own template
        ({"template": "x", "tokenizer": "y", "template_arguments": {"a": 1}}, GREEDY, None),
    ],
)
def test_the_first_difference_is_named(change, modes, says):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if says is None:
            return check_settings(NOTED, NOTED | change, "runs/base", modes)
        with pytest.raises(ValueError, match=rf"runs/base: .*{says}"):
            check_settings(NOTED, NOTED | change, "runs/base", modes)


def test_of_a_rule_on_one_part_that_part_counts():
    ours = {"rollout.max_tokens": 9, "eval.parts.a.shown": "1", "eval.parts.ab.shown": "2"}
    theirs = ours | {"eval.parts.ab.shown": "3"}
    check_settings(ours, theirs, "runs/base", GREEDY, "a")
    for part in ("", "ab"):
        with pytest.raises(ValueError, match="shown otherwise"):
            check_settings(ours, theirs, "runs/base", GREEDY, part)


def test_what_is_not_on_record_is_told(tmp_path):
    known = {"rollout.max_tokens": 14, "rollout.temperature": 0.5}
    with pytest.warns(UserWarning, match="not known .*: rollout.top_p, .*shown, template"):
        check_settings(NOTED, known | {"rollout.temperature": 1.0}, "runs/old", ["sampled"])
    with pytest.warns(UserWarning, match="not known"):
        check_settings(NOTED, load_settings(tmp_path), "runs/old", ["sampled"])


OPTIONS = {"list_options": True, "limit": 6, "samples": 1}


@pytest.mark.usefixtures("titan_process")
def test_of_whole_runs(talkers, tmp_path):
    base, plain = str(tmp_path / "base"), tmp_path / "plain.jinja"
    rule = {"x": {"against": base, "max_drop": 1.0}}
    plain.write_text("{{ messages[0].content }}")
    over = {"source": write_choices(tmp_path), "task": CHOICE, "training": {"seq_len": 200}}
    evaluate(talkers, tmp_path / "base", eval=OPTIONS, **over)

    def against(**change):
        spec = OPTIONS | {"against": base} | change.pop("eval", {})
        return evaluate(talkers, tmp_path / "run", **(over | change), eval=spec)

    cases = [
        ({"rollout": {"max_tokens": 14, "temperature": 0.2}}, "rollout.temperature = 1.0 there"),
        ({"eval": {"list_options": "given"}}, "options in another order"),
        ({"seed": 5}, "options in another order"),
        ({"model": {"path": f"{talkers}/policy", "template": str(plain)}}, "chat template"),
        ({"eval": {"against": ""}, "seed": 5, "accept": rule}, "options in another order"),
    ]
    for change, says in cases:
        with pytest.raises(ValueError, match=says):
            against(**change)
    assert not (tmp_path / "run" / "predictions").exists()
    (tmp_path / "base" / FILE).unlink()  # as an older version left it
    with pytest.raises(ValueError, match="rollout.max_tokens = 14 there and 3 here"):
        against(rollout={"max_tokens": 3})
    with pytest.raises(ValueError, match="task.name = 'multiple_choice' there"):
        against(task=EXACT, eval={"list_options": None})
    with pytest.warns(UserWarning, match="not known .*: shown, template, template_arguments is"):
        against()
    assert set(json.loads((tmp_path / "run" / FILE).read_text())) == set(NOTED)


@pytest.mark.usefixtures("titan_process")
def test_a_rule_on_two_other_runs_compares_those(talkers, tmp_path):
    evaluate(talkers, tmp_path / "a", rollout={"max_tokens": 4})
    evaluate(talkers, tmp_path / "b")
    rule = {"run": str(tmp_path / "a"), "against": str(tmp_path / "b"), "max_drop": 1.0}
    with pytest.raises(ValueError, match="rollout.max_tokens = 14 there and 4 here"):
        evaluate(talkers, tmp_path / "c", accept={"x": rule})
