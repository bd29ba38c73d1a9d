"""--check: broken set-ups are named before they cost anything, sound ones pass, and nothing is
written.
"""

import json
import os
import re
import shutil
import tempfile
from dataclasses import replace

import pytest
import torch
from assets import free_port
from preflight_cases import changed_tokenizer, files, only_descriptions, problems, swallow_space
from runs import config, with_other_stop

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.preflight import check as check_module
from reflux.trainer.preflight import model_checks
from reflux.trainer.preflight.check import check
from reflux.trainer.preflight.check import examine as examine_report
from reflux.trainer.preflight.data_checks import control_findings, guard_findings, held_out_findings
from reflux.trainer.preflight.dry_run import plan
from reflux.trainer.preflight.pair_checks import stop_findings
from reflux.trainer.preflight.report import Finding


def examine(cfg: Config) -> list[Finding]:
    os.environ["MASTER_PORT"] = str(free_port())
    return examine_report(cfg).findings


@pytest.mark.usefixtures("titan_process")
def test_a_sound_calibration_passes_and_nothing_is_written(
    calibrate, tmp_path, monkeypatch, capsys
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    os.environ["MASTER_PORT"] = str(free_port())
    cfg = calibrate()
    before = files(tmp_path)
    assert check(cfg) == 0
    after = files(tmp_path)
    assert after.keys() == before.keys()  # the scratch folder's time stamp may move
    text = capsys.readouterr().out
    for line in (
        "policy and proxy: different tokenizers (128 ids differ)",
        "accepts 24 of the data's own 24 responses",
        "shared spans",
        "KL(policy || reference) at the start is",
        "sampler against trainer",
        "proxy: prefers 100%",
        "«<|eos|>»",
        "stop set",
    ):
        assert line in text, line


@pytest.mark.usefixtures("titan_process")
def test_a_sound_distillation_passes(distill):
    findings = examine(distill())
    assert not problems(findings) and not problems(findings, "warning")
    assert any("KL(student || teacher)" in f.what for f in findings)


@pytest.mark.parametrize(
    "phase, options, level",
    [
        ("distill", {"objective": "kl"}, "error"),
        ("distill", {"objective": "nll", "on_policy": 0.0, "source": "teacher"}, "ok"),
        ("diagnose", {}, "warning"),
    ],
)
def test_a_teacher_that_stops_at_other_tokens_is_named(talkers, tmp_path, phase, options, level):
    """The ids are the same, and the student would learn an end that it does not know."""
    other = with_other_stop(talkers / "teacher", tmp_path / "teacher")
    over = {"distill": options} if options else {}
    cfg = config(talkers, tmp_path / "run", phase, teacher={"path": str(other)}, **over)
    chats = {"student": Chat(cfg.model.path), "teacher": Chat(str(other))}
    (found,) = stop_findings(cfg, chats)
    assert found.level == level
    assert found.what.startswith("teacher stops at '<|pad|>' (0), the student at '<|eos|>' (2)")
    assert not stop_findings(cfg, chats | {"teacher": Chat(str(talkers / "teacher"))})


@pytest.mark.usefixtures("titan_process")
def test_a_distillation_that_would_never_end_a_text_does_not_pass(distill, talkers, tmp_path):
    other = with_other_stop(talkers / "teacher", tmp_path / "teacher")
    findings = examine(distill(teacher={"path": str(other)}))
    assert "the student would learn to write '<|pad|>' (0)" in problems(findings)


@pytest.mark.usefixtures("titan_process")
def test_rows_without_answers_are_a_warning_where_grades_are_only_shown(distill, tmp_path):
    """The run logs no `task` and goes on."""
    source = tmp_path / "prompts.jsonl"
    rows = [{"prompt": p.question} for p in load_prompts(distill().data.source)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    findings = examine(distill(data={"source": str(source)}))
    assert not problems(findings)
    assert f"no answer, in {len(rows)} of {len(rows)} rows" in problems(findings, "warning")


@pytest.mark.usefixtures("titan_process")
def test_a_student_that_is_its_teacher_learns_nothing(distill, talkers):
    findings = examine(distill(teacher={"path": str(talkers / "policy")}))
    assert "same model" in problems(findings, "warning")


def test_another_vocabulary_is_an_error_for_token_kl_and_not_for_spans(distill, talkers):
    other = {"path": str(talkers / "proxy")}
    errors = problems(examine(distill(teacher=other)))
    assert "student and teacher: different tokenizers (128 ids differ)" in errors
    assert "'byte'" in errors


def test_a_student_that_merges_is_an_error_for_classes(distill, talkers):
    other = {"path": str(talkers / "proxy")}
    exact = {"objective": "class", "on_policy": 0.0, "divergence": "forward"}
    errors = problems(examine(distill(teacher=other, distill=exact)))
    assert "begins with its token" in errors and "distill.allow_biased = true" in errors


def test_span_credit_across_tokenizers_is_an_error(calibrate):
    errors = problems(
        examine(
            calibrate(calibration={"mode": "distillable", "credit": "span", "score_norm": "sum"})
        )
    )
    assert "calibration.credit = 'span' with a proxy of another tokenizer" in errors
    assert "Use calibration.credit = 'prefix' or 'sequence'" in errors


@pytest.mark.usefixtures("titan_process")
def test_another_vocabulary_is_fine_for_a_diagnosis(talkers, tmp_path):
    over = {"teacher": {"path": str(talkers / "proxy")}, "task": {"name": "small_tasks:is_even"}}
    findings = examine(config(talkers, tmp_path / "run", "diagnose", **over))
    assert not problems(findings), problems(findings)
    assert "student and teacher: different tokenizers" in problems(findings, "ok")


@pytest.mark.usefixtures("titan_process")
def test_spans_align_across_tokenizers(distill, talkers):
    other = {"path": str(talkers / "proxy")}
    findings = examine(distill(teacher=other, distill={"objective": "span", "allow_biased": True}))
    assert not problems(findings)
    assert any("shared spans" in f.what and "coverage 100%" in f.what for f in findings)


@pytest.mark.usefixtures("titan_process")
def test_a_tokenizer_that_changes_the_text_is_an_error(calibrate, talkers, tmp_path):
    rows = [
        {
            "prompt": "What is 1+1?",
            "answer": "2",
            "response": f"{'SUM !' if k % 2 else 'sum!'} => 2",
        }
        for k in range(8)
    ]
    (tmp_path / "upper.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    over = {"data": {"source": str(tmp_path / "upper.jsonl")}}
    proxy = changed_tokenizer(talkers / "proxy", tmp_path / "eats", swallow_space)
    findings = examine(calibrate(proxy={"path": str(proxy)}, **over))
    errors = problems(findings)
    assert "50.0% of the first 8 texts do not round-trip" in errors and "SUM" in errors
    lowers = changed_tokenizer(
        talkers / "proxy",
        tmp_path / "lower",
        lambda table: table.update(normalizer={"type": "Lowercase"}),
    )
    assert "round-trip" not in problems(examine(calibrate(proxy={"path": str(lowers)}, **over))), (
        "a normaliser is no loss"
    )


def test_a_prompt_that_does_not_fit_is_an_error_with_the_length_to_set(calibrate):
    cfg = calibrate(rollout={"max_tokens": 60})
    errors = problems(examine(cfg))
    chat = Chat(cfg.model.path)
    longest = max(len(chat.prompt_ids(p.messages)) for p in load_prompts(cfg.data.source))
    assert "prompts are too long" in errors and f"training.seq_len >= {longest + 59}" in errors
    fits = examine_lengths(
        calibrate(rollout={"max_tokens": 60}, training={"seq_len": longest + 59})
    )
    assert not problems(fits)


def test_what_becomes_of_responses_beyond_a_proxys_positions(calibrate, talkers, tmp_path):
    """Of the policy's ids: an error, they are known. Of others: those that are too long are left
    out.
    """
    for name, level, words in (
        ("policy", "error", "24 prompts .* \\+ rollout.max_tokens 12 = .*100.0% .* too long"),
        ("proxy", "warning", "\\+ rollout.max_tokens 12 = .*longer texts are left out as unalign"),
    ):
        proxy = tmp_path / name
        shutil.copytree(talkers / name, proxy)
        settings = json.loads((proxy / "config.json").read_text())
        chat = Chat(str(proxy))
        prompts = load_prompts(calibrate().data.source)
        lengths = [len(chat.prompt_ids(p.messages)) for p in prompts]
        positions = max(lengths) + 1 if name == "proxy" else min(lengths)
        settings["max_position_embeddings"] = positions
        (proxy / "config.json").write_text(json.dumps(settings))
        (found,) = [
            f
            for f in examine_lengths(calibrate(proxy={"path": str(proxy)}))
            if f.what.startswith("proxy")
        ]
        assert found.level == level and re.search(words, found.what), found


def examine_lengths(cfg: Config) -> list[Finding]:
    return [f for f in plan(cfg).findings if "longest" in f.what]


@pytest.mark.parametrize(
    "task, words",
    [
        (
            {"name": "exact", "options": {"marker": "##"}},
            "accepts 0 of the data's own 24 responses; prompt 0:",
        ),
        (
            {"name": "runs:raise_sometimes"},
            "task runs:raise_sometimes: grading failed on 24 of 24 texts",
        ),
        ({"name": "exakt"}, "unknown task 'exakt'"),
    ],
)
def test_a_grader_at_odds_with_the_data_is_an_error(calibrate, task, words):
    assert words in problems(examine(calibrate(task={"options": {}} | task)))


@pytest.mark.usefixtures("titan_process")
def test_a_prompt_that_writes_out_a_control_token_is_a_warning(talkers):
    """The policy reads <|eos|> as the end of the turn; the proxy has no such token."""
    chats = {name: Chat(str(talkers / name)) for name in ("policy", "proxy")}
    own = chats["policy"].tokenizer.eos_token
    texts = ["plain", f"Say {own} twice", "a < b, [INST"]
    prompts = [Prompt(i, ({"role": "user", "content": text},)) for i, text in enumerate(texts)]
    assert chats["policy"].stop_id in chats["policy"].prompt_ids(prompts[1].messages)[3:-3]
    found = problems(control_findings({"policy": chats["policy"]}, prompts), "warning")
    assert f"1 of the first 3 prompts write out a control token of {talkers}" in found
    assert f"prompt 1 {own!r}: it is read as the token" in found
    assert not control_findings(chats, [prompts[0], prompts[2]])


def test_a_proxy_that_knows_nothing_is_a_warning(calibrate, assets):
    findings = examine(calibrate(proxy={"path": str(assets / "gemma3")}))
    assert "sign of the effect" in problems(findings, "warning")


@pytest.mark.usefixtures("titan_process")
def test_a_policy_that_is_not_its_reference_is_an_error(calibrate):
    errors = problems(examine(calibrate(model={"from_scratch": True})))
    assert "KL(policy || reference) at the start" in errors


@pytest.mark.usefixtures("titan_process")
def test_a_calibration_without_a_reference_kl_is_a_warning(calibrate):
    findings = examine(calibrate(reference={"beta": 0.0}))
    said = problems(findings, "warning")
    assert "reference.beta = 0" in said and "kl_budget" not in said and not problems(findings)
    findings = examine(calibrate(reference={"beta": 0.0}, guard={"kl_budget": 0.1}))
    assert "guard.kl_budget = 0.1 is not watched: none" in problems(findings, "warning")


@pytest.mark.usefixtures("titan_process")
def test_a_sampler_that_disagrees_with_the_trainer_is_an_error(calibrate, monkeypatch):
    sample_texts = model_checks.sample_texts

    def shifted(*args):
        rollouts = sample_texts(*args)
        return [replace(x, logp=tuple(v - 0.01 for v in x.logp)) for x in rollouts]

    monkeypatch.setattr(check_module, "sample_texts", shifted)
    assert "differ by 0.01 in the mean" in problems(examine(calibrate()))


@pytest.mark.usefixtures("titan_process")
def test_weights_that_are_not_there_are_an_error(calibrate, talkers, tmp_path):
    empty = only_descriptions(talkers / "proxy", tmp_path / "empty")
    assert "no model.safetensors" in problems(examine(calibrate(proxy={"path": str(empty)})))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("every, told", [(0, True), (1, False)])
def test_a_guard_that_cannot_act_is_told(calibrate, every, told):
    cfg = calibrate(eval={"source": "x.jsonl", "every": every}, steps=20)
    found = guard_findings(cfg)
    assert len(found) == told == ("guard.utility_drop" in problems(plan(cfg).findings, "warning"))
    assert [f.level for f in found] == ["warning"] * told
    assert not told or found[0].advice.startswith("set eval.every = 2, or guard.utility_drop = 0")


def test_an_evaluation_on_the_training_data_is_told(calibrate, tmp_path):
    source = calibrate().data.source
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    for asked, told in (
        ({"source": source}, True),
        ({"parts": {"a": {"source": f"{os.path.dirname(source)}/da*.jsonl"}}}, True),
        ({"source": str(tmp_path / "other.jsonl")}, False),
        ({}, False),
    ):
        findings = held_out_findings(calibrate(eval=asked))
        assert [f.what.startswith("[data] and [eval] both read") for f in findings] == [True] * told
    hub = SourceSection("org/set", split="train")
    cfg = calibrate(eval={"source": "org/set", "split": "test"})
    assert not held_out_findings(replace(cfg, data=replace(cfg.data, source=hub.source)))
