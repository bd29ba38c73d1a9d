"""renormalised_topk_kl on both paths: float64 parity, the chunked path's values, no [T, V]."""

import pytest
import torch
import torch.distributed as dist
from close import DEVICE, PATHS, NoLargeTensor, assert_compiles, assert_losses_close, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks
from topk_cases import (
    assert_gradient_no_worse,
    pad_some,
    randn,
    run,
    signed_weights,
    student,
    top_k,
    with_bias,
    with_junk,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.renormalised_topk_kl import (
    _op,
    gather_is_cheaper,
    renormalised_topk_kl,
    renormalised_topk_kl_ref,
)

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# the interpreter truncates bf16
GRAD = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
OPTIONS = dict(
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    scale_t2=st.booleans(),
)
both_paths = pytest.mark.parametrize("path", PATHS)


def topk_of(T, V, K, seed, dtype=torch.float64, temperature=1.0):
    ids_TK, logp_TK, _ = top_k(randn(T, V, seed=seed), K, temperature)
    return ids_TK, logp_TK.to(dtype)


@both_paths
@given(
    T=st.integers(0, 4),
    V=st.integers(2, 60),
    D=st.sampled_from([1, 7, 16, 33]),
    K=st.integers(2, 40),
    dtype=st.sampled_from(list(LOSS)),
    drawn=st.fixed_dictionaries(OPTIONS),
    pads=st.booleans(),
    rows=st.booleans(),
    transposed=st.booleans(),
    block_v=st.sampled_from([64, 256, 2048]),
    seed=st.integers(0, 2**31 - 1),
)
def test_values_and_gradients_match_float64(
    path, T, V, D, K, dtype, drawn, pads, rows, transposed, block_v, seed
):
    K, (x_TD, w_VD, b_V) = min(K, V), student(T, V, D, seed, dtype)
    w_VD, b_V = with_junk(w_VD, b_V)
    if transposed:
        x_TD, w_VD = (t.t().contiguous().t() for t in (x_TD, w_VD))
    leaves, wide = [x_TD, w_VD, b_V], torch.promote_types(dtype, torch.float32)
    topk = topk_of(T, V, K, seed + 3, wide, drawn["temperature"])
    topk = pad_some(*topk, V) if pads else topk
    options = drawn | dict(
        beta=0.25,
        weight=signed_weights(T, seed),
        vocab_size=V,
        rows=torch.arange(T, device=DEVICE)[::2].flip(0) if rows else None,
    )
    with running(path, block_v):
        got = run(with_bias(renormalised_topk_kl), leaves, topk, dtype, **options)
    same_dtype = run(with_bias(renormalised_topk_kl_ref), leaves, topk, dtype, **options)
    truth = run(with_bias(renormalised_topk_kl_ref), leaves, topk, torch.float64, **options)
    assert_losses_close(got, truth, LOSS[dtype])
    for what, a, b, c in zip(
        ("dhidden", "dhead", "dbias"), got[2:], same_dtype[2:], truth[2:], strict=True
    ):
        assert_gradient_no_worse(a, b, c, what, GRAD[dtype])
    assert (
        (got[3][V:] == 0).all()
        and (got[4][V:] == 0).all()
        and (not rows or (got[2][1::2] == 0).all())
    )


@both_paths
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(path, divergence):  # T3
    topk = topk_of(3, 20, 5, 1, temperature=2.0)
    with running(path, 256):
        torch.autograd.gradcheck(
            lambda *s: (
                with_bias(renormalised_topk_kl)(
                    *s,
                    *topk,
                    divergence=divergence,
                    beta=0.25,
                    temperature=2.0,
                    softcap=3.0,
                    weight=signed_weights(3, 2),
                ).total
            ),
            [t.requires_grad_() for t in student(3, 20, 4, 3)],
            fast_mode=True,
        )


@both_paths
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("K", [3, 20], ids=["some", "the whole vocabulary"])
def test_it_equals_the_chunked_path(path, divergence, K):
    tensors, (ids_TK, logp_TK) = student(4, 20, 6, 4), topk_of(4, 20, K, 7)
    options = dict(divergence=divergence, weight=signed_weights(4, 8), softcap=3.0)
    with running(path, 256):
        got = run(
            with_bias(renormalised_topk_kl), tensors, (ids_TK, logp_TK), torch.float64, **options
        )
        want = run(
            with_bias(linear_topk_kl),
            tensors,
            (ids_TK, logp_TK),
            torch.float64,
            tail="renorm",
            **options,
        )
    assert not gather_is_cheaper(K, 20)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@both_paths
def test_a_head_row_sums_over_every_token_with_its_id(path):
    """One id in all of 40 rows, more than a tile of pairs; another in none."""
    x_TD, w_VD, _ = student(40, 6, 3, 9)
    ids_TK = torch.tensor([[0, 1], [0, 2], [3, 0], [0, 4]], device=DEVICE).repeat(10, 1)
    topk = ids_TK, randn(40, 2, seed=10)
    with running(path, 128):
        got = run(renormalised_topk_kl, [x_TD, w_VD], topk, torch.float64, divergence="reverse")
    truth = run(renormalised_topk_kl_ref, [x_TD, w_VD], topk, torch.float64, divergence="reverse")
    torch.testing.assert_close(got[3], truth[3], rtol=1e-11, atol=1e-13)
    assert (got[3][5] == 0).all() and got[3][0].abs().max() > 1e-2


@both_paths
@pytest.mark.parametrize("divergence", DIVERGENCES)
# one live id, none, a student equal to its teacher
def test_what_has_no_choice_has_no_loss(path, divergence):
    x_TD, w_VD, _ = student(3, 12, 4, 11)
    ids_TK, logp_TK = topk_of(3, 12, 3, 12)
    ids_TK[0, 1:], ids_TK[1] = -1, 12
    logp_TK[2] = (x_TD[2] @ w_VD[ids_TK[2].long()].t()) + 5  # up to a constant of the row
    with running(path, 128):
        out = run(
            renormalised_topk_kl,
            [x_TD, w_VD],
            (ids_TK, logp_TK),
            torch.float64,
            divergence=divergence,
        )
    assert max(t.abs().max() for t in out) < 1e-13


@both_paths
def test_a_row_that_is_not_finite_is_reported_and_left_out(path):
    (x_TD, w_VD, _), (ids_TK, logp_TK) = (
        student(3, 12, 4, 13, torch.float32),
        topk_of(3, 12, 3, 14, torch.float32),
    )
    logp_TK[1, 0] = torch.nan
    with running(path, 128):
        total, kl_T, dx_TD, dw_VD = run(
            renormalised_topk_kl, [x_TD, w_VD], (ids_TK, logp_TK), torch.float32
        )
        others = run(
            renormalised_topk_kl, [x_TD[::2], w_VD], (ids_TK[::2], logp_TK[::2]), torch.float32
        )
    assert total.isnan() and kl_T[1].isnan() and (dx_TD[1] == 0).all()
    torch.testing.assert_close((kl_T[::2], dx_TD[::2], dw_VD), tuple(others[1:]))


@both_paths
def test_the_same_bits_every_time_and_for_any_other_rows(path, monkeypatch):
    """No atomics; a row's result does not depend on its neighbours, chosen rows or CPU pieces."""
    (x_TD, w_VD, _), topk = (
        student(5, 30, 20, 15, torch.float32),
        topk_of(5, 30, 7, 16, torch.float32),
    )
    rows = torch.tensor([4, 1], device=DEVICE)
    with running(path, 128):
        first, again = (
            run(renormalised_topk_kl, [x_TD, w_VD], topk, torch.float32, divergence="jsd")
            for _ in range(2)
        )
        some = run(
            renormalised_topk_kl, [x_TD, w_VD], topk, torch.float32, divergence="jsd", rows=rows
        )
        monkeypatch.setattr("reflux.kernels.renormalised_topk_kl.CPU_CHUNK_BYTES", 1)
        pieces = run(renormalised_topk_kl, [x_TD, w_VD], topk, torch.float32, divergence="jsd")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], pieces[1]) and torch.equal(first[1][rows], some[1][rows])


