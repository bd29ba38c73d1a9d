"""topk_tail_kl on both paths: float64 parity, edges (T5), how it runs, refusals.

The laws of its tails are in test_tail_laws.py.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from close import DEVICE, PATHS, NoLargeTensor, assert_compiles, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks
from topk_cases import ALLOWED, PROPER, floats, pad_some, randn, run, signed_weights, top_k
from torch._subclasses.fake_tensor import FakeTensorMode

from reflux.kernels import _triton
from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._parallel import VocabShard
from reflux.kernels.token_kl import token_kl
from reflux.kernels.topk_tail_kl import _op, topk_tail_kl, topk_tail_kl_ref

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = dict(
    beta=st.sampled_from([0.25, 0.9]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    scale_t2=st.booleans(),
)
both_paths = pytest.mark.parametrize("path", PATHS)
each_proper = pytest.mark.parametrize("divergence, tail", PROPER)
topk_tail = partial(topk_tail_kl, allow_drop=True)


@both_paths
@given(
    T=st.integers(0, 4),
    V=st.one_of(st.integers(2, 300), st.sampled_from([15, 16, 17, 127, 128, 129])),
    K=st.integers(2, 9),
    case=st.sampled_from(ALLOWED),
    dtype=st.sampled_from(DTYPES),
    drawn=st.fixed_dictionaries(OPTIONS),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    pads=st.booleans(),
    padded=st.integers(0, 3),
    rows=st.booleans(),
    block_v=st.sampled_from([64, 256, 2048]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_values_and_gradients_match_the_definition(
    path, T, V, K, case, dtype, drawn, scale, pads, padded, rows, block_v, workspace_mb, seed
):
    (divergence, tail), K = case, min(K, V)
    ids_TK, logp_TK, tail_T = top_k(randn(T, V, seed=seed), K, drawn["temperature"])
    if pads:
        ids_TK, logp_TK = pad_some(ids_TK, logp_TK, V)
    topk = ids_TK, logp_TK if dtype == torch.float64 else logp_TK.float(), tail_T.to(torch.float32)
    junk_TP = randn(T, padded, seed=seed) + 50  # T15
    z_TV = torch.cat([randn(T, V, seed=seed + 1) * scale, junk_TP], 1).to(dtype)
    options = drawn | dict(
        divergence=divergence,
        tail=tail,
        vocab_size=V,
        weight=signed_weights(T, seed),
        rows=torch.arange(T, device=DEVICE)[::2].flip(0) if rows else None,
    )
    with running(path, block_v):
        got = run(topk_tail, [z_TV], topk, dtype, workspace_mb=workspace_mb, **options)
    same_dtype = run(topk_tail_kl_ref, [z_TV], topk, dtype, **options)
    truth = run(topk_tail_kl_ref, [z_TV], topk, torch.float64, **options)
    for what, a, b, c in zip(("total", "kl", "dlogits"), got, same_dtype, truth, strict=True):
        assert_no_worse(a, b, c, what)
    assert (got[2][:, V:] == 0).all() and (not rows or (got[2][1::2] == 0).all())


@both_paths
@pytest.mark.parametrize("divergence, tail", ALLOWED)
def test_gradcheck(path, divergence, tail):  # T3
    topk = top_k(randn(3, 20, seed=1), 4, 2.0)
    with running(path, 64):
        torch.autograd.gradcheck(
            lambda z_TV: (
                topk_tail(
                    z_TV, *topk, divergence=divergence, tail=tail, beta=0.25, temperature=2.0
                ).total
            ),
            randn(3, 20, seed=2).requires_grad_(),
            fast_mode=True,
        )


# T5: edges
@both_paths
def test_a_tiny_tail_keeps_its_gradient(path):
    """log(1 - sum p) in fp32 has nothing left at 1e-9; knocking out the support loses no digit."""
    z_1V = torch.zeros(1, 100, device=DEVICE)
    z_1V[0, :2] = 25.0
    topk = (
        torch.tensor([[0, 1]], device=DEVICE),
        torch.tensor([[0.3, 0.7 - 2e-9]], device=DEVICE).log(),
        torch.tensor([2e-9], device=DEVICE).log(),
    )
    exact_V = z_1V[0].double().softmax(0)
    with running(path, 32):
        _, _, dz_1V = run(topk_tail, [z_1V], topk, torch.float32)
    want = -0.7 * exact_V[2] * (1 - 2e-9 / exact_V[2:].sum())  # p_i - q_tail p_i / p_tail
    assert abs(dz_1V[0, 2].item() - want.item()) < 1e-5 * abs(want.item())


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence, tail", ALLOWED)
# T5: P or Q -> 0 and 1, logits of 1e4, ties, all padded
def test_extreme_masses_stay_finite(path, divergence, tail, dtype):
    V, K = 40, 4
    z_TV, u_TV = torch.zeros(6, V, device=DEVICE), torch.zeros(6, V, device=DEVICE)
    z_TV[0, :K], u_TV[1, :K] = 80, 80  # all of Q, of P in the support
    z_TV[2, K:], u_TV[2] = 1e4, 0  # none of Q
    z_TV[3], u_TV[3] = 1e4, -1e4  # constant rows: ties everywhere
    z_TV[4, 7], u_TV[4, 2] = 60, 60  # one-hot on both sides
    topk = [x.to(DEVICE) for x in top_k(u_TV, K)]
    topk[0][:3] = torch.arange(K, device=DEVICE)
    topk[1] = (u_TV.double().log_softmax(1)).to(DEVICE).gather(1, topk[0].long())
    topk[2] = (
        u_TV.double().log_softmax(1).to(DEVICE).scatter(1, topk[0].long(), -torch.inf).logsumexp(1)
    )
    topk[0][5] = -1
    topk = floats(topk)
    with running(path, 64):
        _, kl_T, dz_TV = run(
            topk_tail, [z_TV.to(DEVICE)], topk, dtype, divergence=divergence, tail=tail, beta=0.25
        )
    truth = run(
        topk_tail_kl_ref,
        [z_TV.to(DEVICE).to(dtype)],
        topk,
        torch.float64,
        divergence=divergence,
        tail=tail,
        beta=0.25,
    )
    assert (
        kl_T.isfinite().all() and dz_TV.isfinite().all() and kl_T[5] == 0 and (dz_TV[5] == 0).all()
    )
    torch.testing.assert_close(kl_T.double(), truth[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dz_TV.double(), truth[2], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-6
    )


@both_paths
@given(divergence=st.sampled_from(DIVERGENCES), seed=SEEDS)
def test_close_distributions_keep_their_gradient(path, divergence, seed):
    """Maximum and log-sum stay apart: near p = q, far from 0, their sum would lose most digits."""
    z_TV = randn(2, 60, seed=seed, dtype=torch.float32) + 500
    topk = floats(top_k(z_TV + 1e-2 * randn(2, 60, seed=seed + 1), 6))
    with running(path, 64):
        _, _, dz_TV = run(topk_tail, [z_TV], topk, torch.float32, divergence=divergence)
    truth = run(topk_tail_kl_ref, [z_TV], topk, torch.float64, divergence=divergence)[2]
    assert (dz_TV - truth).norm() < 1e-4 * truth.norm()


@both_paths
# 1 - sum p is 1e-8, not 0, in fp32
def test_a_rounded_tail_at_the_whole_vocabulary_is_no_tail(path):
    z_TV, u_TV = randn(2, 20, seed=7), randn(2, 20, seed=8)
    ids_TK, logp_TK, _ = top_k(u_TV, 20)
    with running(path, 64):
        kl_T = topk_tail(z_TV, ids_TK, logp_TK, torch.full((2,), -18.0, device=DEVICE)).kl
        torch.testing.assert_close(kl_T, token_kl(z_TV, u_TV).kl)


@both_paths
@pytest.mark.parametrize("divergence, tail", ALLOWED)
def test_banned_tokens_leave_everything_finite(path, divergence, tail):  # T16
    z_TV, u_TV = (
        randn(2, 50, seed=4, dtype=torch.float32),
        randn(2, 50, seed=5, dtype=torch.float32),
    )
    z_TV[:, 10:40] = u_TV[:, 10:40] = -torch.inf
    topk = floats(top_k(u_TV, 3))
    with running(path, 32):
        _, kl_T, dz_TV = run(
            topk_tail, [z_TV], topk, torch.float32, divergence=divergence, tail=tail
        )
    assert kl_T.isfinite().all() and dz_TV.isfinite().all() and dz_TV.abs().max() > 1e-3
    assert (dz_TV[:, 10:40] == 0).all() and (dz_TV.sum(1).abs() < 1e-6).all()


@both_paths
@pytest.mark.parametrize("tail", ["bucket", "renorm", "sampled"])
def test_a_banned_token_of_the_topk_is_reported_and_left_out(path, tail):
    """Forward KL is inf where the student bans a top-k id; NaN is reported, too. Row 2 is fine."""
    z_TV, topk = randn(3, 30, seed=6, dtype=torch.float32), floats(top_k(randn(3, 30, seed=7), 3))
    z_TV[0, topk[0][0, 1]], topk[1][1, 0] = -torch.inf, torch.nan
    with running(path, 64):
        total, kl_T, dz_TV = run(topk_tail, [z_TV], topk, torch.float32, tail=tail)
        alone = run(topk_tail, [z_TV[2:]], [x[2:] for x in topk], torch.float32, tail=tail)
        without = topk_tail(
            z_TV, *topk, tail=tail, weight=torch.tensor([0.0, 0, 1], device=DEVICE)
        ).total
    assert kl_T[0].isinf() and kl_T[1].isnan() and total.isnan() and (dz_TV[:2] == 0).all()
    torch.testing.assert_close((kl_T[2:], dz_TV[2:]), tuple(alone[1:]))
    torch.testing.assert_close(without, kl_T[2])  # weight 0 leaves a row out of the total


def test_duplicate_and_foreign_ids_are_refused_in_debug_mode():  # T5
    ids_TK, logp_TK, tail_T = top_k(randn(2, 9, seed=2), 3)
    with patch.object(_triton, "DEBUG", True):
        topk_tail(randn(2, 9, seed=1), ids_TK, logp_TK, tail_T)
        for wrong, match in ((ids_TK[:, :1].expand(2, 3), "twice"), (ids_TK + 7, "below 9")):
            with pytest.raises(ValueError, match=match):
                topk_tail(randn(2, 9, seed=1), wrong, logp_TK, tail_T)


# how it runs
@both_paths
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_the_same_bits_every_time_in_every_chunk_and_block(path, tail):
    z_TV, topk = (
        randn(5, 150, seed=9, dtype=torch.float32),
        floats(top_k(randn(5, 150, seed=10), 7)),
    )
    with running(path, 64):
        first, again, chunked = (
            run(
                topk_tail, [z_TV], topk, torch.float32, divergence="jsd", tail=tail, workspace_mb=mb
            )
            for mb in (1200, 1200, 0.0001)
        )
    for a, b, c in zip(first[1:], again[1:], chunked[1:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@both_paths
def test_the_logits_are_left_alone(path):
    z_TV, topk = randn(4, 30, seed=11, dtype=torch.float32), top_k(randn(4, 30, seed=12), 3)
    before, leaf = z_TV.clone(), z_TV.detach().requires_grad_()
    with running(path, 64), torch.no_grad():
        topk_tail(z_TV, *topk)
    with running(path, 64):
        total = topk_tail(leaf * 1, *topk).total
        total.backward(retain_graph=True)
        first_TV = leaf.grad.clone()
        total.backward()
    assert torch.equal(z_TV, before)
    torch.testing.assert_close(leaf.grad, 2 * first_TV)  # a retained graph goes backward again


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0], device=DEVICE)])
def test_in_place_the_gradient_takes_the_memory_of_the_logits(path, dtype, rows):
    z_TV, topk = (
        randn(4, 30, seed=11, dtype=dtype).requires_grad_(),
        top_k(randn(4, 28, seed=12), 3),
    )
    options = dict(
        divergence="jsd",
        vocab_size=28,
        weight=signed_weights(4, 13),
        rows=rows if rows is None else rows.to(DEVICE),
    )
    with running(path, 64):
        want = run(topk_tail, [z_TV], topk, dtype, **options)
        logits_TV = z_TV * 1
        held = logits_TV.detach()
        out = topk_tail(logits_TV, *topk, inplace=True, **options)
        (got_TV,) = torch.autograd.grad(out.total * -0.7, z_TV, retain_graph=True)
    torch.testing.assert_close((out.total, out.kl, got_TV), tuple(want))
    torch.testing.assert_close(held, want[2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.total.backward()


def test_in_place_is_refused_where_it_would_destroy():
    topk, leaf = top_k(randn(3, 20, seed=1), 4), randn(3, 20, seed=2).requires_grad_()
    with running("torch"):
        for z_TV, match in (
            (leaf, "overwrite a leaf"),
            ((leaf[:1] * 1).expand(3, 20), "overlap"),
            ((leaf * 1).half(), "float16"),
        ):
            with pytest.raises(ValueError, match=match):
                topk_tail(z_TV, *topk, inplace=True)
        with torch.no_grad():
            before = leaf.detach().clone()
            topk_tail(leaf, *topk, inplace=True)  # nobody wants a gradient: nothing to write
        assert torch.equal(leaf, before)
        probabilities = leaf.softmax(1)  # its backward needs its result
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            topk_tail(probabilities, *topk, inplace=True).total.backward()


# T25; of the op's body alone: its own result may be as large
def test_only_the_gradient_is_as_large_as_the_logits():
    z_TV, topk = randn(300, 400, seed=13, dtype=torch.float32), top_k(randn(300, 400, seed=14), 8)
    options = (
        torch.ones(300, device=DEVICE),
        None,
        "jsd",
        0.5,
        1.0,
        False,
        "bucket",
        400,
        "",
        0,
        0.25,
    )
    args = z_TV, *floats(topk), *options
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        _op._init_fn(*args, False)
    with running("torch"), LargeTensors(300 * 400 // 2) as large:
        _op._init_fn(*args, True)
    assert large.made == ["aten.new_empty.default", "aten.fill_.Scalar"]  # the second is the poison


class LargeTensors(NoLargeTensor):
    """Notes them instead of failing."""

    def __init__(self, limit: int):
        super().__init__(limit)
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except AssertionError:
            self.made.append(str(func))
            return func(*args, **(kwargs or {}))


def arguments(divergence="forward", tail="bucket"):
    z_TV = randn(3, 20, seed=16, dtype=torch.float32).requires_grad_()
    options = signed_weights(3, 17), None, divergence, 0.5, 1.0, False, tail, 20, "", 0, 1200.0
    return z_TV, *floats(top_k(randn(3, 20, seed=15), 4)), *options, True


@both_paths
def test_the_op_keeps_torch_librarys_contract(path):
    with running(path, 64):
        torch.library.opcheck(_op, arguments())


def test_nothing_waits_for_the_device():
    """Fake tensors have no values to wait for: reading one raises."""
    with running("torch"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = [
            mode.from_tensor(x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments()
        ]
        for rows_M in (None, torch.arange(2, device=DEVICE)):
            _, kl_T, dz_TV = _op._init_fn(*args[:5], rows_M, *args[6:])
            assert kl_T.shape == (3,) and dz_TV.shape == (3, 20)


def test_it_compiles_into_a_full_graph():
    topk = top_k(randn(3, 20, seed=18), 4)
    rows_M = torch.tensor([2, 0], device=DEVICE)
    options = dict(divergence="jsd", rows=rows_M, scale_t2=True, temperature=2.0)

    def loss(z_TV):
        return topk_tail_kl(z_TV * 2, *topk, **options).total * 3

    assert_compiles(loss, [randn(3, 20, seed=19).requires_grad_()])


def on_a_slice(path: str, cuts: list[int], z_TV, topk, weight_T, cases) -> list:
    start, end = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    shard = VocabShard(dist.group.WORLD.group_name, start)
    with running(path, 64):
        return [
            run(
                topk_tail,
                [z_TV[:, start:end]],
                topk,
                z_TV.dtype,
                divergence=divergence,
                tail=tail,
                weight=weight_T,
                shard=shard,
                vocab_size=37,
                workspace_mb=0.0005,
            )
            for divergence, tail in cases
        ]


@both_paths
@pytest.mark.parametrize("cuts", [[0, 23, 40], [0, 37, 40]], ids=["uneven", "a slice of padding"])
def test_slices_of_the_vocabulary_give_what_the_whole_gives(path, cuts):
    T, V = 3, 37
    z_TV, (ids_TK, logp_TK, tail_T) = randn(T, 40, seed=20), top_k(randn(T, V, seed=21), 6)
    topk, weight_T = (*pad_some(ids_TK, logp_TK, V), tail_T), signed_weights(T, 22)
    cases = (
        [*PROPER, ("forward", "sampled")]
        if cuts[1] == 23
        else [("jsd", "bucket"), ("reverse", "renorm")]
    )
    ranks = run_on_ranks(on_a_slice, path, cuts, z_TV, topk, weight_T, cases)
    for (divergence, tail), *parts in zip(cases, *ranks, strict=True):
        with running("torch"):
            whole = run(
                topk_tail,
                [z_TV],
                topk,
                torch.float64,
                divergence=divergence,
                tail=tail,
                weight=weight_T,
                vocab_size=V,
            )
        for part in parts:
            torch.testing.assert_close(part[:2], whole[:2], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(
            torch.cat([part[2] for part in parts], 1), whole[2], rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(tail="tail"), "want one of bucket"),
        (
            dict(
                tail="renorm",
                ids_TK=torch.zeros(2, 1, dtype=torch.int32, device=DEVICE),
                teacher_logp_TK=torch.zeros(2, 1, device=DEVICE),
            ),
            "K = 1",
        ),
        (dict(tail="drop"), "allow_drop=True"),
        (dict(tail="zero_outside_topk", divergence="reverse"), "is infinite: the student has"),
        (dict(teacher_tail_T=None), "teacher_topk returns it"),
        (dict(teacher_tail_T=torch.zeros(3, device=DEVICE)), r"want \[T\]"),
        (
            dict(
                ids_TK=torch.zeros(2, 6, dtype=torch.int32, device=DEVICE),
                teacher_logp_TK=torch.zeros(2, 6, device=DEVICE),
            ),
            "1 <= K <= V",
        ),
        (dict(teacher_logp_TK=torch.zeros(2, 3, device=DEVICE)), r"want \[T, K\] both"),
        (dict(teacher_logp_TK=torch.zeros(2, 2, device=DEVICE).bfloat16()), "want float32"),
        (dict(ids_TK=torch.zeros(2, 2, device=DEVICE)), "want int32 or int64"),
        (dict(temperature=0.0), "want > 0"),
        (dict(temperature=2.0, teacher_temperature=1.0), "do not give the tail"),
        (dict(student_logits_TV=torch.zeros(2, 1, 5, device=DEVICE)), "Flatten first"),
        (dict(student_logits_TV=torch.zeros(5, 2, device=DEVICE).t()), "dense"),
        (dict(vocab_size=6), "vocab_size <= columns"),
        (dict(shard=VocabShard("g", 0)), "size of the whole vocabulary"),
        (dict(rows=torch.ones(2, device=DEVICE)), "int64"),
    ],
)
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(
        student_logits_TV=torch.zeros(2, 5, device=DEVICE),
        ids_TK=torch.zeros(2, 2, dtype=torch.int32, device=DEVICE),
        teacher_logp_TK=torch.zeros(2, 2, device=DEVICE),
        teacher_tail_T=torch.zeros(2, device=DEVICE),
    )
    with pytest.raises(ValueError, match=match):
        topk_tail_kl(**(args | options))
    assert topk_tail_kl_ref(**args).kl.shape == (2,)
