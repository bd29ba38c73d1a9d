"""Rows of a served teacher, without a server (with one: tests/engines/test_served_teacher.py).

Shapes: V vocabulary.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config

from reflux.kernels.teacher_topk import TopK
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation import served_teacher
from reflux.trainer.distillation.served_teacher import rows_of
from reflux.trainer.distillation.teachers import load_teachers
from reflux.trainer.losses import HeadInputs, topk_kl
from reflux.trainer.rollouts.engine_texts import ScoredText


def scored(logp, ids=None):
    logp = np.asarray(logp, np.float32)
    ids = np.arange(logp.size).reshape(logp.shape) if ids is None else ids
    return ScoredText(logp[:, 0], ids, logp, ("folder",))


@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_the_tail_is_the_mass_of_all_other_ids(seed, k):
    rng = np.random.default_rng(seed)
    logits_V = rng.normal(scale=3.0, size=9)
    logp_V = np.sort(logits_V - np.logaddexp.reduce(logits_V))[::-1]
    rows = rows_of(scored(logp_V[None, :k]))
    want = np.logaddexp.reduce(logp_V[k:])
    assert rows.logp.shape == (1, k) and rows.tail.shape == (1,)
    # what fp32 log-probabilities leave of a small tail
    assert np.exp(rows.tail[0]) == pytest.approx(np.exp(want), abs=1e-6)


def test_a_tail_of_nothing_has_no_mass():
    rows = rows_of(scored(np.log([[0.75, 0.25], [1.0, 1e-30]])))
    assert np.exp(rows.tail) == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("gap, error", [(8.0, 1e-2), (12.0, 2e-2), (20.0, 5.0), (40.0, 30.0)])
def test_a_peaked_position_has_the_loss_of_its_exact_tail(gap, divergence, error):
    """As vLLM answers: rounded to float32, the top-k of gap 20 on sums to 1 and more. Its tail of
    2^-23 is a bound of reverse KL, whose loss is below the exact one by the rest at most.
    """
    V, K, D = 50, 4, 8
    logits_1V = torch.zeros(1, V).index_fill(1, torch.tensor([3]), gap)
    top = logits_1V.log_softmax(-1).topk(K, -1)
    exact = logits_1V.double().log_softmax(-1).scatter(1, top.indices, -torch.inf).logsumexp(1)
    rows = rows_of(scored(top.values, top.indices.numpy()))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, D, generator=g, requires_grad=True)
    out = HeadInputs(hidden, torch.randn(V, D, generator=g), None, V)
    spec = DistillSection(objective="kl", divergence=divergence, tail="bucket", top_k=K)
    losses = [
        topk_kl(out, TopK(top.indices, top.values, torch.as_tensor(tail).float()), spec)[0]
        for tail in (rows.tail, exact)
    ]
    (gradient,) = torch.autograd.grad(losses[0], hidden)
    assert gradient.isfinite().all() and losses[0].isfinite()
    slack = 1e-5 if divergence != "reverse" else error
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=slack)
    if gap >= 20:
        assert losses[0] <= losses[1] + 1e-5


@pytest.mark.parametrize(
    "logp",
    [[[-0.1, np.nan]], [[-0.1, -0.2]], [[-3.0, -1.0]], [[-0.5, -np.inf]]],
    ids=["nan", "more than 1", "not in order", "-inf"],
)
def test_what_is_no_distribution_is_refused(logp):
    with pytest.raises(ValueError, match="not finite, not in order, or sum to"):
        rows_of(scored(logp))


def test_it_renders_prompts_as_the_configuration_says(talkers, tmp_path, monkeypatch):
    """teacher.template and its arguments are read for a served teacher, too."""
    facts = {"version": "folder", "max_logprobs": 64, "max_len": 4096}
    monkeypatch.setattr(served_teacher, "check_servers", lambda *_, **__: facts)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}{{ mark }}")
    own = {"template": str(template), "template_arguments": {"mark": "!"}}
    served = {"source": "server", "servers": ["http://localhost:1"], **own}
    distill = {"tail": "bucket", "top_k": 4, "divergence": "forward"}
    cfg = config(talkers, tmp_path / "run", "distill", teacher=served, distill=distill)
    (teacher,) = load_teachers(cfg, SimpleNamespace(seq_len=96), Chat.of(cfg.model))
    rendered = teacher.chat.prompt_ids([{"role": "user", "content": "Why?"}])
    assert teacher.chat.decode(rendered) == "Why?!"