def arguments(T=3, V=20, D=4, K=4):
    x_TD, w_VD, b_V = (t.requires_grad_() for t in student(T, V, D, 17, torch.float32))
    topk = topk_of(T, V, K, 18, torch.float32)
    options = signed_weights(T, 19), None, "jsd", 0.5, 1.0, False, V, "", 0
    return x_TD, w_VD, b_V, 1.0, 3.0, *topk, *options, True, True, True


# T25; a dispatch mode does not see inside an op
def test_neither_logits_nor_gathered_rows_exist_as_a_whole():
    # T K D = 2.6 M, T V = 4 M, V D = 1.3 M elements; a piece is 1 M
    T, V, D, K = 400, 10_000, 128, 50
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(T, V, D, K)]
    with running("torch"), NoLargeTensor(V * D + 1):
        _op._init_fn(*args)
    with running("torch"), pytest.raises(AssertionError, match="made"), NoLargeTensor(V * D + 1):
        renormalised_topk_kl_ref(args[0], args[1], args[5], args[6])


def test_it_reads_the_head_of_a_large_vocabulary_without_copying_it():
    """K of 262,144 rows: all it makes for hidden is [T, K] or [T, D], and no head gradient."""
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(2, 262_144, 8, 4)]
    with running("torch"), NoLargeTensor(10_000):
        _op._init_fn(*args[:-2], False, False)


