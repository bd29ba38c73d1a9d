"""linear_dense_kl: a teacher given over the whole vocabulary, against float64 and linear_kl."""

import pytest
import torch
from close import (
    DEVICE,
    PATHS,
    NoLargeTensor,
    assert_compiles,
    assert_gradient_close,
    assert_losses_close,
    running,
)
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks
from torch import distributed as dist

from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_dense_kl import _op, linear_dense_kl, linear_dense_kl_ref
from reflux.kernels.linear_kl import linear_kl

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# the interpreter truncates bf16
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
both_paths = pytest.mark.parametrize("path", PATHS)


def inputs(T, V, D, dtype, seed):
    """[hidden, head, bias, teacher's logits], weight [T] with zeros and signs."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=g) for s in ((T, D), (V, D), (V,), (T, V))]
    weight_T = torch.randn(T, generator=g) * (torch.rand(T, generator=g) > 0.3)
    return [t.to(DEVICE, dtype) for t in tensors], weight_T.to(DEVICE)


def run(fn, tensors, dtype, **options):
    """total, kl and the gradients in hidden, head and bias."""
    x_TD, head_VD, bias_V = (t.detach().to(dtype).requires_grad_() for t in tensors[:3])
    out = fn(x_TD, head_VD, tensors[3], bias=bias_V, **options)
    assert not out.kl.requires_grad
    grads = torch.autograd.grad(out.total * -0.7, [x_TD, head_VD, bias_V])
    return out.total.detach(), out.kl, *grads


@both_paths
@given(
    T=st.integers(0, 3),
    V=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 129]) | st.integers(1, 300),
    D=st.integers(1, 8),
    dtype=st.sampled_from(list(LOSS)),
    stored=st.sampled_from([None, torch.float32, torch.bfloat16]),
    options=st.fixed_dictionaries(
        dict(
            divergence=st.sampled_from(DIVERGENCES),
            beta=st.sampled_from([0.25, 0.9]),
            temperature=st.sampled_from([0.5, 1.0, 2.0]),
            softcap=st.sampled_from([None, 4.0]),
            logit_scale=st.sampled_from([1.0, 0.5]),
            scale_t2=st.booleans(),
        )
    ),
    chosen=st.sampled_from([None, [], [1], [2, 0]]),
    padded=st.integers(0, 3),
    logp=st.booleans(),
    block_v=st.sampled_from([64, 2048]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=st.integers(0, 2**31 - 1),
)
def test_values_and_gradients_match_float64(
    path, T, V, D, dtype, stored, options, chosen, padded, logp, block_v, workspace_mb, seed
):
    tensors, weight_T = inputs(T, V, D, dtype, seed)
    tensors[3] = tensors[3].to(stored or dtype)
    if logp:
        tensors[3] = tensors[3].log_softmax(-1)
    for i in (1, 2):  # junk in padded rows of the head
        junk = torch.full((padded, *tensors[i].shape[1:]), 33.0, device=DEVICE, dtype=dtype)
        tensors[i] = torch.cat([tensors[i], junk])
    options = options | dict(weight=weight_T, vocab_size=V)
    if chosen is not None:
        chosen = [t for t in chosen if t < T]
        options["rows"] = torch.tensor(chosen, dtype=torch.long, device=DEVICE)
    with running(path, block_v):
        got = run(linear_dense_kl, tensors, dtype, workspace_mb=workspace_mb, **options)
    truth = run(linear_dense_kl_ref, tensors, torch.float64, **options)
    assert_losses_close(got, truth, LOSS[dtype])
    for what, a, b in zip(("dhidden", "dhead", "dbias"), got[2:], truth[2:]):
        if V > 1:  # one class: every gradient is 0, and no error is small relative to 0
            assert_gradient_close(a, b, what, GRAD[dtype])
    assert all((g[V:] == 0).all() for g in got[3:])


@both_paths
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_linear_kl_of_the_logits_that_a_teachers_head_makes(path, divergence):
    (x_TD, head_VD, _, _), weight_T = inputs(4, 90, 6, torch.float32, 5)
    y_TE, teacher_VE = torch.randn(4, 5, device=DEVICE), torch.randn(90, 5, device=DEVICE)
    options = dict(divergence=divergence, weight=weight_T, temperature=2.0, scale_t2=True)
    results = []
    for loss, teacher in (
        (linear_kl, (y_TE, teacher_VE)),
        (linear_dense_kl, (y_TE @ teacher_VE.t(),)),
        (linear_dense_kl, ((y_TE @ teacher_VE.t()).log_softmax(-1),)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x_TD, head_VD)]
        with running(path, 64):
            out = loss(*leaves, *teacher, **options)
            results.append([out.kl, *torch.autograd.grad(out.total, leaves)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


@both_paths
def test_a_token_that_the_teacher_bans_and_a_row_that_is_no_distribution(path):
    (x_TD, head_VD, _, teacher_TV), _ = inputs(3, 40, 4, torch.float32, 6)
    teacher_TV[0, 7], teacher_TV[1] = -torch.inf, torch.nan
    x_TD.requires_grad_()
    with running(path, 64):
        forward = linear_dense_kl(x_TD, head_VD, teacher_TV, weight=torch.tensor([1.0, 0.0, 1.0]))
        reverse = linear_dense_kl(x_TD, head_VD, teacher_TV, divergence="reverse")
    assert forward.total.isfinite() and forward.kl[1].isnan() and reverse.kl[0].isinf()
    (dx_TD,) = torch.autograd.grad(forward.total, x_TD)
    assert dx_TD.isfinite().all() and (dx_TD[1] == 0).all() and (dx_TD[0] != 0).any()


def test_the_teacher_may_lie_in_any_layout_and_gets_no_gradient():
    (x_TD, head_VD, _, teacher_TV), _ = inputs(3, 40, 4, torch.float32, 7)
    want = linear_dense_kl(x_TD.requires_grad_(), head_VD, teacher_TV).kl
    strided = teacher_TV.t().contiguous().t().requires_grad_()
    out = linear_dense_kl(x_TD, head_VD, strided)
    out.total.backward()
    torch.testing.assert_close(out.kl, want)
    assert strided.grad is None and x_TD.grad is not None
    wider = torch.cat([teacher_TV, torch.full((3, 2), 50.0, device=DEVICE)], 1)
    torch.testing.assert_close(linear_dense_kl(x_TD, head_VD, wider).kl, want)


def test_no_block_of_all_rows_is_made():  # T25
    (x_TD, head_VD, _, teacher_TV), _ = inputs(300, 400, 8, torch.float32, 4)
    x_TD.requires_grad_(), head_VD.requires_grad_()
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        linear_dense_kl(x_TD, head_VD, teacher_TV, workspace_mb=0.5).total.backward()


@both_paths
@pytest.mark.parametrize("full", [False, True])
def test_the_op_keeps_torch_librarys_contract(path, full):
    (x_TD, head_VD, bias_V, teacher_TV), weight_T = inputs(3, 20, 4, torch.float32, 7)
    leaves = [t.requires_grad_() for t in (x_TD, head_VD)]
    rows_M = torch.tensor([2, 1], device=DEVICE) if full else None
    side = *leaves, bias_V.requires_grad_() if full else None, 1.0, 0.0, teacher_TV
    options = weight_T, rows_M, "jsd", 0.5, 2.0, full, 20, "", 0, 1200.0
    with running(path, 64):
        torch.library.opcheck(_op, (*side, *options, True, True, full))


def test_it_compiles_into_a_full_graph():
    (x_TD, head_VD, _, teacher_TV), weight_T = inputs(3, 20, 4, torch.float32, 8)

    def loss(x_TD, head_VD):
        return linear_dense_kl(x_TD * 2, head_VD, teacher_TV, weight=weight_T).total * 3

    assert_compiles(loss, [x_TD.requires_grad_(), head_VD.requires_grad_()])


def slices_are_the_whole() -> None:
    (x_TD, head_VD, bias_V, teacher_TV), weight_T = inputs(4, 48, 5, torch.float64, 9)
    start = 24 * dist.get_rank()
    shard, cut = VocabShard(dist.group.WORLD.group_name, start), slice(start, start + 24)
    for divergence in DIVERGENCES:
        options = dict(divergence=divergence, weight=weight_T, vocab_size=40, beta=0.3)
        tensors = x_TD, head_VD, bias_V, teacher_TV
        whole = run(linear_dense_kl, tensors, torch.float64, **options)
        mine = x_TD, head_VD[cut], bias_V[cut], teacher_TV[:, cut]
        got = run(linear_dense_kl, mine, torch.float64, shard=shard, **options)
        for a, b in zip(got, (*whole[:3], *(g[cut] for g in whole[3:]))):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_slices_of_the_vocabulary_add_up():
    run_on_ranks(slices_are_the_whole)


@pytest.mark.parametrize(
    "teacher, match",
    [
        (torch.zeros(3, 5), r"\[3, 5\] for 2 rows; want floats \[T, V\]"),
        (torch.zeros(2, 5, dtype=torch.long), "want floats"),
        (torch.zeros(2, 4), "has 4 columns and the student's head 5 tokens.*linear_topk_kl"),
        (torch.zeros(2, 5, device="meta"), "want one device"),
    ],
)
def test_mistakes_say_how_to_fix_them(teacher, match):
    teacher = teacher if teacher.device.type == "meta" else teacher.to(DEVICE)
    with pytest.raises(ValueError, match=match):
        linear_dense_kl(torch.zeros(2, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE), teacher)
