"""Pre-flight: broken set-ups are named before they cost anything, sound ones pass, and nothing is
written.
"""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from assets import free_port
from runs import config

from reflux.trainer.config.loader import fill, load
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.engine.forward import hidden_states
from reflux.trainer.preflight import commands as preflight
from reflux.trainer.preflight.checks import Finding, render, roles
from reflux.trainer.preflight.memory import (
    Ranks,
    activation_bytes,
    build_shape,
    memory_parts,
    plan_ranks,
    shard_numel,
    totals,
)

PAPER = sorted((Path(__file__).parents[3] / "configs" / "paper").glob("*.toml"))
MARKER = {"name": "exact", "options": {"marker": "=>"}}


@pytest.fixture
def calibrate(talkers, tmp_path):
    return lambda **over: config(
        talkers,
        tmp_path / "run",
        "calibrate",
        **{"task": MARKER, "calibration": {"mode": "distillable", "max_unaligned": 0.05}} | over,
    )


@pytest.fixture
def distill(talkers, tmp_path):
    return lambda **over: config(talkers, tmp_path / "run", "distill", **{"task": MARKER} | over)


def examine(cfg: Config) -> list[Finding]:
    os.environ["MASTER_PORT"] = str(free_port())
    return preflight.examine(cfg)[1]


def problems(findings: list[Finding], level: str = "error") -> str:
    return "\n".join(f"{f.what} | {f.advice}" for f in findings if f.level == level)


