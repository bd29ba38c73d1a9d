"""transformers' Trainer with our loss: the value of its definition, and steps that lower it."""

import pytest
import torch

pytest.importorskip("accelerate")
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from reflux.trainer.integrations.transformers_trainer import DistillTrainer

SMALL = dict(vocab_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def make(tmp_path, steps=2, models=None, **loss):
    torch.manual_seed(0)
    student, teacher = models or (
        LlamaForCausalLM(LlamaConfig(hidden_size=n, **SMALL)) for n in (16, 32)
    )
    labels = torch.randint(64, (8, 8))
    data = [
        {"input_ids": ids, "labels": ids.clone().index_fill_(0, torch.arange(3), -100)}
        for ids in labels
    ]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        disable_tqdm=True,
    )
    options = dict(train_dataset=data, teacher=teacher, loss=loss)
    return DistillTrainer(student, arguments, **options), data


def test_the_loss_is_its_definition(tmp_path):
    trainer, data = make(tmp_path, divergence="forward", temperature=2.0)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        logits, teacher = (m(batch["input_ids"]).logits for m in (trainer.model, trainer.teacher))
        logp, logq = ((x[:, :-1] / 2).log_softmax(-1) for x in (logits, teacher))
        kl_BT = (logq.exp() * (logq - logp)).sum(-1)
        scored_BT = batch["labels"][:, 1:] != -100
        got = trainer.compute_loss(trainer.model, dict(batch))
        halved = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=80)
    want = kl_BT[scored_BT].sum()
    torch.testing.assert_close(got, want / scored_BT.sum())
    torch.testing.assert_close(halved, want / 80)


def test_caps_and_scales_of_logits_are_those_of_the_models(tmp_path):
    """Gemma 2 caps its logits, Cohere scales them: both change the KL."""
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    capped = Gemma2Config(hidden_size=16, **SMALL, **more, final_logit_softcapping=0.05)
    scaled = CohereConfig(hidden_size=16, **SMALL, pad_token_id=0, logit_scale=4.0)
    models = Gemma2ForCausalLM(capped), CohereForCausalLM(scaled)
    trainer, data = make(tmp_path, models=models, divergence="forward")
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        logp, logq = (m.eval()(batch["input_ids"]).logits.log_softmax(-1) for m in models)
        got = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=1)
    kl_BT = (logq.exp() * (logq - logp))[:, :-1].sum(-1)
    torch.testing.assert_close(got, kl_BT[batch["labels"][:, 1:] != -100].sum())


def test_packed_texts_do_not_see_each_other(tmp_path):
    """transformers finds them by their positions, and only where nobody asks for a cache."""
    trainer, data = make(tmp_path)
    trainer.model.eval()
    apart = torch.stack([row["input_ids"] for row in data[:2]])
    labels = torch.stack([row["labels"] for row in data[:2]])
    together = {"input_ids": apart.view(1, -1), "labels": labels.view(1, -1)}
    together["position_ids"] = torch.arange(8).repeat(2)[None]
    with torch.no_grad():
        want = trainer.compute_loss(trainer.model, {"input_ids": apart, "labels": labels})
        got = trainer.compute_loss(trainer.model, together)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_logits_that_are_made_in_another_way_are_refused(tmp_path):
    trainer, data = make(tmp_path)
    trainer.teacher.lm_head.register_forward_hook(lambda module, inputs, out: 2 * out)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with pytest.raises(ValueError, match="teacher's logits are not those of its last hidden"):
        trainer.compute_loss(trainer.model, dict(batch))


@pytest.mark.parametrize("across, divided_by", [(True, 20), (False, 80)])
def test_the_count_is_of_the_processes_that_trainer_counts(tmp_path, across, divided_by):
    trainer, data = make(tmp_path)
    trainer.args.average_tokens_across_devices = across
    scored_T = torch.ones(5, dtype=torch.bool)
    trainer.accelerator.state.num_processes = 4
    try:
        assert trainer._count(scored_T, 80) == divided_by and trainer._count(scored_T, None) == 5
    finally:
        trainer.accelerator.state.num_processes = 1


def test_steps_lower_it_and_leave_the_teacher_alone(tmp_path):
    trainer, _ = make(tmp_path, steps=12)
    before = [w.clone() for w in trainer.teacher.parameters()]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.teacher.parameters()))
