"""axolotl's own `train`, from a YAML file to a saved model, with the plugin in it.

`make test-integrations` brings axolotl.
"""

import json
import os

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

needs_axolotl = pytest.mark.skipif(
    os.environ.get("REFLUX_INTEGRATIONS") != "axolotl",
    reason="make test-integrations installs axolotl",
)
pytestmark = needs_axolotl
PLUGIN = "reflux.trainer.integrations.axolotl_plugin.RefluxPlugin"


@pytest.fixture(scope="module")
def teacher(assets, tmp_path_factory):
    """Another model of the student's shape and tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets / "qwen3"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets / "qwen3").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(assets, teacher, tmp_path, monkeypatch):
    """A configuration of axolotl, as its YAML file holds it; 4 texts of different lengths."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(PluginManager, "_instance", None)  # it keeps plugins of other tests
    turns = [
        [("user", f"How many are {i}?"), ("assistant", " many apples remain" * i)]
        for i in (1, 2, 3, 7)  # no two and two have equally many tokens, in whatever order
    ]
    rows = [{"messages": [dict(role=r, content=c) for r, c in text]} for text in turns]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(
        base_model=str(assets / "qwen3"),
        plugins=[PLUGIN],
        reflux_teacher=teacher,
        reflux_loss=dict(divergence="forward"),
        datasets=[dict(path=str(data), ds_type="json", type="chat_template")],
        dataset_prepared_path=str(tmp_path / "prepared"),
        output_dir=str(tmp_path / "out"),
        sequence_len=512,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.01,
        optimizer="adamw_torch",
        lr_scheduler="constant",
        bf16=False,
        attn_implementation="sdpa",
        logging_steps=1,
        save_strategy="no",
        val_set_size=0,
        use_tensorboard=False,
        dataset_processes=1,
        dataloader_num_workers=0,
    )


def loaded(config, tmp_path, **changes):
    from axolotl.cli.config import load_cfg

    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config | changes))
    return load_cfg(str(path))


def trained(config, tmp_path, **changes):
    """(trainer, the rows that it read)"""
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    cfg = loaded(config, tmp_path, **changes)
    meta = load_datasets(cfg=cfg)
    _, _, trainer = train(cfg=cfg, dataset_meta=meta)
    return trainer, list(meta.train_dataset)


def losses(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


@torch.no_grad()
def forward_kl(rows, student, teacher) -> float:
    """Mean over all labelled tokens of all rows, by the models' own logits in float64."""
    models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (teacher, student)]
    parts = []
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        logq, logp = (m(ids).logits[0, :-1].double().log_softmax(1) for m in models)
        parts.append((logq.exp() * (logq - logp)).sum(1)[labels[0, 1:] != -100])
    return float(torch.cat(parts).mean())


def test_the_first_loss_is_the_mean_over_all_tokens_of_a_step(config, teacher, tmp_path):
    """Of micro batches of different token numbers: a mean of their means would differ."""
    trainer, rows = trained(config, tmp_path)
    want = forward_kl(rows, config["base_model"], teacher)
    assert losses(trainer) == pytest.approx([want], rel=1e-5) and want > 0.5
    halves = [forward_kl(rows[i : i + 2], config["base_model"], teacher) for i in (0, 2)]
    assert abs(sum(halves) / 2 - want) > 1e-3


def test_steps_lower_it_and_leave_the_teacher_alone(config, teacher, tmp_path):
    loss = dict(divergence="jsd", beta=0.5, temperature=2.0)
    trainer, rows = trained(config, tmp_path, max_steps=8, reflux_loss=loss)
    got = losses(trainer)
    assert len(got) == 8 and got[-1] < 0.6 * got[0], got
    weights = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    for name, weight in trainer.teacher.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    start = forward_kl(rows, config["base_model"], teacher)
    assert forward_kl(rows, config["output_dir"], teacher) < start


def test_packed_texts_give_the_loss_of_texts_apart(config, teacher, tmp_path):
    packing = dict(sample_packing=True, micro_batch_size=1, gradient_accumulation_steps=1)
    trainer, rows = trained(config, tmp_path, **packing)
    want = forward_kl(rows, config["base_model"], teacher)
    assert losses(trainer) == pytest.approx([want], rel=1e-4)


def test_adapters_learn_and_evaluation_has_the_loss(config, teacher, tmp_path):
    adapters = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)
    data = dict(val_set_size=0.25, eval_strategy="steps", eval_steps=4, eval_sample_packing=False)
    trainer, _ = trained(config, tmp_path, max_steps=4, **adapters, **data)
    got = losses(trainer)
    assert got[-1] < got[0]
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    before, after = losses(trainer, "eval_loss")
    assert after < 0.95 * before


def test_without_a_teacher_the_plugin_does_nothing(config, tmp_path):
    from axolotl.core.trainers.base import AxolotlTrainer

    trainer, _ = trained(config, tmp_path, reflux_teacher=None)
    assert type(trainer) is AxolotlTrainer


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(reflux_loss=dict(divergance="jsd")), "no option 'divergance'; want of"),
        (dict(rl="dpo"), "reflux_teacher and rl: each has a loss of its own"),
        (dict(kd_trainer=True), "reflux_teacher and kd_trainer"),
        (dict(lora_qkv_kernel=True), "Set lora_qkv_kernel: false"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loaded(config, tmp_path, **changes)


def test_a_trainer_that_got_no_teacher_says_so():
    from reflux.trainer.integrations.axolotl_trainer import AxolotlDistillTrainer

    with pytest.raises(ValueError, match="no teacher: want RefluxPlugin.post_trainer_create"):
        object.__new__(AxolotlDistillTrainer).compute_loss(None, {})
