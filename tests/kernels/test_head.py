"""The head of every linear_* op on tensor cores: chunks in groups, gradients in bf16 and fp16."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from close import DEVICE, PATHS, running, tensor_cores
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.kernels import _head
from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels.bucket_kl import bucket_kl, bucket_kl_ref
from reflux.kernels.class_logprob import class_logprob, class_logprob_ref, class_map
from reflux.kernels.linear_dense_kl import linear_dense_kl, linear_dense_kl_ref
from reflux.kernels.linear_kl import linear_kl, linear_kl_ref
from reflux.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from reflux.kernels.linear_nll import linear_nll, linear_nll_ref
from reflux.kernels.linear_topk_kl import linear_topk_kl, linear_topk_kl_ref
from reflux.kernels.teacher_topk import teacher_topk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, masked lanes
# relative, in the norm. bf16: 8 bits, and the interpreter truncates. fp16: 11 bits
GRAD = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
OPS = "kl nll logprob topk dense class bucket".split()
SEEDS = st.integers(0, 2**31 - 1)


@contextmanager
def calls_counted():
    """Rows of each block of logits, and of each product of the backward."""
    logits: list[int] = []
    products: list[int] = []
    project, backproject = _head.project, _head.backproject

    def counted_project(x_CD, *rest):
        logits.append(len(x_CD))
        return project(x_CD, *rest)

    def counted_backproject(d_CV, *rest):
        products.append(len(d_CV))
        return backproject(d_CV, *rest)

    with (
        patch.object(_head, "project", counted_project),
        patch.object(_head, "backproject", counted_backproject),
    ):
        yield logits, products


def case(op: str, T: int, V: int, dtype, seed: int, options: dict) -> tuple[Callable, Callable]:
    """(ours, its definition) as functions of hidden and head, the other inputs fixed."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    y_TE, u_VE, target_T = rand(T, 6), rand(V, 6), torch.randint(V, (T,), generator=g).to(DEVICE)
    if op == "kl":
        return (
            lambda x, w, **o: linear_kl(x, w, y_TE, u_VE, **options, **o).total,
            lambda x, w: linear_kl_ref(x, w, y_TE.double(), u_VE.double(), **options).total,
        )
    if op in ("class", "bucket"):
        return _class_case(op, y_TE, u_VE, options)
    if op == "dense":
        z_TV = y_TE.float() @ u_VE.float().t()
        return (
            lambda x, w, **o: linear_dense_kl(x, w, z_TV, **options, **o).total,
            lambda x, w: linear_dense_kl_ref(x, w, z_TV.double(), **options).total,
        )
    if op == "topk":
        ids, logp, tail = teacher_topk(y_TE.float(), u_VE.float(), min(4, V))
        return (
            lambda x, w, **o: linear_topk_kl(x, w, ids, logp, tail, **options, **o).total,
            lambda x, w: (
                linear_topk_kl_ref(x, w, ids, logp.double(), tail.double(), **options).total
            ),
        )
    weight_T = options.get("weight", torch.ones(T, device=DEVICE))
    rows_M, only = options.get("rows"), torch.ones(T, device=DEVICE)
    only = only if rows_M is None else torch.zeros(T, device=DEVICE).index_fill_(0, rows_M, 1.0)
    if op == "nll":
        more = dict(label_smoothing=0.1, z_loss=1e-3)
        return (
            lambda x, w, **o: linear_nll(x, w, target_T, **more, **options, **o).total,
            lambda x, w: linear_nll_ref(x, w, target_T, weight=weight_T * only, **more).total,
        )

    def of(result):
        used_T = (weight_T * only).to(result.logp.dtype)
        return (used_T * (result.logp - 0.3 * result.lse + 0.2 * result.entropy)).sum()

    return (
        lambda x, w, **o: of(linear_logprob(x, w, target_T, entropy=True, rows=rows_M, **o)),
        lambda x, w: of(_with_entropy(x, w, target_T)),
    )