@both_paths
def test_the_op_keeps_torch_librarys_contract(path):
    with running(path, 128):
        torch.library.opcheck(_op, arguments())


def test_nothing_waits_for_the_device():
    """Fake tensors have no values to wait for: reading one raises."""
    with running("torch"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = [
            mode.from_tensor(x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments()
        ]
        for rows_M in (None, torch.arange(2, device=DEVICE)):
            _, kl_T, *gradients = _op._init_fn(*args[:8], rows_M, *args[9:])
            shapes = [list(d.shape) for d in gradients]
            assert kl_T.shape == (3,) and shapes == [[3, 4], [20, 4], [20]]


def test_it_compiles_into_a_full_graph():
    topk, options = (
        topk_of(3, 20, 4, 20),
        dict(divergence="jsd", rows=torch.tensor([2, 0], device=DEVICE)),
    )

    def loss(x_TD, w_VD, b_V):
        return renormalised_topk_kl(x_TD * 2, w_VD, *topk, bias=b_V, **options).total * 3

    assert_compiles(loss, [t.requires_grad_() for t in student(3, 20, 4, 21)])


def test_who_gets_a_gradient():
    (x_TD, w_VD, b_V), topk = (
        (t.requires_grad_() for t in student(3, 20, 4, 22)),
        topk_of(3, 20, 4, 25),
    )
    with running("torch"):
        renormalised_topk_kl(x_TD, w_VD, *topk, bias=b_V, frozen_head=True).total.backward()
        assert x_TD.grad is not None and w_VD.grad is None and b_V.grad is None
        w_VD.grad = torch.ones_like(w_VD)  # a tied embedding's gradient is there first
        total = renormalised_topk_kl(x_TD.detach(), w_VD, *topk, bias=b_V).total
        total.backward(retain_graph=True)
        first_VD = w_VD.grad - 1
        total.backward()
        # a retained graph goes backward again
        torch.testing.assert_close(w_VD.grad, 1 + 2 * first_VD)
        assert first_VD.abs().max() > 1e-3 and b_V.grad is not None


@both_paths
def test_autocast_casts_as_a_linear_layer_does(path):
    (x_TD, w_VD, _), topk = (
        student(3, 20, 4, 26, torch.float32),
        topk_of(3, 20, 4, 27, torch.float32),
    )
    leaves = [t.detach().requires_grad_() for t in (x_TD, w_VD)]
    with running(path, 128):
        want = run(renormalised_topk_kl, [x_TD, w_VD], topk, torch.bfloat16)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = renormalised_topk_kl(*leaves, *topk)
        gradients = torch.autograd.grad(out.total * -0.7, leaves)
    assert torch.equal(out.kl, want[1]) and all(d.dtype == torch.float32 for d in gradients)
    torch.testing.assert_close(gradients, tuple(d.float() for d in want[2:]), rtol=1e-2, atol=1e-3)


def on_a_slice(path: str, cuts: list[int], tensors, topk, weight_T) -> list:
    start, end = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    shard, (x_TD, w_VD, b_V) = VocabShard(dist.group.WORLD.group_name, start), tensors
    with running(path, 128):
        return [
            run(
                with_bias(renormalised_topk_kl),
                [x_TD, w_VD[start:end], b_V[start:end]],
                topk,
                x_TD.dtype,
                divergence=divergence,
                weight=weight_T,
                shard=shard,
                vocab_size=17,
                softcap=3.0,
                logit_scale=0.5,
            )
            for divergence in ("forward", "jsd")
        ]


@both_paths
@pytest.mark.parametrize("cuts", [[0, 11, 20], [0, 20, 20]], ids=["uneven", "an empty slice"])
def test_slices_of_the_vocabulary_give_what_the_whole_gives(path, cuts):
    tensors, topk, weight_T = (
        student(3, 20, 5, 28),
        pad_some(*topk_of(3, 17, 6, 31), 17),
        signed_weights(3, 32),
    )
    ranks = run_on_ranks(on_a_slice, path, cuts, tensors, topk, weight_T)
    for divergence, *parts in zip(("forward", "jsd"), *ranks, strict=True):
        with running("torch"):
            whole = run(
                with_bias(renormalised_topk_kl),
                tensors,
                topk,
                torch.float64,
                divergence=divergence,
                weight=weight_T,
                vocab_size=17,
                softcap=3.0,
                logit_scale=0.5,
            )
        for part in parts:  # dhidden, too, is that of the whole vocabulary
            torch.testing.assert_close(part[:3], whole[:3], rtol=1e-11, atol=1e-13)
        for i in (3, 4):
            torch.testing.assert_close(
                torch.cat([part[i] for part in parts]), whole[i], rtol=1e-11, atol=1e-13
            )


@pytest.mark.parametrize(
    "options, match",
    [
        (
            dict(
                ids_TK=torch.zeros(2, 1, dtype=torch.int32, device=DEVICE),
                teacher_logp_TK=torch.zeros(2, 1, device=DEVICE),
            ),
            "K = 1",
        ),
        (
            dict(
                ids_TK=torch.zeros(2, 6, dtype=torch.int32, device=DEVICE),
                teacher_logp_TK=torch.zeros(2, 6, device=DEVICE),
            ),
            "1 <= K <= V",
        ),
        (dict(teacher_logp_TK=torch.zeros(2, 2, device=DEVICE).bfloat16()), "want float32"),
        (dict(divergence="jsd", beta=1.0), "use divergence='forward'"),
        (dict(temperature=2.0, teacher_temperature=1.0), "do not give the tail"),
        (dict(bias=torch.zeros(4, device=DEVICE)), "one a row"),
    ],
)
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(
        hidden_TD=torch.zeros(2, 4, device=DEVICE),
        head_VD=torch.zeros(5, 4, device=DEVICE),
        ids_TK=torch.zeros(2, 2, dtype=torch.int32, device=DEVICE),
        teacher_logp_TK=torch.zeros(2, 2, device=DEVICE),
    )
    with pytest.raises(ValueError, match=match):
        renormalised_topk_kl(**(args | options))
    assert renormalised_topk_kl_ref(**args).kl.shape == (2,)
