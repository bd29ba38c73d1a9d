"""The loss in torchtitan's place: its definition, and the interface that the Trainer uses."""

import pytest
import torch

from reflux.trainer.engine import compat

compat.install()
from torchtitan.components.loss import ChunkedLossWrapper  # noqa: E402

from reflux.trainer.integrations.torchtitan_loss import DistillHead, DistillLoss  # noqa: E402


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_the_logits(temperature):
    torch.manual_seed(0)
    loss_fn = DistillLoss.Config(divergence="forward", options={"temperature": temperature}).build()
    assert isinstance(loss_fn, ChunkedLossWrapper)  # whose subclasses are given the head
    head = DistillHead.Config(in_features=32, out_features=90).build()
    torch.nn.init.normal_(head.weight, std=0.3)
    loss_fn.set_lm_head(head)
    hidden, labels = torch.randn(2, 8, 32, requires_grad=True), torch.randint(90, (2, 8))
    labels[0, :3] = -100
    teacher_hidden, teacher_head = torch.randn(2, 8, 48), 0.2 * torch.randn(90, 48)
    teacher = dict(teacher_hidden=teacher_hidden, teacher_head=teacher_head)
    loss, metrics = loss_fn(hidden, labels, torch.tensor(26.0), positions=None, **teacher)
    logp, logq = (
        (x / temperature).log_softmax(-1) for x in (head(hidden), teacher_hidden @ teacher_head.t())
    )
    want = (logq.exp() * (logq - logp)).sum(-1)[labels != -100].sum() / 26
    torch.testing.assert_close(loss, want)
    leaves = hidden, head.weight
    got = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaves), atol=1e-6, rtol=1e-5)
    assert metrics == {} and not got[0][0, :3].any()
    alone, _ = loss_fn(hidden, labels, **teacher)
    torch.testing.assert_close(alone, 26 * loss)
