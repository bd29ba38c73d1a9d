"""What autograd, torch.func and torch.export may ask of every op: right, or refused in words."""

import pytest
import torch
from close import DEVICE

from reflux.kernels import _triton
from reflux.kernels._classes import class_map
from reflux.kernels.bucket_kl import bucket_kl
from reflux.kernels.class_logprob import class_logprob
from reflux.kernels.linear_dense_kl import linear_dense_kl
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.linear_logprob import linear_logprob
from reflux.kernels.linear_nll import linear_nll
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.renormalised_topk_kl import renormalised_topk_kl
from reflux.kernels.span_sum import span_sum
from reflux.kernels.token_kl import token_kl
from reflux.kernels.token_logprob import token_logprob
from reflux.kernels.topk_tail_kl import topk_tail_kl

T, V, D, K = 6, 24, 8, 4


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


HEAD_VD, TEACHER_TD, TEACHER_VD = randn(V, D, seed=1), randn(T, D, seed=2), randn(V, D, seed=3)
LOGP_TK, IDS_TK = (TEACHER_TD @ TEACHER_VD.T).log_softmax(-1).topk(K)
TAIL_T = torch.log1p(-LOGP_TK.exp().sum(1))
TARGET_T = torch.arange(T, device=DEVICE)
CLASSES = class_map(torch.arange(V, device=DEVICE) % 5, 5)
LOSSES = {  # of hidden states and a head
    "linear_kl": lambda x, w: linear_kl(x, w, TEACHER_TD, TEACHER_VD).total,
    "linear_dense_kl": lambda x, w: linear_dense_kl(x, w, TEACHER_TD @ TEACHER_VD.T).total,
    "linear_topk_kl": lambda x, w: linear_topk_kl(x, w, IDS_TK, LOGP_TK, TAIL_T).total,
    "renormalised_topk_kl": lambda x, w: renormalised_topk_kl(x, w, IDS_TK, LOGP_TK).total,
    "bucket_kl": lambda x, w: bucket_kl(x, w, CLASSES, TEACHER_TD, TEACHER_VD, CLASSES).total,
    "linear_nll": lambda x, w: linear_nll(x, w, TARGET_T).total,
    "linear_logprob": lambda x, w: linear_logprob(x, w, TARGET_T).logp.sum(),
    "entropy": lambda x, w: linear_logprob(x, w, TARGET_T, entropy=True).entropy.sum(),
    "frozen head": lambda x, w: linear_logprob(x, w, TARGET_T, frozen_head=True).logp.sum(),
    "class_logprob": lambda x, w: class_logprob(x, w, CLASSES)[:, 0].sum(),
    "token_kl": lambda x, w: token_kl(x @ w.T, TEACHER_TD @ TEACHER_VD.T).total,
    "topk_tail_kl": lambda x, w: topk_tail_kl(x @ w.T, IDS_TK, LOGP_TK, TAIL_T).total,
    "token_logprob": lambda x, w: token_logprob(x @ w.T, TARGET_T).logp.sum(),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
def test_a_gradient_penalty_is_refused_wherever_it_hides(name):
    """Alone, beside the loss, or asked for with allow_unused: never counted as constant."""
    x_TD = randn(T, D, seed=0).requires_grad_()
    for asked in ("penalty", "both", "unused"):
        loss = LOSSES[name](x_TD, HEAD_VD)
        (graph_TD,) = torch.autograd.grad(loss, x_TD, create_graph=True)
        total = (graph_TD**2).sum() + (loss if asked == "both" else 0.0)
        with pytest.raises(RuntimeError, match="no second derivative.*_ref"):
            torch.autograd.grad(total, x_TD, allow_unused=asked == "unused")


@each_loss
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian"])
def test_transforms_of_functions_are_refused_in_words(name, transform):
    x_TD = randn(T, D, seed=0)
    calls = {
        "grad": lambda f: torch.func.grad(f)(x_TD),
        "jvp": lambda f: torch.func.jvp(f, (x_TD,), (x_TD,)),
        "vmap": lambda f: torch.func.vmap(f)(x_TD[None]),
        "hessian": lambda f: torch.func.hessian(f)(x_TD),
    }
    with pytest.raises(ValueError, match="torch.autograd.grad"):
        calls[transform](lambda x: LOSSES[name](x, HEAD_VD))


def test_forward_mode_derivatives_are_refused_and_sums_too():
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        x_T = forward.make_dual(torch.ones(T), torch.ones(T))
        with pytest.raises(ValueError, match="span_sum: got a tensor of torch.func"):
            span_sum(x_T, torch.zeros(T, dtype=torch.long), 1)


EXPORTED = {
    "linear_kl": (lambda x, y: linear_kl(x, HEAD_VD, y, TEACHER_VD).total, TEACHER_TD),
    "jsd": (
        lambda x, y: linear_kl(x, HEAD_VD, y, TEACHER_VD, divergence="jsd", scale_t2=True).total,
        TEACHER_TD,
    ),
    "measures": (
        lambda x, y: linear_kl(x, HEAD_VD, y, TEACHER_VD, measures=True).measures.entropy,
        TEACHER_TD,
    ),
    "token_kl": (lambda z, u: token_kl(z @ HEAD_VD.T, u @ TEACHER_VD.T).total, TEACHER_TD),
    "linear_nll": (lambda x, y: linear_nll(x, HEAD_VD, y).total, TARGET_T),
    "linear_logprob": (lambda x, y: linear_logprob(x, HEAD_VD, y).logp, TARGET_T),
    "linear_dense_kl": (
        lambda x, y: linear_dense_kl(x, HEAD_VD, y @ TEACHER_VD.T).total,
        TEACHER_TD,
    ),
    "linear_topk_kl": (
        lambda x, q: (
            linear_topk_kl(x, HEAD_VD, q.long() % V, -q, tail="drop", allow_drop=True).total
        ),
        torch.arange(1.0, 2 * T + 1, device=DEVICE).view(T, 2),
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_takes_any_number_of_tokens(name):
    fn, other = EXPORTED[name]

    class Module(torch.nn.Module):
        def forward(self, x, y):
            return fn(x, y)

    x_TD, tokens = randn(T, D, seed=0), torch.export.Dim("T")
    shapes = {"x": {0: tokens}, "y": {0: tokens}}
    program = torch.export.export(Module(), (x_TD, other), dynamic_shapes=shapes).module()
    for rows in (T, 3, 5):
        torch.testing.assert_close(
            program(x_TD[:rows], other[:rows]), fn(x_TD[:rows], other[:rows])
        )


def test_twelve_lengths_and_three_settings_make_three_graphs():
    """A temperature with its beta costs a graph: floats are constants of an op. Lengths do not."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    def loss(x, y, temperature, beta):
        options = dict(divergence="jsd", temperature=temperature, beta=beta)
        return linear_kl(x, HEAD_VD, y, TEACHER_VD, **options).total

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for i in range(12):
        x_TD, y_TD = randn(4 + 3 * i, D, seed=i), randn(4 + 3 * i, D, seed=50 + i)
        options = (1.0, 1.5, 2.0)[i % 3], (0.25, 0.5, 0.75)[i % 3]
        torch.testing.assert_close(compiled(x_TD, y_TD, *options), loss(x_TD, y_TD, *options))
    torch._dynamo.reset()
    assert len(graphs) <= 3


@pytest.mark.parametrize("rows, what", [([-1, 2], "rows -1 to 2"), ([1, 1], "1 of them twice")])
def test_wrong_rows_are_refused_without_a_debug_flag_on_a_cpu(rows, what):
    assert not _triton.DEBUG
    x_TD = randn(T, D, seed=0).cpu()
    with pytest.raises(ValueError, match=what):
        linear_nll(x_TD, HEAD_VD.cpu(), TARGET_T.cpu(), rows=torch.tensor(rows))


@pytest.mark.parametrize("parts", [2, 3])
def test_hidden_states_in_parts_of_a_sequence_add_up(parts):
    """Context parallel: every rank has some rows; sums over ranks of total and dhead are all."""
    x_TD, head_VD = randn(T, D, seed=0).requires_grad_(), HEAD_VD.clone().requires_grad_()
    whole = linear_kl(x_TD, head_VD, TEACHER_TD, TEACHER_VD, divergence="reverse")
    want = torch.autograd.grad(whole.total, (x_TD, head_VD))
    total, dhead_VD, dx = 0.0, torch.zeros_like(head_VD), []
    for c in torch.arange(T).chunk(parts):
        part_TD = x_TD.detach()[c].requires_grad_()
        side = TEACHER_TD[c], TEACHER_VD
        part = linear_kl(part_TD, head_VD, *side, divergence="reverse")
        grads = torch.autograd.grad(part.total, (part_TD, head_VD))
        total, dhead_VD, dx = total + part.total, dhead_VD + grads[1], [*dx, grads[0]]
        torch.testing.assert_close(part.kl, whole.kl[c], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(torch.cat(dx), want[0])
    torch.testing.assert_close(dhead_VD, want[1])
