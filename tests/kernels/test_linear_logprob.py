"""linear_logprob on both paths: float64 parity, ignored rows, padded heads, chunks, slices."""

import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, assert_gradient_close, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_logprob import _op, _op_backward, linear_logprob, linear_logprob_ref

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# absolute, of values of order 1 to 30
LOSS = {torch.float64: 1e-12, **dict.fromkeys(DTYPES[1:], 2e-5)}
# the interpreter truncates bf16
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
OPTIONS = dict(logit_scale=0.25, softcap=4.0, temperature=2.0)


def inputs(T, V, D, K, dtype, seed):
    """hidden [T, D], head [V, D], bias [V] and targets; -1 and V are padding."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((T, D), (V, D), (V,))]
    return tensors, torch.randint(-1, V + 1, (T, K) if K > 1 else (T,), generator=g).to(DEVICE)


def run(fn, tensors, target, dtype, **options):
    """Outputs, and gradients in hidden, head and bias for an upstream gradient of mixed signs."""
    x_TD, w_VD, b_V = (t.detach().to(dtype).requires_grad_() for t in tensors)
    out = fn(x_TD, w_VD, target, bias=b_V, **options)
    parts = [o for o in out if o is not None]
    total = sum(
        (o * torch.linspace(-1, 2, o.numel(), device=DEVICE).to(o.dtype).view_as(o)).sum()
        for o in parts
    )
    return [o.detach() for o in parts], torch.autograd.grad(total, (x_TD, w_VD, b_V))


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 3),
    V=st.integers(1, 300),
    D=st.integers(1, 9),
    K=st.sampled_from([1, 3, 70]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    padded=st.integers(0, 3),
    block_v=st.sampled_from([64, 256, 2048]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_values_and_gradients_match_float64(
    path, T, V, D, K, dtype, temperature, softcap, logit_scale, padded, block_v, workspace_mb, seed
):
    (x_TD, w_VD, b_V), target = inputs(T, V, D, K, dtype, seed)
    # columns of padding (T15)
    junk = torch.cat([w_VD, torch.full((padded, D), 99.0, device=DEVICE, dtype=dtype)])
    tensors = x_TD, junk, torch.cat([b_V, b_V.new_full((padded,), 77.0)])
    options = dict(temperature=temperature, softcap=softcap, vocab_size=V, logit_scale=logit_scale)
    with running(path, block_v):
        got, grads = run(
            linear_logprob,
            tensors,
            target,
            dtype,
            entropy=True,
            workspace_mb=workspace_mb,
            **options,
        )
    truth, true_grads = run(linear_logprob_ref, tensors, target, torch.float64, **options)
    for what, a, b in zip(("logp", "lse", "entropy"), got, truth, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=LOSS[dtype], atol=LOSS[dtype], msg=lambda m, w=what: f"{w}: {m}"
        )
    for what, a, b in zip(("dhidden", "dhead", "dbias"), grads, true_grads, strict=True):
        assert_gradient_close(a, b, what, GRAD[dtype])
    assert (grads[1][V:] == 0).all() and (grads[2][V:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_gradients_in_float64(path):
    tensors, target = inputs(3, 37, 4, 3, torch.float64, 1)
    with running(path, 64):
        assert torch.autograd.gradcheck(
            lambda x, w, b: linear_logprob(x, w, target, bias=b, entropy=True, **OPTIONS),
            [t.requires_grad_() for t in tensors],
            fast_mode=True,
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_a_frozen_head_takes_the_short_way_to_the_same_gradient(path, options):
    """One target, no entropy: the forward makes dlogp/dhidden; a gradient of lse recomputes."""
    (x_TD, w_VD, b_V), target_T = inputs(4, 40, 5, 1, torch.float64, 2)
    target_T[1] = -1
    target_T[2] = 3
    if not options:  # a soft cap would lift it back
        b_V[3] = -torch.inf
    up_T = torch.linspace(-1, 2, 4, device=DEVICE, dtype=torch.float64)
    up_T[2] = 0  # only so that the definition's logp of -inf does not make its sum NaN
    x_TD.requires_grad_(), w_VD.requires_grad_()
    truth = linear_logprob_ref(x_TD, w_VD.detach(), target_T, bias=b_V, **options)
    with running(path, 16):
        got = linear_logprob(
            x_TD, w_VD, target_T, bias=b_V, frozen_head=True, workspace_mb=0.001, **options
        )
        for parts in (("logp",), ("lse",), ("logp", "lse")):
            a, b = (
                sum(torch.where(up_T != 0, getattr(out, p) * up_T, 0.0).sum() for p in parts)
                for out in (got, truth)
            )
            (da,), (db,) = (torch.autograd.grad(x, x_TD, retain_graph=True) for x in (a, b))
            torch.testing.assert_close(da, db, rtol=1e-11, atol=1e-12)
        (dx_TD,) = torch.autograd.grad(got.logp[2], x_TD)
    assert options or (got.logp[2] == -torch.inf and (dx_TD == 0).all())


@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_are_exactly_zero(path):
    tensors, _ = inputs(4, 33, 6, 1, torch.float32, seed=0)
    # 33 and more: not in the vocabulary
    target_TK = torch.tensor([[5, -1], [-1, -100], [7, 7], [33, 99]], device=DEVICE)
    with running(path, 16):
        out, (dx_TD, *_) = run(linear_logprob, tensors, target_TK, torch.float32, entropy=True)
    for part in (*out, dx_TD):
        assert (part[1::2] == 0).all()
    assert out[0][0, 1] == 0 and out[0][0, 0] < 0 and (dx_TD[0] != 0).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("entropy", [True, False])
def test_only_chosen_rows_are_computed(path, entropy):
    tensors, target_T = inputs(6, 33, 4, 1, torch.float64, seed=8)
    target_T = target_T.clamp(0, 32)
    rows_M = torch.tensor([4, 1, 3], device=DEVICE, dtype=torch.int32)
    left_out_T = torch.tensor([1, 0, 1, 0, 0, 1], device=DEVICE) == 1
    broken = [torch.where(left_out_T[:, None], torch.nan, tensors[0]), *tensors[1:]]
    options = dict(entropy=entropy, frozen_head=not entropy)
    for workspace_mb in (0.001, 1200):
        with running(path, 16):
            got, want = (
                run(
                    lambda x, w, y, bias, **o: (
                        linear_logprob(x, w, y, bias=bias if entropy else bias.detach(), **o)
                        + (() if entropy else (w.sum(), bias.sum()))
                    ),
                    x,
                    y,
                    torch.float64,
                    workspace_mb=workspace_mb,
                    **options,
                    **rows,
                )
                for x, y, rows in (
                    (broken, target_T, dict(rows=rows_M)),
                    (tensors, target_T.masked_fill(left_out_T, -1), {}),
                )
            )
        for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_entropy_does_not_cancel_at_large_logits(path):
    hidden_TD = torch.cat([torch.randn(3, 4), torch.full((3, 1), 100.0)], 1).to(DEVICE)
    # every logit near 1e4
    head_VD = torch.cat([torch.randn(70, 4), torch.full((70, 1), 100.0)], 1).to(DEVICE)
    # exact in fp32, so only the op's own arithmetic is measured
    head_VD[:, :4] = head_VD[:, :4].round()
    hidden_TD[:, :4] = hidden_TD[:, :4].round()
    target_T = torch.zeros(3, dtype=torch.long, device=DEVICE)
    with running(path, 16):
        got = linear_logprob(hidden_TD, head_VD, target_T, entropy=True)
    truth = linear_logprob_ref(hidden_TD.double(), head_VD.double(), target_T)
    torch.testing.assert_close(got.entropy.double(), truth.entropy, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.logp.double(), truth.logp, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_chunks_change_no_bit_of_a_row_and_nor_does_a_second_run(path):
    """Small integers, so that every GEMM is exact whatever its shape and the rest must be."""
    tensors, target_T = inputs(9, 65, 4, 1, torch.float32, seed=3)
    tensors = [t.mul(4).round().clamp(-8, 8) for t in tensors]
    with running(path, 64):
        whole, *others = (
            run(
                linear_logprob,
                tensors,
                target_T,
                torch.float32,
                entropy=True,
                workspace_mb=mb,
                temperature=2.0,
            )
            for mb in (1200, 1200, 1e-3)
        )
    for parts in others:
        for a, b in zip(whole[0], parts[0], strict=True):
            assert torch.equal(a, b)
    for a, b in zip(whole[1], others[0][1], strict=True):
        assert torch.equal(a, b)


def test_the_full_logits_never_exist():
    (hidden_TD, head_VD, _), target_T = inputs(300, 400, 8, 1, torch.float32, seed=4)
    hidden_TD.requires_grad_(), head_VD.requires_grad_()
    for options in (dict(entropy=True), dict(frozen_head=True)):
        with running("torch"), NoLargeTensor(300 * 400 // 2):
            out = linear_logprob(hidden_TD, head_VD, target_T, workspace_mb=0.25, **options)
            (
                out.logp.sum() + out.entropy.sum() if out.entropy is not None else out.logp.sum()
            ).backward()
    with pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 400 // 2):
        linear_logprob_ref(hidden_TD, head_VD, target_T)


@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_head_gets_no_gradient_and_a_graph_goes_backward_twice(path):
    (hidden_TD, head_VD, _), target_T = inputs(3, 20, 4, 1, torch.float32, seed=5)
    hidden_TD.requires_grad_(), head_VD.requires_grad_()
    head_VD.grad = torch.ones_like(head_VD)  # as a tied embedding has left it
    with running(path, 16):
        total = linear_logprob(hidden_TD, head_VD, target_T, frozen_head=True).logp.sum()
        total.backward(retain_graph=True)
        once = hidden_TD.grad.clone()
        total.backward()
        assert (
            (head_VD.grad == 1).all()
            and (once != 0).any()
            and torch.equal(hidden_TD.grad, 2 * once)
        )
        total = linear_logprob(hidden_TD, head_VD, target_T).logp.sum()
        total.backward(retain_graph=True)
        once = head_VD.grad - 1
        total.backward()
    assert (once != 0).any()
    torch.testing.assert_close(head_VD.grad - 1, 2 * once)


def test_views_give_what_their_copies_give():
    (hidden_TD, head_VD, _), target_T = inputs(8, 40, 12, 1, torch.float32, seed=6)
    view = hidden_TD[::2, ::2], head_VD.t().contiguous().t()[:, ::2], target_T[::2]
    copy = tuple(x.contiguous() for x in view)
    for path in PATHS:
        with running(path, 16):
            a, b = (linear_logprob(*x, entropy=True) for x in (view, copy))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def on_slices(tensors, target, cases):
    from torch import distributed as dist

    results = []
    for path, edges, options in cases:
        start, end = edges[dist.get_rank()], edges[dist.get_rank() + 1]
        head_VD, bias_V = (t[start:end] for t in tensors[1:])
        shard = VocabShard(dist.group.WORLD.group_name, start)
        with running(path, 16):
            if options.get("frozen_head"):
                x_TD = tensors[0].clone().requires_grad_()
                logp_T = linear_logprob(
                    x_TD, head_VD, target[:, 0], bias=bias_V, shard=shard, vocab_size=33, **options
                ).logp
                results.append(
                    (
                        [logp_T.detach()],
                        torch.autograd.grad(
                            (logp_T * torch.arange(4.0, device=DEVICE)).sum(), x_TD
                        ),
                    )
                )
            else:
                results.append(
                    run(
                        linear_logprob,
                        (tensors[0], head_VD, bias_V),
                        target,
                        torch.float64,
                        shard=shard,
                        vocab_size=33,
                        **options,
                    )
                )
    return results


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks, in the interpreter")
def test_slices_of_a_vocabulary_are_the_whole_one():
    """Uneven slices, one of padding only (33 on), chunks of one row, a frozen head."""
    tensors, target_TK = inputs(4, 40, 5, 3, torch.float64, seed=7)
    target_TK = target_TK.clamp(max=33)
    target_TK[1] = -1
    cases = [
        (path, edges, options)
        for path in PATHS
        for edges, options in (
            ((0, 20, 40), dict(entropy=True, workspace_mb=0.001, **OPTIONS)),
            ((0, 33, 40), dict(entropy=True)),
            ((0, 20, 33), dict(frozen_head=True)),
        )
    ]
    left, right = run_on_ranks(on_slices, tensors, target_TK, cases)
    for (_, _, options), (out, grads), (out_2, grads_2) in zip(cases, left, right, strict=True):
        same = {k: v for k, v in options.items() if k in OPTIONS}
        if "frozen_head" in options:
            x_TD = tensors[0].clone().requires_grad_()
            want = linear_logprob_ref(
                x_TD, tensors[1], target_TK[:, 0], bias=tensors[2], vocab_size=33
            ).logp
            want, true_grads = (
                [want.detach()],
                torch.autograd.grad((want * torch.arange(4.0, device=DEVICE)).sum(), x_TD),
            )
        else:
            want, true_grads = run(
                linear_logprob_ref, tensors, target_TK, torch.float64, vocab_size=33, **same
            )
        for a, b, c in zip(out, out_2, want, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
        assert torch.equal(grads[0], grads_2[0])
        torch.testing.assert_close(grads[0], true_grads[0], rtol=1e-11, atol=1e-12)
        for a, b, c in zip(grads[1:], grads_2[1:], true_grads[1:], strict=True):
            torch.testing.assert_close(torch.cat([a, b]), c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    (x_TD, w_VD, b_V), target_TK = inputs(3, 20, 4, 2, torch.float32, seed=7)
    target_TK, rows_M = target_TK.clamp(max=19), torch.tensor([2, 0], device=DEVICE)
    leaves = [t.requires_grad_() for t in (x_TD, w_VD, b_V)]
    options = 1.0, True, 20, "", 0, 1200.0
    direct = target_TK[:, :1].contiguous(), None, 1.0, False, *options[2:]
    with running(path, 16):
        torch.library.opcheck(_op, (*leaves, 1.0, 0.0, target_TK, rows_M, *options, False))
        torch.library.opcheck(_op, (x_TD, w_VD.detach(), None, 1.0, 0.0, *direct, True))
        plain = *(t.detach() for t in leaves), 1.0, 0.0, target_TK, None
        logp, lse, entropy, top, log_s, _ = _op(*plain, *options, False)
        grads, saved = (logp, lse, entropy), (top, log_s, entropy)
        backward = *grads, *plain, *saved, 1.0, *options[2:], [True, True, True]
        torch.library.opcheck(_op_backward, backward)


def test_compiles_into_one_graph_and_under_autocast():
    tensors, target_T = inputs(3, 20, 4, 1, torch.float32, seed=9)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    for options in (dict(entropy=True, rows=torch.tensor([1, 2], device=DEVICE)), {}):
        want, got = (
            run(fn, tensors, target_T, torch.float32, **options)
            for fn in (linear_logprob, compiled)
        )
        with torch.autocast(DEVICE, torch.bfloat16):
            half = run(compiled, tensors, target_T, torch.float32, **options)
        for a, b, c in zip(
            (*want[0], *want[1]), (*got[0], *got[1]), (*half[0], *half[1]), strict=True
        ):
            assert torch.equal(a, b) and a.dtype == c.dtype
            torch.testing.assert_close(a, c, rtol=0.1, atol=0.1)
        assert not torch.equal(want[0][0], half[0][0])


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(hidden_TD=torch.zeros(2, 3, 4, device=DEVICE)), "Flatten batch and time"),
        (dict(head_VD=torch.zeros(5, 3, device=DEVICE)), r"want \[T, D\] and \[V, D\]"),
        (
            dict(head_VD=torch.zeros(5, 4, dtype=torch.bfloat16, device=DEVICE)),
            "want one floating dtype",
        ),
        (dict(target=torch.zeros(3, dtype=torch.long, device=DEVICE)), "for 2 rows"),
        (dict(target=torch.zeros(2, device=DEVICE)), "want integers"),
        (dict(target=torch.zeros(2, 0, dtype=torch.long, device=DEVICE)), "K >= 1"),
        (dict(temperature=0.0), "take the argmax"),
        (dict(vocab_size=6), "1 <= vocab_size <= rows"),
        (dict(softcap=-1.0), "None for no cap"),
        (dict(logit_scale=0.0), "want > 0"),
        (dict(bias=torch.zeros(4, device=DEVICE)), "for a head of 5 rows"),
        (dict(rows=torch.zeros(2, device=DEVICE)), "distinct row numbers"),
        (dict(shard=VocabShard("", 0)), "size of the whole vocabulary"),
    ],
)
def test_mistakes_say_how_to_fix_them(change, match):
    args = dict(
        hidden_TD=torch.zeros(2, 4, device=DEVICE),
        head_VD=torch.zeros(5, 4, device=DEVICE),
        target=torch.zeros(2, dtype=torch.long, device=DEVICE),
    )
    with pytest.raises(ValueError, match=match):
        linear_logprob(**(args | change))
