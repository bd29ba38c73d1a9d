"""What every fused loss promises, whatever it computes: rows left out are left out, no gradient is
silently wrong, small weights survive fp16, one graph serves every number of tokens.
"""

import os

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from close import DEVICE
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from reflux.kernels._classes import class_map
from reflux.kernels.bucket_kl import bucket_kl
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.linear_logprob import linear_logprob
from reflux.kernels.linear_nll import linear_nll
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.renormalised_topk_kl import renormalised_topk_kl
from reflux.kernels.token_kl import token_kl

T, V, D, E, K = 5, 30, 8, 6, 4
CLASSES = torch.arange(V, device=DEVICE) % 7


def teacher(dtype, rows=T):
    generator = torch.Generator().manual_seed(1)
    hidden_TE = torch.randn(rows, E, generator=generator).to(DEVICE, dtype)
    return hidden_TE, torch.randn(V, E, generator=generator).to(DEVICE, dtype)


def topk(dtype, rows=T):
    hidden_TE, head_VE = teacher(dtype, rows)
    logp_TV = (hidden_TE.float() @ head_VE.float().T).log_softmax(-1)
    logp_TK, ids_TK = logp_TV.topk(K)
    return ids_TK, logp_TK, torch.log1p(-logp_TK.exp().sum(1))


def kl(hidden_TD, head_VD, **options):
    return linear_kl(hidden_TD, head_VD, *teacher(head_VD.dtype, len(hidden_TD)), **options).total


def kl_of_topk(hidden_TD, head_VD, **options):
    rows = topk(head_VD.dtype, len(hidden_TD))
    return linear_topk_kl(hidden_TD, head_VD, *rows, **options).total


def renormalised(hidden_TD, head_VD, **options):
    rows = topk(head_VD.dtype, len(hidden_TD))[:2]
    return renormalised_topk_kl(hidden_TD, head_VD, *rows, **options).total


def buckets(hidden_TD, head_VD, **options):
    classes, side = class_map(CLASSES, 7), teacher(head_VD.dtype, len(hidden_TD))
    return bucket_kl(hidden_TD, head_VD, classes, *side, classes, **options).total


def likelihood(hidden_TD, head_VD, **options):
    target_T = torch.arange(len(hidden_TD), device=DEVICE) % V
    return linear_nll(hidden_TD, head_VD, target_T, **options).total


LOSSES = [kl, kl_of_topk, renormalised, buckets, likelihood]
each_loss = pytest.mark.parametrize("loss", LOSSES)


def student(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden_TD, head_VD = (
        torch.randn(T, D, device=DEVICE).to(dtype),
        (torch.randn(V, D, device=DEVICE) * D**-0.5).to(dtype),
    )
    return hidden_TD, head_VD.requires_grad_()


@each_loss
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_row_of_weight_0_reaches_nothing(loss, junk):
    hidden_TD, head_VD = student()
    weight = torch.tensor([1.0, 2.0, 0.0, -0.5, 1.0], device=DEVICE)
    got = []
    for row in (0.0, junk):
        x_TD = hidden_TD.clone()
        x_TD[2] = row
        x_TD.requires_grad_()
        total = loss(x_TD, head_VD, weight=weight)
        got.append([total.detach(), *torch.autograd.grad(total, (x_TD, head_VD))])
    for clean, dirty in zip(*got):
        torch.testing.assert_close(dirty, clean, rtol=1e-6, atol=1e-7)
    assert (got[1][1][2] == 0).all()


def test_a_teacher_row_of_weight_0_reaches_nothing():
    hidden_TD, head_VD = student()
    hidden_TE, head_VE = teacher(torch.float32)
    hidden_TE[2] = float("nan")
    weight = torch.tensor([1.0, 2.0, 0.0, -0.5, 1.0], device=DEVICE)
    total = linear_kl(hidden_TD, head_VD, hidden_TE, head_VE, weight=weight).total
    assert total.isfinite() and torch.autograd.grad(total, head_VD)[0].isfinite().all()


@pytest.mark.parametrize("op", [linear_nll, linear_logprob])
def test_a_row_without_a_target_reaches_nothing(op):
    hidden_TD, head_VD = student()
    hidden_TD[3] = float("nan")
    target_T = torch.tensor([1, 2, 3, -1, 4], device=DEVICE)
    result = op(hidden_TD, head_VD, target_T)
    total = result.total if op is linear_nll else result.logp.sum()
    assert total.isfinite() and torch.autograd.grad(total, head_VD)[0].isfinite().all()


def test_a_row_that_counts_is_still_seen_to_be_broken():
    hidden_TD, head_VD = student()
    hidden_TD[2] = float("nan")
    assert kl(hidden_TD, head_VD, weight=torch.ones(T, device=DEVICE)).isnan()


@each_loss
def test_a_second_derivative_is_refused(loss):
    hidden_TD, head_VD = student()
    x_TD = hidden_TD.clone().requires_grad_()
    (plain_TD,) = torch.autograd.grad(loss(x_TD, head_VD), x_TD)
    (graph_TD,) = torch.autograd.grad(loss(x_TD, head_VD), x_TD, create_graph=True)
    assert torch.equal(plain_TD, graph_TD.detach())
    with pytest.raises(RuntimeError, match="no second derivative.*_ref"):
        (graph_TD**2).sum().backward()


@each_loss
def test_a_mean_as_weights_loses_nothing_in_fp16(loss):
    """1 / N as a weight under a loss scale of N: as good as the sum."""
    hidden_TD, head_VD = student(torch.float16)
    N, got = 65536, []
    for weight, scale in ((None, 1.0), (torch.full((T,), 1 / N, device=DEVICE), float(N))):
        x_TD = hidden_TD.clone().requires_grad_()
        total = loss(x_TD, head_VD, weight=weight)
        got.append([g.float() for g in torch.autograd.grad(total * scale, (x_TD, head_VD))])
        assert total.item() * scale == pytest.approx(loss(hidden_TD, head_VD).item(), rel=1e-5)
    for a, b in zip(*got):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)


