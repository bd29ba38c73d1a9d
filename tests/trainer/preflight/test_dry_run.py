"""--dry-run: what cannot work is named, and neither weights nor a process group are needed."""

import shutil
from dataclasses import replace

import pytest
import torch
from preflight_cases import files, only_descriptions, problems

from reflux.trainer.preflight.check import check, examine
from reflux.trainer.preflight.dry_run import dry_run, plan
from reflux.trainer.preflight.shapes import planned_shapes, planned_titan


def test_a_dry_run_reads_no_weights_and_starts_nothing(calibrate, talkers, tmp_path, capsys):
    over = {
        "model": {"path": str(only_descriptions(talkers / "policy", tmp_path / "p"))},
        "proxy": {"path": str(only_descriptions(talkers / "proxy", tmp_path / "c"))},
    }
    cfg = calibrate(**over)
    before = files(tmp_path)
    assert dry_run(cfg) == 0 and files(tmp_path) == before
    assert not torch.distributed.is_initialized()
    text = capsys.readouterr().out
    for word in (
        "policy (trained)",
        "reference (frozen)",
        "proxy (frozen)",
        "119,232",
        "native",
        "hf",
        "while sampling",
    ):
        assert word in text


def test_a_dry_run_without_tokenizer_and_data_says_so(calibrate, talkers, tmp_path):
    (tmp_path / "p").mkdir()
    shutil.copy(talkers / "policy" / "config.json", tmp_path / "p")
    cfg = calibrate(model={"path": str(tmp_path / "p")}, data={"source": "nowhere.jsonl"})
    findings = plan(cfg).findings
    warnings = problems(findings, "warning")
    assert "policy: no tokenizer" in warnings and "nowhere.jsonl" in warnings
    assert not problems(findings)


def test_a_missing_folder_is_named_with_its_role(calibrate, distill, tmp_path, capsys):
    for cfg, role in (
        (calibrate(proxy={"path": "no/where"}), "proxy"),
        (distill(teacher={"path": "no/where"}), "teacher"),
        (distill(model={"path": "no/where"}), "student"),
    ):
        errors = problems(plan(cfg).findings)
        assert f"{role}: " in errors and "no/where" in errors
        findings = examine(cfg).findings
        assert f"{role}: " in problems(findings) and "not loaded" in problems(findings, "warning")
    assert dry_run(cfg) == 1 and check(cfg) == 1


@pytest.mark.parametrize(
    "over, words",
    [
        (
            {"model": {"backend": "hf"}, "training": {"seq_len": 512}},
            "seq_len = 512; the model has 256 positions",
        ),
        ({"training": {"seq_len": 512}}, "seq_len = 512; the model has 256 positions"),
        ({"training": {"sequence": 64}}, "training.sequence"),
        (
            {"parallelism": {"data_parallel_shard_degree": 4}},
            "rollout.prompts = 2 cannot be shared by 4",
        ),
        (
            {"model": {"backend": "hf"}, "parallelism": {"tensor_parallel_degree": 2}},
            "tensor_parallel_degree = 2",
        ),
        ({"model": {"backend": "native"}, "proxy": {"backend": "native"}}, "proxy: "),
    ],
)
def test_a_plan_that_cannot_run_is_an_error(calibrate, over, words):
    assert words in problems(plan(calibrate(**over)).findings)


def test_a_dry_run_with_adapters_plans_them_and_names_the_gpus(calibrate, capsys):
    assert dry_run(calibrate(lora={"rank": 4})) == 0
    text = capsys.readouterr().out
    for word in ("adapters, float32", "adapters off", "A100 40 GB", "B200", "fits", "fewest"):
        assert word in text, word
    wrong = calibrate(lora={"rank": 4, "targets": ["c_attn"]})
    assert "lora.targets holds 'c_attn'" in problems(plan(wrong).findings)


def test_what_is_right_is_no_warning_and_rows_fit_the_model(calibrate):
    """Without a training.seq_len: torchtitan's 2048, or the positions that the model has."""
    cfg = replace(
        calibrate(), titan={k: v for k, v in calibrate().titan.items() if k != "training"}
    )
    findings = plan(cfg).findings
    assert not problems(findings) and "rows of shape" not in problems(findings, "warning")
    assert planned_titan(cfg, planned_shapes(cfg)[0][0]).training.seq_len == 256