def _class_case(op: str, y_TE, u_VE, options: dict) -> tuple[Callable, Callable]:
    """5 classes, none empty where V allows; one id in nine without a class."""
    T, V = len(y_TE), len(u_VE)
    class_V = torch.arange(V, device=DEVICE) * 7 % min(5, V)
    class_V[8::9] = -1
    classes = class_map(class_V, min(5, V))
    if op == "bucket":
        teacher = y_TE, u_VE, classes
        exact = y_TE.double(), u_VE.double(), classes
        return (
            lambda x, w, **o: bucket_kl(x, w, classes, *teacher, **options, **o).total,
            lambda x, w: bucket_kl_ref(x, w, classes, *exact, **options).total,
        )
    g = torch.Generator().manual_seed(T)
    weight_T = options.get("weight", torch.ones(T, device=DEVICE))
    g_TN = torch.randn(T, min(5, V), generator=g).to(DEVICE) * weight_T[:, None]
    rows = options.get("rows")
    return (
        lambda x, w, **o: (class_logprob(x, w, classes, rows=rows, **o) * g_TN).sum(),
        lambda x, w: (class_logprob_ref(x, w, classes, rows=rows) * g_TN).sum(),
    )


def _with_entropy(x_TD, w_VD, target_T):
    result = linear_logprob_ref(x_TD, w_VD, target_T)
    logp_TV = (x_TD @ w_VD.t()).log_softmax(1)
    return result._replace(entropy=-(logp_TV.exp() * logp_TV).sum(1))


def gradients(loss: Callable, x_TD, w_VD, dtype, by: float = 1.0, **options):
    """(loss, dhidden, dhead) of `by` times the loss, as a loss scale would have it."""
    leaves = [x_TD.detach().to(dtype).requires_grad_(), w_VD.detach().to(dtype).requires_grad_()]
    total = loss(*leaves, **options)
    return total.detach(), *torch.autograd.grad(total * by, leaves)


on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has tensor cores in every test")


@on_a_cpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=10)
@given(
    T=st.integers(1, 9),
    V=st.sampled_from([2, 17, 64, 100]),
    dtype=st.sampled_from(list(GRAD)),
    divergence=st.sampled_from(DIVERGENCES),
    size=st.sampled_from([1.0, 1e-5, 3e4]),
    chosen=st.booleans(),
    budget=st.sampled_from([1e-6, 0.0012, 0.003, 1.0]),
    seed=SEEDS,
)
def test_groups_of_16_bit_chunks_match_float64(
    path, op, T, V, dtype, divergence, size, chosen, budget, seed
):
    g = torch.Generator().manual_seed(seed)
    x_TD, w_VD = (torch.randn(n, 5, generator=g).to(DEVICE, dtype) for n in (T, V))
    weight_T = (torch.randn(T, generator=g) * size * (torch.rand(T, generator=g) > 0.2)).to(DEVICE)
    options: dict = dict(weight=weight_T)
    if op not in ("nll", "logprob"):
        options["divergence"] = divergence
    if chosen:
        options["rows"] = torch.randperm(T, generator=g)[: T // 2 + 1].to(DEVICE)
    ours, definition = case(op, T, V, dtype, seed, options)
    with running(path, 64), tensor_cores():
        got = gradients(ours, x_TD, w_VD, dtype, by=1 / size, workspace_mb=budget)
    truth = gradients(definition, x_TD, w_VD, torch.float64, by=1 / size)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=2e-5, atol=2e-5 * size)
    for what, a, b in zip(("dhidden", "dhead"), got[1:], truth[1:]):
        # what fp16 cannot hold of the result itself
        lost = 6e-8 * a.numel() ** 0.5 if dtype == torch.float16 else 1e-9
        error = (a.double() - b).norm()
        assert a.dtype == dtype and error <= GRAD[dtype] * b.norm() + lost, (what, error, b.norm())


@on_a_cpu
@pytest.mark.skipif("kernel" not in PATHS, reason="no triton")
@pytest.mark.parametrize("op", OPS)
def test_several_chunks_go_through_one_product(op):
    """9 rows of 100 classes in 2,900 bytes: logits 1 or 2 rows at a time, at most 2 products."""
    g = torch.Generator().manual_seed(0)
    x_TD, w_VD = (torch.randn(n, 5, generator=g).to(torch.bfloat16) for n in (9, 100))
    ours, _ = case(op, 9, 100, torch.bfloat16, 0, {})
    with running("kernel"), tensor_cores(), calls_counted() as (logits, products):
        gradients(ours, x_TD, w_VD, torch.bfloat16, workspace_mb=2900 / 2**20)
    assert sum(products) == 9 and 3 * len(products) <= len(logits), (logits, products)