COMPILED = {
    "linear_kl": kl,
    "linear_topk_kl": lambda x, head, **o: linear_topk_kl(x, head, *o.pop("rows3"), **o).total,
    "linear_nll": lambda x, head, **o: linear_nll(x, head, o.pop("target"), **o).total,
    "linear_logprob": lambda x, head, **o: linear_logprob(x, head, o.pop("target"), **o).logp.sum(),
    "token_kl": lambda x, head, **o: token_kl(x @ head.T, x.detach() @ head.T, **o).total,
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(
    "calls",
    [[(n, 1.0) for n in (10, 12, 17, 23, 31, 37)], [(10, t) for t in (1.0, 1.5, 2.5)]],
    ids=["tokens", "temperatures"],
)
def test_few_graphs_serve_every_number_of_tokens_and_temperature(name, calls):
    """At most 3: tokens become a variable of the graph, a temperature costs a graph of its own."""
    _, head_VD = student()
    torch._dynamo.reset()
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    hidden_TE, head_VE = teacher(torch.float32, 64)

    def call(x, other, ids, logp, tail, target, temperature):
        options = {"temperature": temperature}
        if name == "linear_kl":
            return linear_kl(x, head_VD, other, head_VE, **options).total
        if name == "linear_topk_kl":
            options["rows3"] = (ids, logp, tail)
        if name in ("linear_nll", "linear_logprob"):
            options["target"] = target
        return COMPILED[name](x, head_VD, **options)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for rows, temperature in calls:
        x_TD = torch.randn(rows, D, requires_grad=True, device=DEVICE)
        ids, logp, tail = (x.clone() for x in topk(torch.float32, rows))
        target_T = torch.randint(V, (rows,), device=DEVICE)
        other = hidden_TE[:rows].clone()
        got = compiled(x_TD, other, ids, logp, tail, target_T, temperature)
        want = call(x_TD, other, ids, logp, tail, target_T, temperature)
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()
    assert graphs <= 3


@pytest.mark.skipif(DEVICE != "cpu", reason="its mesh is of CPUs")
def test_a_replicated_head_is_a_head(tmp_path):
    hidden_TD, head_VD = student()
    want = kl(hidden_TD, head_VD)
    store = "file://" + os.path.join(tmp_path, "store")
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = distribute_tensor(head_VD.detach(), mesh, [Replicate()]).requires_grad_()
        got = linear_kl(hidden_TD, head, *teacher(torch.float32)).total
        torch.testing.assert_close(got, want)
        got_VD = torch.autograd.grad(got, head)[0].full_tensor()
        torch.testing.assert_close(got_VD, torch.autograd.grad(want, head_VD)[0])
    finally:
        dist.destroy_process_group()