def files(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def only_descriptions(source: Path, out: Path) -> Path:
    """config.json and tokenizer without the weights."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


def changed_tokenizer(source: Path, out: Path, change) -> Path:
    """The same model behind a tokenizer whose table `change` has edited."""
    shutil.copytree(source, out)
    table = json.loads((out / "tokenizer.json").read_text())
    change(table)
    (out / "tokenizer.json").write_text(json.dumps(table))
    return out


def swallow_space(table: dict) -> None:
    """ "!" becomes an added token that eats the space in front of it: the ids no longer spell the
    text.
    """
    vocab = table["model"]["vocab"]
    place = (
        vocab["!"]
        if isinstance(vocab, dict)
        else next(i for i, (piece, _) in enumerate(vocab) if piece == "!")
    )
    table["added_tokens"].append(
        {
            "id": place,
            "content": "!",
            "single_word": False,
            "lstrip": True,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )


# --dry-run


def test_memory_of_a_rank_is_what_a_pencil_says(calibrate):
    cfg = calibrate(parallelism={"data_parallel_shard_degree": 4}, rollout={"prompts": 4})
    shapes, findings = preflight._shapes(cfg)
    ranks = plan_ranks(
        SimpleNamespace(
            data_parallel_replicate_degree=1, data_parallel_shard_degree=4, tensor_parallel_degree=1
        ),
        1,
    )
    training = SimpleNamespace(
        dtype="float32", mixed_precision_param="float32", enable_cpu_offload=False, seq_len=96
    )
    parts = {(p.role, p.what): p.bytes for p in memory_parts(cfg, training, ranks, shapes)}
    D, V, F, q, kv, c = 64, 512, 96, 128, 64, 32  # of tests/assets.py: qwen3_tied
    block = 2 * D + 2 * c + D * q + 2 * D * kv + q * D + 3 * D * F
    policy = V * D + 2 * block + D
    assert (policy, shapes[0].block, shapes[0].ends, findings) == (119232, block, V * D, [])
    assert parts["policy", "master weights, float32"] == policy  # 4 bytes, 4 ranks
    assert parts["policy", "AdamW moments"] == 2 * policy
    assert parts["policy", "gradients"] == policy
    assert parts["reference", "weights, float32"] == policy
    assert parts["policy", "gathered copy"] == 4 * policy
    assert parts["policy", "KV cache, 4 rows"] == 4 * 96 * (2 * 2 * kv) * 4
    assert parts["policy", "head gradient of the fused loss, fp32"] == 4 * V * D
    sums = totals(memory_parts(cfg, training, ranks, shapes))
    always = sum(parts[k] for k in parts if "weights" in k[1] or "moments" in k[1])
    assert sums["always"] == always and sums["host"] == 0
    assert sums["while sampling"] == always + sum(
        parts[k] for k in parts if k[1].startswith(("gathered", "KV", "sampler"))
    )


def test_a_shard_holds_whole_rows():
    assert shard_numel([(5, 2), (7,)], Ranks(shard=3, replicate=2, tensor=1, world=6)) == 2 * 2 + 3
    assert shard_numel([(10, 2), (7,)], Ranks(shard=2, replicate=1, tensor=2, world=4)) == 3 * 2 + 4


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activation_estimate_is_above_what_autograd_keeps_and_not_far(
    assets, tmp_path, name, dtype
):
    cfg = fill(
        Config,
        {
            "phase": "evaluate",
            "folder": "x",
            "model": {"path": str(assets / name)},
            "batch": {"tokens": 256},
            "eval": {"source": "x"},
            "task": {"name": "exact"},
        },
        "test",
    )
    shape = build_shape(roles(cfg)[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = shape.spec.model.build()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # tensors stay referenced, so that no address is used twice

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden_states(
            model, torch.randint(3, 300, (2, 128)), torch.arange(128).expand(2, 128)
        )
    measured = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)
    none, full = activation_bytes(
        cfg, SimpleNamespace(seq_len=128, mixed_precision_param=dtype), shape
    )
    assert measured <= none <= 2.5 * measured and full < none


def test_a_dry_run_reads_no_weights_and_starts_nothing(calibrate, talkers, tmp_path, capsys):
    over = {
        "model": {"path": str(only_descriptions(talkers / "policy", tmp_path / "p"))},
        "proxy": {"path": str(only_descriptions(talkers / "proxy", tmp_path / "c"))},
    }
    cfg = calibrate(**over)
    before = files(tmp_path)
    assert preflight.dry_run(cfg) == 0 and files(tmp_path) == before
    assert not torch.distributed.is_initialized()
    text = capsys.readouterr().out
    for word in (
        "policy (trained)",
        "anchor (frozen)",
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
    findings = preflight.plan(
        calibrate(model={"path": str(tmp_path / "p")}, data={"source": "nowhere.jsonl"})
    )[1]
    said = problems(findings, "warning")
    assert "policy: no tokenizer" in said and "nowhere.jsonl" in said and not problems(findings)


def test_a_missing_folder_is_named_with_its_role(calibrate, distill, tmp_path, capsys):
    for cfg, role in (
        (calibrate(proxy={"path": "no/where"}), "proxy"),
        (distill(teacher={"path": "no/where"}), "teacher"),
        (distill(model={"path": "no/where"}), "student"),
    ):
        assert f"{role}: " in problems(preflight.plan(cfg)[1]) and "no/where" in problems(
            preflight.plan(cfg)[1]
        )
        findings = examine(cfg)
        assert f"{role}: " in problems(findings) and "not loaded" in problems(findings, "warning")
    assert preflight.dry_run(cfg) == 1 and preflight.check(cfg) == 1


@pytest.mark.parametrize(
    "over, words",
    [
        (
            {"model": {"backend": "hf"}, "training": {"seq_len": 512}},
            "seq_len = 512; the model has 256 positions",
        ),
        ({"training": {"seq_len": 512}}, "sequence length 512 exceeds"),
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
def test_a_plan_that_cannot_run_is_refused(calibrate, over, words):
    assert words in problems(preflight.plan(calibrate(**over))[1])


def test_one_process_stands_for_the_world_asked_for_and_more_have_to_fit():
    p = SimpleNamespace(
        data_parallel_replicate_degree=2, data_parallel_shard_degree=-1, tensor_parallel_degree=2
    )
    assert plan_ranks(p, 16) == Ranks(4, 2, 2, 16) and plan_ranks(p, 16).data == 8
    p.data_parallel_shard_degree = 8
    assert plan_ranks(p, 1).world == 32
    with pytest.raises(ValueError, match="WORLD_SIZE is 16"):
        plan_ranks(p, 16)


# --check


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
    assert preflight.check(cfg) == 0
    after = files(tmp_path)
    assert after.keys() == before.keys()  # the scratch folder's time stamp may move
    text = capsys.readouterr().out
    for line in (
        "policy and proxy: different tokenizers (128 ids differ)",
        "accepts 24 of the data's own 24 responses",
        "shared spans",
        "KL(policy || original) at the start is",
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


@pytest.mark.usefixtures("titan_process")
def test_a_student_that_is_its_teacher_learns_nothing(distill, talkers):
    assert "same model" in problems(
        examine(distill(teacher={"path": str(talkers / "policy")})), "warning"
    )


def test_another_vocabulary_is_refused_for_token_kl_and_welcome_for_spans(distill, talkers):
    other = {"path": str(talkers / "proxy")}
    said = problems(examine(distill(teacher=other)))
    assert "student and teacher: different tokenizers (128 ids differ)" in said and "'span'" in said


@pytest.mark.usefixtures("titan_process")
def test_another_vocabulary_is_welcome_for_a_diagnosis(talkers, tmp_path):
    cfg = config(
        talkers,
        tmp_path / "run",
        "diagnose",
        teacher={"path": str(talkers / "proxy")},
        task={"name": "runs:is_even"},
    )
    findings = examine(cfg)
    assert not problems(findings), problems(findings)
    assert any(
        "student and teacher: different tokenizers" in f.what and f.level == "ok" for f in findings
    )


@pytest.mark.usefixtures("titan_process")
def test_spans_align_across_tokenizers(distill, talkers):
    findings = examine(
        distill(teacher={"path": str(talkers / "proxy")}, distill={"objective": "span"})
    )
    assert not problems(findings) and any(
        "shared spans" in f.what and "coverage 100%" in f.what for f in findings
    )


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
    assert "50.0% of the first 8 texts do not round-trip" in problems(
        findings
    ) and "SUM" in problems(findings)
    lowers = changed_tokenizer(
        talkers / "proxy",
        tmp_path / "lower",
        lambda table: table.update(normalizer={"type": "Lowercase"}),
    )
    assert "round-trip" not in problems(examine(calibrate(proxy={"path": str(lowers)}, **over))), (
        "a normaliser is no loss"
    )


def test_a_prompt_that_does_not_fit_is_an_error_with_the_length_to_set(calibrate):
    said = problems(examine(calibrate(rollout={"max_tokens": 60})))
    cfg = calibrate(rollout={"max_tokens": 60})
    chat = Chat(cfg.model.path)
    longest = max(len(chat.prompt_ids(p.messages)) for p in load_prompts(cfg.data.source))
    assert "prompts are too long" in said and f"training.seq_len >= {longest + 59}" in said
    fits = examine_lengths(
        calibrate(rollout={"max_tokens": 60}, training={"seq_len": longest + 59})
    )
    assert not problems(fits)


def examine_lengths(cfg: Config) -> list[Finding]:
    return [f for f in preflight.plan(cfg)[1] if "longest" in f.what]


@pytest.mark.parametrize(
    "task, words",
    [
        (
            {"name": "exact", "options": {"marker": "##"}},
            "accepts 0 of the data's own 24 responses; prompt 0:",
        ),
        (
            {"name": "runs:raise_sometimes"},
            "the grader failed on the data's own response: ZeroDivisionError",
        ),
        ({"name": "exakt"}, "unknown task 'exakt'"),
    ],
)
def test_a_grader_at_odds_with_the_data_is_an_error(calibrate, task, words):
    assert words in problems(examine(calibrate(task={"options": {}} | task)))


@pytest.mark.usefixtures("titan_process")
def test_a_proxy_that_knows_nothing_is_a_warning(calibrate, assets):
    assert "sign of the effect" in problems(
        examine(calibrate(proxy={"path": str(assets / "gemma3")})), "warning"
    )


@pytest.mark.usefixtures("titan_process")
def test_a_policy_that_is_not_its_original_is_an_error(calibrate):
    assert "KL(policy || original) at the start" in problems(
        examine(calibrate(model={"from_scratch": True}))
    )


@pytest.mark.usefixtures("titan_process")
def test_a_sampler_that_disagrees_with_the_trainer_is_an_error(calibrate, monkeypatch):
    true = preflight.generate

    def shifted(*args):
        return [
            [replace(x, logp=tuple(v - 0.01 for v in x.logp)) for x in group]
            for group in true(*args)
        ]

    monkeypatch.setattr(preflight, "generate", shifted)
    assert "differ by 0.01 in the mean" in problems(examine(calibrate()))


@pytest.mark.usefixtures("titan_process")
def test_weights_that_are_not_there_are_an_error(calibrate, talkers, tmp_path):
    empty = only_descriptions(talkers / "proxy", tmp_path / "empty")
    assert "no *.safetensors" in problems(examine(calibrate(proxy={"path": str(empty)})))
    assert not torch.distributed.is_initialized()


def test_an_example_marks_every_token_with_loss(talkers):
    chat = Chat(str(talkers / "policy"))
    prompt = load_prompts(str(talkers / "data.jsonl"))[0]
    shown = render(chat, prompt, "é 1", colour=False).plain
    before, after = shown.split("assistant: ")
    assert "What is 0+0?" in before and "[" not in before
    assert after == "[\\xc3][\\xa9][ 1]«<|eos|>»"
    assert render(chat, prompt, "12", colour=True).plain.endswith("12<|eos|>")


# Configurations at scale


@pytest.mark.parametrize("mode", ["distillable", "undistillable", "off"])
@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_paper_configs_load_and_say_that_nobody_ran_them(path, mode):
    cfg = load(path, (f"calibration.mode={mode}",))
    assert path.read_text().startswith("# NOT RUN.") and cfg.calibration.mode == mode
    assert cfg.rollout.prompts % cfg.titan["parallelism"]["data_parallel_shard_degree"] == 0


def test_there_are_paper_configs():
    assert len(PAPER) == 6