@on_a_cpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", ["kl", "bucket"])
def test_a_gradient_beyond_fp16_is_cut_and_leaves_the_others_alone(path, op):
    """Reverse KL of logits that are 20,000 apart: a finite kl whose gradient fp16 cannot lift."""
    x_TD = torch.tensor([[1.0], [1e-3]]).half()
    y_TE = torch.tensor([[200.0], [1e-3]]).half()
    w_VD = torch.tensor([[0.0], [1e-3]]).half()
    u_VE = torch.tensor([[0.0], [100.0]]).half()
    ids = class_map(torch.arange(2), 2)  # a class for every id

    def loss(x, w, y=y_TE):
        if op == "bucket":
            return bucket_kl(x, w, ids, y, u_VE, ids, divergence="reverse").total
        return linear_kl(x, w, y, u_VE, divergence="reverse").total

    with running(path, 64), tensor_cores():
        total, dx_TD, dw_VD = gradients(loss, x_TD, w_VD, torch.float16, by=1e-3)
        _, alone_TD, _ = gradients(
            lambda x, w: loss(x, w, y_TE[1:]), x_TD[1:], w_VD, torch.float16, by=1e-3
        )
    assert total.isfinite() and dx_TD.isfinite().all() and dw_VD.isfinite().all()
    assert (dw_VD.abs() > 0.9).all()  # 1023 of 5,000, times 1e-3: cut, in the right direction
    assert dw_VD[0] < 0 < dw_VD[1] or dw_VD[1] < 0 < dw_VD[0]
    torch.testing.assert_close(dx_TD[1:], alone_TD)


@on_a_cpu
@pytest.mark.parametrize("op", ["nll", "kl", "lse", "entropy", "class", "empty"])
@pytest.mark.parametrize("ignored", [1e20, math.nan])
def test_what_is_ignored_does_not_choose_the_unit_of_the_others(op, ignored):
    """fp16 gradients are divided by the largest of the rows and classes that have one: beside 1e20
    all others would be 0, and beside a NaN none above 1 could be kept.
    """
    if math.isnan(ignored) and op in ("nll", "kl"):
        pytest.skip("a weight that is NaN makes the total NaN")
    g = torch.Generator().manual_seed(0)
    x_TD, w_VD = (torch.randn(n, 5, generator=g).half() for n in (6, 20))
    size_T = 3e3 * torch.randn(6, generator=g)
    size_T[[1, 4]] = ignored
    loss = _with_ignored(op, size_T, torch.tensor([0, 2, 3, 5]))
    with tensor_cores():
        got = gradients(loss, x_TD, w_VD, torch.float16)
    truth = gradients(loss, x_TD, w_VD, torch.float64)
    for a, b in zip(got[1:], truth[1:]):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


def _with_ignored(op: str, size_T: torch.Tensor, rows_M: torch.Tensor) -> Callable:
    """A loss of hidden and head that weighs rows 1 and 4, or a class without ids, by what is
    ignored, and the others by size.
    """
    y_TE, u_VE = size_T.new_ones(6, 3).half(), torch.arange(60.0).view(20, 3).half() / 20
    target_T, ids_V = torch.tensor([3, -1, 7, 0, -1, 9]), torch.arange(20) % 4
    classes = class_map(ids_V, 4 if op == "class" else 5)

    def loss(x, w):
        if op == "nll":
            return linear_nll(x, w, target_T, weight=size_T).total
        if op == "kl":
            y, u = y_TE.to(x.dtype), u_VE.to(x.dtype)
            return linear_kl(x, w, y, u, weight=size_T, rows=rows_M).total
        if op in ("lse", "entropy"):
            out = linear_logprob(x, w, target_T, entropy=True)
            return (getattr(out, op) * size_T).sum()
        logp_TN = class_logprob(x, w, classes, rows=rows_M if op == "class" else None)
        if op == "class":
            return (logp_TN * torch.tensor([1.0, 0, -0.5, 0]) * size_T[:, None]).sum()
        # a gradient of its own for the class without ids, whose log-probability is -inf
        seen_TN = torch.where(logp_TN.isfinite(), logp_TN, 0.0)
        used_T = size_T[rows_M].repeat(2)[:6]
        return (seen_TN * used_T[:, None] * torch.arange(5)).sum() + (
            logp_TN[:, 4] * size_T[1]
        ).sum()

    return loss
