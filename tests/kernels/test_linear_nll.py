"""linear_nll on both paths: total and gradients against float64 and linear_logprob."""

import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, assert_gradient_close, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_logprob import linear_logprob
from reflux.kernels.linear_nll import _op, linear_nll, linear_nll_ref

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOSS = {torch.float64: 1e-12, **dict.fromkeys(DTYPES[1:], 2e-5)}
# the interpreter truncates bf16
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(T, V, D, K, dtype, seed):
    """[hidden, head, bias], targets with padding (-1 and V), weights of both signs and 0."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((T, D), (V, D), (V,))]
    target = torch.randint(-1, V + 1, (T, K) if K > 1 else (T,), generator=g).to(DEVICE)
    weight = torch.randn(target.shape, generator=g) * (torch.rand(target.shape, generator=g) > 0.3)
    return tensors, target, weight.to(DEVICE)


def run(fn, tensors, target, dtype, **options):
    """total, logp, and the gradients in hidden, head and bias under an upstream gradient."""
    x_TD, w_VD, b_V = (t.detach().to(dtype).requires_grad_() for t in tensors)
    out = fn(x_TD, w_VD, target, bias=b_V, **options)
    assert not out.logp.requires_grad
    return out.total.detach(), out.logp, *torch.autograd.grad(out.total * -0.7, (x_TD, w_VD, b_V))


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 3),
    V=st.integers(2, 300),
    D=st.integers(1, 9),
    K=st.sampled_from([1, 3]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.02]),
    padded=st.integers(0, 3),
    block_v=st.sampled_from([64, 256]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_total_and_gradients_match_float64(
    path,
    T,
    V,
    D,
    K,
    dtype,
    temperature,
    softcap,
    smoothing,
    z_loss,
    padded,
    block_v,
    workspace_mb,
    seed,
):
    (x_TD, w_VD, b_V), target, weight = inputs(T, V, D, K, dtype, seed)
    # columns of padding (T15)
    junk = torch.cat([w_VD, torch.full((padded, D), 99.0, device=DEVICE, dtype=dtype)])
    tensors = x_TD, junk, torch.cat([b_V, b_V.new_full((padded,), 77.0)])
    options = dict(
        temperature=temperature, softcap=softcap, vocab_size=V, logit_scale=0.5, weight=weight
    )
    if K == 1:
        options |= {"z_loss": z_loss, "label_smoothing": 0.0 if softcap else smoothing}
    with running(path, block_v):
        got = run(linear_nll, tensors, target, dtype, workspace_mb=workspace_mb, **options)
    truth = run(linear_nll_ref, tensors, target, torch.float64, **options)
    for what, a, b in zip(("total", "logp"), got, truth):
        torch.testing.assert_close(
            a.double(), b, rtol=LOSS[dtype], atol=LOSS[dtype], msg=lambda m, w=what: f"{w}: {m}"
        )
    for what, a, b in zip(("dhidden", "dhead", "dbias"), got[2:], truth[2:], strict=True):
        assert_gradient_close(a, b, what, GRAD[dtype])
    assert (got[3][V:] == 0).all() and (got[4][V:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_it_is_linear_logprob_with_known_weights(path):
    """With rows, one weight per row for all candidates, an impossible token left out."""
    tensors, target_TK, _ = inputs(5, 33, 4, 3, torch.float64, 1)
    tensors[2][7] = -torch.inf
    target_TK[0] = 7
    weight_T = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0], device=DEVICE, dtype=torch.float64)
    rows_M = torch.tensor([3, 0, 1], device=DEVICE)
    for x in tensors:
        x.requires_grad_()
    with running(path, 16):
        got = linear_nll(*tensors[:2], target_TK, weight=weight_T, bias=tensors[2], rows=rows_M)
        logp_TK = linear_logprob(*tensors[:2], target_TK, bias=tensors[2], rows=rows_M).logp
        want = -(logp_TK[1:] * weight_T[1:, None]).sum()
        pairs = zip(
            torch.autograd.grad(got.total, tensors), torch.autograd.grad(want, tensors), strict=True
        )
    torch.testing.assert_close(got.total, want)
    assert (
        torch.equal(got.logp, logp_TK) and got.logp[0, 0] == -torch.inf and (got.logp[2] == 0).all()
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_an_impossible_token_counts_but_does_not_spoil_the_gradient(path):
    tensors, target_T, _ = inputs(3, 20, 4, 1, torch.float32, 2)
    tensors[2][5], target_T = -torch.inf, torch.tensor([5, 1, 2], device=DEVICE)
    with running(path, 16):
        got = run(linear_nll, tensors, target_T, torch.float32)
        others = run(
            linear_nll,
            tensors,
            target_T,
            torch.float32,
            weight=torch.tensor([0.0, 1.0, 1.0], device=DEVICE),
        )
    assert got[0] == torch.inf
    for a, b in zip(got[2:], others[2:], strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_retained_tied_frozen_and_twice_the_same(path):
    tensors, target_T, weight_T = inputs(4, 30, 5, 1, torch.float32, 3)
    x_TD, w_VD, _ = (t.requires_grad_() for t in tensors)
    w_VD.grad = torch.ones_like(w_VD)  # as a tied embedding has left it
    with running(path, 16):
        total, again = (linear_nll(x_TD, w_VD, target_T, weight=weight_T).total for _ in range(2))
        first, second = (
            torch.autograd.grad(t, (x_TD, w_VD), retain_graph=True) for t in (total, again)
        )
        total.backward(retain_graph=True)
        total.backward()
        frozen = linear_nll(x_TD, w_VD, target_T, weight=weight_T, frozen_head=True).total
        dx_TD, none = torch.autograd.grad(frozen, (x_TD, w_VD), allow_unused=True)
    assert torch.equal(dx_TD, first[0]) and none is None
    assert all(torch.equal(a, b) for a, b in zip((total, *first), (again, *second), strict=True))
    torch.testing.assert_close(w_VD.grad, 1 + 2 * first[1])


def test_the_full_logits_never_exist():
    (x_TD, w_VD, _), target_T, _ = inputs(300, 400, 8, 1, torch.float32, 4)
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        linear_nll(
            x_TD.requires_grad_(), w_VD.requires_grad_(), target_T, workspace_mb=0.25
        ).total.backward()


def on_slices(tensors, target, weight, softcap=3.0, **more):
    from torch import distributed as dist

    results = []
    for path in PATHS:
        edges = (0, 20, 40)
        start, end = edges[dist.get_rank()], edges[dist.get_rank() + 1]
        shard = VocabShard(dist.group.WORLD.group_name, start)
        with running(path, 16):
            results.append(
                run(
                    linear_nll,
                    (tensors[0], *(t[start:end] for t in tensors[1:])),
                    target,
                    torch.float64,
                    shard=shard,
                    vocab_size=33,
                    weight=weight,
                    softcap=softcap,
                    workspace_mb=0.001,
                    **more,
                )
            )
    return results


@pytest.mark.parametrize("path", PATHS)
def test_smoothing_is_torchs_and_the_z_loss_is_palms(path):
    (x_TD, w_VD, b_V), _, _ = inputs(5, 40, 6, 1, torch.float64, 11)
    target_T = torch.tensor([3, 0, 39, -100, 7], device=DEVICE)
    rows = torch.tensor([4, 0, 3], device=DEVICE)
    logits_TV = x_TD @ w_VD.T + b_V
    smooth = torch.nn.functional.cross_entropy(
        logits_TV, target_T, label_smoothing=0.2, reduction="none", ignore_index=-100
    )
    z_T = torch.where(target_T >= 0, logits_TV.logsumexp(1).square(), 0.0)
    with running(path, 16):
        for chosen in (None, rows):
            options = dict(bias=b_V, label_smoothing=0.2, rows=chosen, workspace_mb=0.001)
            out = linear_nll(x_TD, w_VD, target_T, **options)
            more = linear_nll(x_TD, w_VD, target_T, z_loss=0.01, **options)
            mine = slice(None) if chosen is None else chosen
            torch.testing.assert_close(out.total, smooth[mine].sum())
            torch.testing.assert_close(more.total - out.total, 0.01 * z_T[mine].sum())
            torch.testing.assert_close(more.logp, out.logp, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(label_smoothing=1.0), "0 <= label_smoothing < 1"),
        (dict(z_loss=-1.0), "z_loss >= 0"),
        (dict(label_smoothing=0.1, softcap=3.0), "no product with the head's mean row"),
        (dict(z_loss=0.1, target=torch.zeros(2, 2).long()), r"one target a row, \[T\]"),
    ],
)
def test_regularisers_without_a_meaning(options, match):
    options = {"target": torch.zeros(2, dtype=torch.long)} | options
    with pytest.raises(ValueError, match=match):
        linear_nll(torch.zeros(2, 4), torch.zeros(5, 4), **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks, in the interpreter")
def test_slices_of_a_vocabulary_are_the_whole_one():
    tensors, target_TK, weight_TK = inputs(4, 40, 5, 3, torch.float64, 7)
    target_TK = target_TK.clamp(max=33)
    want = run(
        linear_nll_ref,
        tensors,
        target_TK,
        torch.float64,
        vocab_size=33,
        weight=weight_TK,
        softcap=3.0,
    )
    for left, right in zip(*run_on_ranks(on_slices, tensors, target_TK, weight_TK), strict=True):
        for a, b, c in zip(left[:3], right[:3], want[:3], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-12)
        for a, b, c in zip(left[3:], right[3:], want[3:], strict=True):
            torch.testing.assert_close(torch.cat([a, b]), c, rtol=1e-11, atol=1e-12)


def on_slices_smoothed(tensors, target, weight):
    return on_slices(tensors, target, weight, softcap=None, label_smoothing=0.1, z_loss=0.01)


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks, in the interpreter")
def test_slices_share_the_even_part_and_the_normaliser():
    tensors, target_T, weight_T = inputs(4, 40, 5, 1, torch.float64, 8)
    options = dict(vocab_size=33, weight=weight_T, label_smoothing=0.1, z_loss=0.01)
    target_T = target_T.clamp(max=33)
    want = run(linear_nll_ref, tensors, target_T, torch.float64, **options)
    ranks = run_on_ranks(on_slices_smoothed, tensors, target_T, weight_T)
    for left, right in zip(*ranks, strict=True):
        for a, b, c in zip(left[:3], right[:3], want[:3], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-12)
        for a, b, c in zip(left[3:], right[3:], want[3:], strict=True):
            torch.testing.assert_close(torch.cat([a, b]), c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    (x_TD, w_VD, b_V), target_TK, weight_TK = inputs(3, 20, 4, 2, torch.float32, 5)
    head = x_TD.requires_grad_(), w_VD.requires_grad_(), b_V, 1.0, 0.0
    options = target_TK.clamp(max=19), None, weight_TK, 1.0, 0.1, 0.01, 20, "", 0, 1200.0
    with running(path, 16):
        torch.library.opcheck(_op, (*head, *options, True, True, False))


def test_compiles_into_one_graph_and_under_autocast():
    tensors, target_T, weight_T = inputs(3, 20, 4, 1, torch.float32, 6)
    compiled = torch.compile(linear_nll, fullgraph=True, backend="aot_eager")
    want, got = (
        run(fn, tensors, target_T, torch.float32, weight=weight_T) for fn in (linear_nll, compiled)
    )
    with torch.autocast(DEVICE, torch.bfloat16):
        half = run(compiled, tensors, target_T, torch.float32, weight=weight_T)
    for a, b, c in zip(want, got, half, strict=True):
        assert torch.equal(a, b) and a.dtype == c.dtype
        torch.testing.assert_close(a, c, rtol=0.1, atol=0.1)
    assert not torch.equal(want[0], half[0])


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, device=DEVICE), torch.zeros(2, 2, device=DEVICE)]
)
def test_a_weight_of_the_wrong_shape(weight):
    with pytest.raises(ValueError, match="0 for what is to be left out"):
        linear_nll(
            torch.zeros(2, 4, device=DEVICE),
            torch.zeros(5, 4, device=DEVICE),
            torch.zeros(2, dtype=torch.long, device=DEVICE),
            weight=weight,
        )
