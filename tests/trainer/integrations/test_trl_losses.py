"""What stands in TRL's place computes what TRL computes. `make test-integrations` brings TRL."""

import importlib
import os

import pytest
import torch

from reflux.trainer.integrations import trl_losses

BETAS = (0, 0.3, 0.5, 1)
needs_trl = pytest.mark.skipif(
    os.environ.get("REFLUX_INTEGRATIONS") != "trl", reason="make test-integrations installs TRL"
)


def logits(seed):
    return torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(seed))


def sides(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 6, 8), (2, 6, 12), (40, 8), (40, 12)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def graded(fn, tensors, *args, **options):
    """The first result of fn and its gradients in the student's tensors."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    result = fn(*leaves, *args, **options)
    result = result[0] if isinstance(result, tuple) else result
    grads = torch.autograd.grad(result, leaves, allow_unused=True)
    return [result.detach(), *(g for g in grads if g is not None)]


def test_a_loss_of_logits_leaves_masked_tokens_out_and_divides_as_trl():
    z, u, labels = logits(1), logits(2), torch.tensor([[-100, 1, 2, 3, -100], [5, -100, 6, 7, 8]])
    logp, logq = z.log_softmax(-1), u.log_softmax(-1)
    kl = (logq.exp() * (logq - logp)).sum(-1)[labels != -100].sum()
    torch.testing.assert_close(trl_losses.generalized_jsd_loss(z, u, labels, beta=0), kl / 7)
    whole = trl_losses.generalized_jsd_loss(z, u, labels, beta=0, num_items_in_batch=14)
    torch.testing.assert_close(whole, kl / 14)
    summed = trl_losses.generalized_jsd_loss(z, u, labels, beta=0, reduction="sum")
    torch.testing.assert_close(summed, kl)
    nothing = trl_losses.generalized_jsd_loss(z, u, torch.full((2, 5), -100))
    assert nothing == 0
    with pytest.raises(ValueError, match="want 'batchmean' or 'sum'"):
        trl_losses.generalized_jsd_loss(z, u, reduction="none")


def test_a_loss_of_hidden_states_counts_its_tokens():
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    mean, entropy, count = trl_losses.divergence_loss(*sides(), mask, 0.5)
    total, _, _ = trl_losses.divergence_loss(*sides(), mask, 0.5, num_items_in_batch=1)
    assert count == 6
    hidden, _, head, *_ = sides()
    logp = (hidden[mask.bool()] @ head.t()).log_softmax(-1)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum())
    torch.testing.assert_close(total, 6 * mean)


@needs_trl
@pytest.mark.parametrize("beta", BETAS)
def test_the_distillation_trainers_loss_is_trls(beta):
    slot = importlib.import_module("trl.trainer.distillation_trainer")
    theirs = slot._chunked_divergence_loss
    assert theirs is not trl_losses.divergence_loss
    g = torch.Generator().manual_seed(5)
    options = dict(
        student_lm_head_bias=torch.randn(40, generator=g),
        teacher_lm_head_bias=torch.randn(40, generator=g),
        student_logit_scale=0.5,
        teacher_final_logit_softcapping=5.0,
        student_final_logit_softcapping=4.0,
        temperature=2.0,
    )
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    for more in ({}, options):
        want = graded(theirs, sides(), mask, beta, **more)
        got = graded(trl_losses.divergence_loss, sides(), mask, beta, **more)
        entropies = [
            f(*sides(), mask, beta, **more)[1] for f in (theirs, trl_losses.divergence_loss)
        ]
        torch.testing.assert_close(*entropies, rtol=1e-4, atol=1e-5)
        for a, b in zip(got, want, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_trl
@pytest.mark.parametrize("beta", BETAS)
def test_the_gkd_trainers_loss_is_trls(beta):
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    labels = torch.tensor([[-100, 1, 2, 3, -100], [5, -100, 6, 7, 8]])
    for more in ({}, dict(labels=labels), dict(labels=labels, num_items_in_batch=9)):
        args = dict(beta=beta, temperature=1.5, **more)
        want = gkd.generalized_jsd_loss(logits(1), logits(2), **args)
        got = trl_losses.generalized_jsd_loss(logits(1), logits(2), **args)
        torch.testing.assert_close(got, want)


@needs_trl
def test_they_take_the_place_and_a_place_that_is_not_there_is_named(monkeypatch):
    slot = importlib.import_module("trl.trainer.distillation_trainer")
    name, theirs = "_chunked_divergence_loss", slot._chunked_divergence_loss
    monkeypatch.setattr(slot, name, theirs)  # and back afterwards
    trl_losses.use_in_distillation_trainer()
    assert slot._chunked_divergence_loss is trl_losses.divergence_loss
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    monkeypatch.setattr(gkd, "generalized_jsd_loss", gkd.generalized_jsd_loss)
    trl_losses.use_in_gkd_trainer()
    assert gkd.generalized_jsd_loss is trl_losses.generalized_jsd_loss
    monkeypatch.delattr(slot, name)
    with pytest.raises(ValueError, match="want trl 1.16.0"):
        trl_losses.use_in_distillation_trainer()
