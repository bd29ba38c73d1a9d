"""topk_tail_kl on both paths: float64 parity, the laws T1-T5 that tell the four tails apart, refusals."""
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from close import DEVICE, PATHS, NoLargeTensor, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st
from kept import ALLOWED, PROPER, keep, pad_some, randn, run, signed_weights
from shards import run_on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from reflux.kernels import _triton
from reflux.kernels._divergence import MODES
from reflux.kernels._parallel import VocabShard
from reflux.kernels.token_kl import token_kl
from reflux.kernels.topk_tail_kl import _op, topk_tail_kl, topk_tail_kl_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about -inf - -inf in masked lanes
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
both_paths = pytest.mark.parametrize("path", PATHS)
each_proper = pytest.mark.parametrize("mode, tail", PROPER)
topk_tail = partial(topk_tail_kl, allow_drop=True)


@both_paths
@given(T=st.integers(0, 4), V=st.one_of(st.integers(2, 300), st.sampled_from([15, 16, 17, 127, 128, 129])),
       K=st.integers(2, 9), case=st.sampled_from(ALLOWED), dtype=st.sampled_from(DTYPES), beta=st.sampled_from([0.25, 0.9]),
       temperature=st.sampled_from([0.5, 1.0, 2.0]), scale=st.sampled_from([0.0, 1.0, 30.0]), pads=st.booleans(),
       padded=st.integers(0, 3), rows=st.booleans(), scale_t2=st.booleans(), block_v=st.sampled_from([64, 256, 2048]),
       workspace_mb=st.sampled_from([0.001, 1200]), seed=SEEDS)
def test_values_and_gradients_match_the_definition(path, T, V, K, case, dtype, beta, temperature, scale, pads, padded, rows,
                                                   scale_t2, block_v, workspace_mb, seed):
    (mode, tail), K = case, min(K, V)
    ids_TK, logp_TK, tail_T = keep(randn(T, V, seed=seed), K, temperature)
    if pads:
        ids_TK, logp_TK = pad_some(ids_TK, logp_TK, V)
    kept = ids_TK, logp_TK if dtype == torch.float64 else logp_TK.float(), tail_T.to(torch.float32)
    z_TV = torch.cat([randn(T, V, seed=seed + 1) * scale, randn(T, padded, seed=seed) + 50], 1).to(dtype)  # T15
    options = dict(mode=mode, tail=tail, beta=beta, temperature=temperature, scale_t2=scale_t2, vocab_size=V,
                   weight=signed_weights(T, seed), rows=torch.arange(T, device=DEVICE)[::2].flip(0) if rows else None)
    with running(path, block_v):
        got = run(topk_tail, [z_TV], kept, dtype, workspace_mb=workspace_mb, **options)
    same_dtype = run(topk_tail_kl_ref, [z_TV], kept, dtype, **options)
    truth = run(topk_tail_kl_ref, [z_TV], kept, torch.float64, **options)
    for what, a, b, c in zip(("total", "kl", "dlogits"), got, same_dtype, truth, strict=True):
        assert_no_worse(a, b, c, what)
    assert (got[2][:, V:] == 0).all() and (not rows or (got[2][1::2] == 0).all())


@both_paths
@pytest.mark.parametrize("mode, tail", ALLOWED)
def test_gradcheck(path, mode, tail):  # T3
    kept = keep(randn(3, 20, seed=1), 4, 2.0)
    with running(path, 64):
        torch.autograd.gradcheck(
            lambda z_TV: topk_tail(z_TV, *kept, mode=mode, tail=tail, beta=0.25, temperature=2.0).total,
            randn(3, 20, seed=2).requires_grad_(), fast_mode=True)


# T1, T2: what kind of number each tail is
@both_paths
@each_proper
def test_equal_distributions_have_no_loss_and_no_gradient(path, mode, tail):  # T1
    z_TV = randn(3, 60, seed=2)
    with running(path, 64):
        _, kl_T, dz_TV = run(topk_tail, [z_TV], keep(z_TV, 5), torch.float64, mode=mode, tail=tail)
    assert max(kl_T.abs().max(), dz_TV.abs().max()) < 1e-12


@given(case=st.sampled_from(PROPER), scale=st.sampled_from([0.1, 1.0, 20.0]), seed=SEEDS)
def test_a_proper_tail_is_never_negative(case, scale, seed):  # T1
    (mode, tail), z_TV = case, randn(3, 50, seed=seed, dtype=torch.float32) * scale
    with running("torch"):
        kl_T = topk_tail(z_TV, *(x.to(torch.promote_types(x.dtype, torch.int32)) for x in keep(randn(3, 50, seed=seed + 1), 6)),
                         mode=mode, tail=tail).kl
    assert (kl_T > -2e-6 * max(1, scale)).all()


@given(mode=st.sampled_from(MODES), V=st.integers(3, 80), seed=SEEDS)
def test_ghost_grows_with_the_support_up_to_the_full_divergence(mode, V, seed):  # T2
    z_TV, u_TV = randn(3, V, seed=seed), 2 * randn(3, V, seed=seed + 1)
    with running("torch"):
        full_T = token_kl(z_TV, u_TV, mode=mode).kl
        ghosts = [topk_tail(z_TV, *keep(u_TV, k), mode=mode).kl for k in (1, 2, 1 + V // 2, V - 1, V)]
    bounds = [torch.zeros_like(full_T), *ghosts, full_T]
    for smaller, larger in zip(bounds, bounds[1:]):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(ghosts[-1], full_T, rtol=1e-10, atol=1e-12)


@both_paths
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_ghost_is_renorm_times_the_mass_plus_the_kl_of_the_masses(path, mode):  # T2: D = P C + KL_bern, D_r = Q C_r + ...
    z_TV, kept = randn(4, 50, seed=1), keep(randn(4, 50, seed=2), 6)
    with running(path, 64):
        ghost_T, renorm_T = (topk_tail(z_TV, *kept, mode=mode, tail=t).kl for t in ("ghost", "renorm"))
    P_T, Q_T = kept[1].exp().sum(1), z_TV.softmax(1).gather(1, kept[0].long()).sum(1)
    a_T, b_T = (P_T, Q_T) if mode == "forward" else (Q_T, P_T)
    masses_T = a_T * (a_T / b_T).log() + (1 - a_T) * ((1 - a_T) / (1 - b_T)).log()
    torch.testing.assert_close(ghost_T, a_T * renorm_T + masses_T, rtol=1e-10, atol=1e-12)


# T3: gradients inside and outside the support, written by hand: teacher p with mass P, student q with mass Q in S
def closed_form(q_TV, p_TV, kept_TV, mode: str, tail: str):
    P_T1, Q_T1 = (torch.where(kept_TV, x, 0.0).sum(1, keepdim=True) for x in (p_TV, q_TV))
    if (mode, tail) in (("forward", "drop"), ("forward", "sampled")):
        return torch.where(kept_TV, P_T1 * q_TV - p_TV, P_T1 * q_TV)
    if mode == "forward" and tail == "renorm":
        return torch.where(kept_TV, q_TV / Q_T1 - p_TV / P_T1, 0.0)
    if mode == "forward":
        return torch.where(kept_TV, q_TV - p_TV, q_TV * (P_T1 - Q_T1) / (1 - Q_T1))
    if tail == "renorm":
        r_TV, s_TV = (torch.where(kept_TV, x, 0.0) / m for x, m in ((p_TV, P_T1), (q_TV, Q_T1)))
        gap_TV = torch.where(kept_TV, (s_TV / r_TV).log(), 0.0)
        return s_TV * (gap_TV - (s_TV * gap_TV).sum(1, keepdim=True))
    tail_gap_T1 = ((1 - Q_T1) / (1 - P_T1)).log()
    gap_TV = torch.where(kept_TV, (q_TV / p_TV).log(), tail_gap_T1)
    return q_TV * (gap_TV - (q_TV * gap_TV).sum(1, keepdim=True))


@both_paths
@pytest.mark.parametrize("mode, tail", [c for c in ALLOWED if c[0] in ("forward", "reverse")])
def test_gradients_are_the_closed_forms(path, mode, tail):  # T3
    z_TV, u_TV = randn(3, 40, seed=3), randn(3, 40, seed=4)
    kept = keep(u_TV, 5, 2.0)
    q_TV, p_TV = (z_TV / 2).softmax(1), (u_TV / 2).softmax(1)
    kept_TV = torch.zeros_like(z_TV, dtype=torch.bool).scatter(1, kept[0].long(), True)
    with running(path, 64):
        _, _, dz_TV = run(topk_tail, [z_TV], kept, torch.float64, mode=mode, tail=tail, temperature=2.0)
    torch.testing.assert_close(dz_TV, -0.7 / 2 * closed_form(q_TV, p_TV, kept_TV, mode, tail), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(dz_TV.sum(1), torch.zeros(3, dtype=torch.float64, device=DEVICE), rtol=0, atol=1e-13)


def test_dropping_the_tail_is_not_a_divergence():  # T1's exceptions: a gradient at p = q, a negative value
    z_1V = randn(1, 30, seed=5)
    kept = keep(z_1V, 4)
    with running("torch"):
        _, kl_1, dz_1V = run(topk_tail, [z_1V], kept, torch.float64, tail="drop")
        nearer = topk_tail(z_1V.scatter_add(1, kept[0].long(), torch.ones(1, 4, dtype=torch.float64)), *kept, tail="drop").kl
    assert kl_1.abs() < 1e-12 and dz_1V.abs().max() > 1e-3 and nearer < -0.1


# T4: the ray along which all logits of the support fall together, while their shape stays
SHIFTS = [0.0, -1.0, -2.0, -5.0, -10.0, -20.0]
TABLE = {  # at P = 0.228: the values by which un-renormalised reverse KL was found to pay for leaving the support
    "truncated": [0.227, -0.017, -0.067, -0.014, 0.0, 0.0], "renorm": [0.227] * 6,
    "ghost": [0.116, 0.050, 0.110, 0.241, 0.259, 0.259], "full": [0.314, 0.303, 0.392, 0.542, 0.562, 0.562]}


def tilted(n: int, kl: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two distributions over n classes, KL(first || second) = kl, by bisection."""
    slope_N, low, high = torch.linspace(-1, 1, n, dtype=torch.float64), 0.0, 10.0
    flat_N = torch.full((n,), -math.log(n), dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        tilted_N = (middle * slope_N).log_softmax(0)
        low, high = (middle, high) if (tilted_N.exp() * (tilted_N - flat_N)).sum() < kl else (low, middle)
    return tilted_N, flat_N


def on_the_ray(shifts) -> tuple:
    """(student logits [shifts, 2000], teacher logits of the same shape, kept rows) with the numbers of the table."""
    V, K, P, Q = 2000, 20, 0.228, 0.349
    (in_q, in_p), (out_q, out_p) = tilted(K, 0.227), tilted(V - K, 0.304)
    teacher_V = torch.cat([in_p + math.log(P), out_p + math.log(1 - P)])
    student_V = torch.cat([in_q + math.log(Q), out_q + math.log(1 - Q)])
    student_SV = student_V + torch.tensor(shifts, dtype=torch.float64)[:, None] * (torch.arange(V) < K)
    n = len(shifts)
    kept = (torch.arange(K).expand(n, K), teacher_V[:K].expand(n, K), torch.full((n,), math.log(1 - P)).double())
    return student_SV, teacher_V.expand(n, V), kept


def test_the_table_of_the_exploit():  # T4
    student_SV, teacher_SV, kept = on_the_ray(SHIFTS)
    logq_SK = student_SV.log_softmax(1)[:, :20]
    with running("torch"):
        values = {"truncated": (logq_SK.exp() * (logq_SK - kept[1])).sum(1),
                  "full": token_kl(student_SV, teacher_SV, mode="reverse").kl,
                  **{tail: topk_tail(student_SV, *kept, mode="reverse", tail=tail).kl for tail in ("ghost", "renorm")}}
    for name, row in TABLE.items():
        assert values[name].tolist() == pytest.approx(row, abs=1.6e-3), name
    assert ((values["ghost"] >= 0) & (values["ghost"] <= values["full"])).all()


def test_the_bucket_turns_where_the_mass_is_right():  # T4: least at logit Q = logit P - C_r, and rising ever after
    shifts = torch.linspace(2, -12, 561, dtype=torch.float64)
    student_SV, _, kept = on_the_ray(shifts.tolist())
    with running("torch"):
        ghost_S = topk_tail(student_SV, *kept, mode="reverse").kl
    logit_S = torch.log(0.349 / torch.tensor(1 - 0.349)) + shifts
    turn = math.log(0.228 / (1 - 0.228)) - 0.227
    assert abs(logit_S[ghost_S.argmin()] - turn) < 0.03
    beyond_S = ghost_S[logit_S < turn - 0.03]
    assert (beyond_S.diff() > 0).all() and len(beyond_S) > 300


@pytest.mark.parametrize("mode", [m for m in MODES if m != "forward"])
@pytest.mark.parametrize("tail", ["drop", "sampled"])
def test_what_pays_for_leaving_the_support_is_refused(mode, tail):  # T4
    with pytest.raises(ValueError, match="use tail='ghost'"):
        topk_tail(randn(2, 9, seed=1), *keep(randn(2, 9, seed=2), 3), mode=mode, tail=tail)


# sampled: unbiased, over every outcome of drawing two ids with replacement
@both_paths
def test_sampled_gradients_average_to_the_full_forward_kl(path):
    V = 7
    z_1V, u_1V = randn(1, V, seed=3), randn(1, V, seed=4)
    q_V = u_1V.softmax(1)[0]
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
    once = (first == second)[:, None] & torch.tensor([[False, True]])  # merged when collected: weight 1, one id
    ids_N2 = torch.stack([first, second], 1).masked_fill(once, -1).to(DEVICE)
    logw_N2 = torch.full((V * V, 2), 0.5, dtype=torch.float64).masked_fill(once.any(1, keepdim=True), 1.0).log().to(DEVICE)
    with running(path, 64):
        _, _, dz_NV = run(topk_tail, [z_1V.expand(V * V, V)], (ids_N2, logw_N2), torch.float64, tail="sampled",
                          weight=q_V[first] * q_V[second])
        _, _, full_1V = run(token_kl, [z_1V], (u_1V,), torch.float64)
    torch.testing.assert_close(dz_NV.sum(0, keepdim=True), full_1V, rtol=1e-10, atol=1e-13)


# T5: edges
@both_paths
def test_a_tiny_tail_keeps_its_gradient(path):
    """log(1 - sum p) in fp32 has nothing left at 1e-9; knocking out the support keeps every digit that matters."""
    z_1V = torch.zeros(1, 100, device=DEVICE)
    z_1V[0, :2] = 25.0
    kept = (torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[0.3, 0.7 - 2e-9]], device=DEVICE).log(),
            torch.tensor([2e-9], device=DEVICE).log())
    exact_V = z_1V[0].double().softmax(0)
    with running(path, 32):
        _, _, dz_1V = run(topk_tail, [z_1V], kept, torch.float32)
    want = -0.7 * exact_V[2] * (1 - 2e-9 / exact_V[2:].sum())  # p_i - q_tail p_i / p_tail
    assert abs(dz_1V[0, 2].item() - want.item()) < 1e-5 * abs(want.item())


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode, tail", ALLOWED)
def test_extreme_masses_stay_finite(path, mode, tail, dtype):  # T5: P or Q -> 0 and 1, logits of 1e4, ties, all padded
    V, K = 40, 4
    z_TV, u_TV = torch.zeros(6, V), torch.zeros(6, V)
    z_TV[0, :K], u_TV[1, :K] = 80, 80  # all of Q, of P in the support
    z_TV[2, K:], u_TV[2] = 1e4, 0  # none of Q
    z_TV[3], u_TV[3] = 1e4, -1e4  # constant rows: ties everywhere
    z_TV[4, 7], u_TV[4, 2] = 60, 60  # one-hot on both sides
    kept = [x.to(DEVICE) for x in keep(u_TV, K)]
    kept[0][:3] = torch.arange(K, device=DEVICE)
    kept[1] = (u_TV.double().log_softmax(1)).to(DEVICE).gather(1, kept[0].long())
    kept[2] = u_TV.double().log_softmax(1).to(DEVICE).scatter(1, kept[0].long(), -torch.inf).logsumexp(1)
    kept[0][5] = -1
    kept = [x.float() if x.is_floating_point() else x for x in kept]
    with running(path, 64):
        _, kl_T, dz_TV = run(topk_tail, [z_TV.to(DEVICE)], kept, dtype, mode=mode, tail=tail, beta=0.25)
    truth = run(topk_tail_kl_ref, [z_TV.to(DEVICE).to(dtype)], kept, torch.float64, mode=mode, tail=tail, beta=0.25)
    assert kl_T.isfinite().all() and dz_TV.isfinite().all() and kl_T[5] == 0 and (dz_TV[5] == 0).all()
    torch.testing.assert_close(kl_T.double(), truth[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz_TV.double(), truth[2], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-6)


@both_paths
@given(mode=st.sampled_from(MODES), seed=SEEDS)
def test_close_distributions_keep_their_gradient(path, mode, seed):
    """The maximum and the log-sum stay apart: near p = q and far from 0 their sum would cost most digits."""
    z_TV = randn(2, 60, seed=seed, dtype=torch.float32) + 500
    kept = [x.float() if x.is_floating_point() else x for x in keep(z_TV + 1e-2 * randn(2, 60, seed=seed + 1), 6)]
    with running(path, 64):
        _, _, dz_TV = run(topk_tail, [z_TV], kept, torch.float32, mode=mode)
    truth = run(topk_tail_kl_ref, [z_TV], kept, torch.float64, mode=mode)[2]
    assert (dz_TV - truth).norm() < 1e-4 * truth.norm()


@both_paths
def test_a_rounded_tail_at_the_whole_vocabulary_is_no_tail(path):  # 1 - sum p is 1e-8, not 0, in fp32
    z_TV, u_TV = randn(2, 20, seed=7), randn(2, 20, seed=8)
    ids_TK, logp_TK, _ = keep(u_TV, 20)
    with running(path, 64):
        kl_T = topk_tail(z_TV, ids_TK, logp_TK, torch.full((2,), -18.0, device=DEVICE)).kl
        torch.testing.assert_close(kl_T, token_kl(z_TV, u_TV).kl)


@both_paths
@pytest.mark.parametrize("mode, tail", ALLOWED)
def test_banned_tokens_leave_everything_finite(path, mode, tail):  # T16
    z_TV, u_TV = randn(2, 50, seed=4, dtype=torch.float32), randn(2, 50, seed=5, dtype=torch.float32)
    z_TV[:, 10:40] = u_TV[:, 10:40] = -torch.inf
    kept = [x.float() if x.is_floating_point() else x for x in keep(u_TV, 3)]
    with running(path, 32):
        _, kl_T, dz_TV = run(topk_tail, [z_TV], kept, torch.float32, mode=mode, tail=tail)
    assert kl_T.isfinite().all() and dz_TV.isfinite().all() and dz_TV.abs().max() > 1e-3
    assert (dz_TV[:, 10:40] == 0).all() and (dz_TV.sum(1).abs() < 1e-6).all()


@both_paths
@pytest.mark.parametrize("tail", ["ghost", "renorm", "sampled"])
def test_a_banned_kept_token_is_reported_and_left_out(path, tail):
    """Forward divergence is inf where the student bans what the teacher keeps; NaN is reported, too. Row 2 is untouched."""
    z_TV, kept = randn(3, 30, seed=6, dtype=torch.float32), keep(randn(3, 30, seed=7), 3)
    kept = [x.float() if x.is_floating_point() else x for x in kept]
    z_TV[0, kept[0][0, 1]], kept[1][1, 0] = -torch.inf, torch.nan
    with running(path, 64):
        total, kl_T, dz_TV = run(topk_tail, [z_TV], kept, torch.float32, tail=tail)
        alone = run(topk_tail, [z_TV[2:]], [x[2:] for x in kept], torch.float32, tail=tail)
        without = topk_tail(z_TV, *kept, tail=tail, weight=torch.tensor([0.0, 0, 1], device=DEVICE)).total
    assert kl_T[0].isinf() and kl_T[1].isnan() and total.isnan() and (dz_TV[:2] == 0).all()
    torch.testing.assert_close((kl_T[2:], dz_TV[2:]), tuple(alone[1:]))
    torch.testing.assert_close(without, kl_T[2])  # weight 0 leaves a row out of the total


def test_duplicate_and_foreign_ids_are_refused_in_debug_mode():  # T5
    ids_TK, logp_TK, tail_T = keep(randn(2, 9, seed=2), 3)
    with patch.object(_triton, "DEBUG", True):
        topk_tail(randn(2, 9, seed=1), ids_TK, logp_TK, tail_T)
        for wrong, match in ((ids_TK[:, :1].expand(2, 3), "twice"), (ids_TK + 7, "below 9")):
            with pytest.raises(ValueError, match=match):
                topk_tail(randn(2, 9, seed=1), wrong, logp_TK, tail_T)


# how it runs
@both_paths
@pytest.mark.parametrize("tail", ["ghost", "renorm"])
def test_the_same_bits_every_time_in_every_chunk_and_block(path, tail):
    z_TV, kept = randn(5, 150, seed=9, dtype=torch.float32), keep(randn(5, 150, seed=10), 7)
    kept = [x.float() if x.is_floating_point() else x for x in kept]
    with running(path, 64):
        first, again, chunked = (run(topk_tail, [z_TV], kept, torch.float32, mode="jsd", tail=tail, workspace_mb=mb)
                                 for mb in (1200, 1200, 0.0001))
    for a, b, c in zip(first[1:], again[1:], chunked[1:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@both_paths
def test_the_logits_are_left_alone(path):
    z_TV, kept = randn(4, 30, seed=11, dtype=torch.float32), keep(randn(4, 30, seed=12), 3)
    before, leaf = z_TV.clone(), z_TV.detach().requires_grad_()
    with running(path, 64), torch.no_grad():
        topk_tail(z_TV, *kept)
    with running(path, 64):
        total = topk_tail(leaf * 1, *kept).total
        total.backward(retain_graph=True)
        first_TV = leaf.grad.clone()
        total.backward()
    assert torch.equal(z_TV, before)
    torch.testing.assert_close(leaf.grad, 2 * first_TV)  # a retained graph goes backward again


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0])])
def test_in_place_the_gradient_takes_the_memory_of_the_logits(path, dtype, rows):
    z_TV, kept = randn(4, 30, seed=11, dtype=dtype).requires_grad_(), keep(randn(4, 28, seed=12), 3)
    options = dict(mode="jsd", vocab_size=28, weight=signed_weights(4, 13), rows=rows if rows is None else rows.to(DEVICE))
    with running(path, 64):
        want = run(topk_tail, [z_TV], kept, dtype, **options)
        logits_TV = z_TV * 1
        held = logits_TV.detach()
        out = topk_tail(logits_TV, *kept, inplace=True, **options)
        (got_TV,) = torch.autograd.grad(out.total * -0.7, z_TV, retain_graph=True)
    torch.testing.assert_close((out.total, out.kl, got_TV), tuple(want))
    torch.testing.assert_close(held, want[2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.total.backward()


def test_in_place_is_refused_where_it_would_destroy():
    kept, leaf = keep(randn(3, 20, seed=1), 4), randn(3, 20, seed=2).requires_grad_()
    with running("torch"):
        for z_TV, match in ((leaf, "overwrite a leaf"), ((leaf[:1] * 1).expand(3, 20), "overlap"), ((leaf * 1).half(), "float16")):
            with pytest.raises(ValueError, match=match):
                topk_tail(z_TV, *kept, inplace=True)
        with torch.no_grad():
            before = leaf.detach().clone()
            topk_tail(leaf, *kept, inplace=True)  # nobody wants a gradient: nothing to write
        assert torch.equal(leaf, before)
        probabilities = leaf.softmax(1)  # its backward needs its result
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            topk_tail(probabilities, *kept, inplace=True).total.backward()


def test_only_the_gradient_is_as_large_as_the_logits():  # T25; a dispatch mode does not see inside an op, so it is unwrapped
    z_TV, kept = randn(300, 400, seed=13, dtype=torch.float32), keep(randn(300, 400, seed=14), 8)
    ids_TK, logp_TK, tail_T = kept[0], kept[1].float(), kept[2].float()

    def call(need_dlogits: bool):
        return _op._init_fn(z_TV, ids_TK, logp_TK, tail_T, torch.ones(300), None, "jsd", "ghost", 0.5, 1.0, False, 400, "", 0, 0.5,
                            need_dlogits)

    with running("torch"), NoLargeTensor(300 * 400 // 2):
        call(False)
    with running("torch"), LargeTensors(300 * 400 // 2) as large:
        call(True)
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


def arguments(mode="forward", tail="ghost"):
    ids_TK, logp_TK, tail_T = keep(randn(3, 20, seed=15), 4)
    z_TV = randn(3, 20, seed=16, dtype=torch.float32).requires_grad_()
    return (z_TV, ids_TK, logp_TK.float(), tail_T.float(), signed_weights(3, 17), None, mode, tail, 0.5, 1.0, False, 20, "", 0,
            1200.0, True)


@both_paths
def test_the_op_keeps_torch_librarys_contract(path):
    with running(path, 64):
        torch.library.opcheck(_op, arguments())


def test_nothing_waits_for_the_device():
    """Fake tensors have no values to wait for: reading one raises."""
    with running("torch"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = [mode.from_tensor(x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments()]
        for rows_M in (None, torch.arange(2)):
            _, kl_T, dz_TV = _op._init_fn(*args[:5], rows_M, *args[6:])
            assert kl_T.shape == (3,) and dz_TV.shape == (3, 20)


def test_it_compiles_into_a_full_graph():
    kept, z_TV = keep(randn(3, 20, seed=18), 4), randn(3, 20, seed=19).requires_grad_()

    def loss(z_TV):
        return topk_tail_kl(z_TV * 2, *kept, mode="jsd", rows=torch.tensor([2, 0]), scale_t2=True, temperature=2.0).total * 3

    with running("torch"):
        got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(z_TV), z_TV)
        torch.testing.assert_close(got, torch.autograd.grad(loss(z_TV), z_TV))


def on_a_slice(path: str, cuts: list[int], z_TV, kept, weight_T, cases) -> list:
    start, end = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    shard = VocabShard(dist.group.WORLD.group_name, start)
    with running(path, 64):
        return [run(topk_tail, [z_TV[:, start:end]], kept, z_TV.dtype, mode=mode, tail=tail, weight=weight_T, shard=shard,
                    vocab_size=37, workspace_mb=0.0005) for mode, tail in cases]


@both_paths
@pytest.mark.parametrize("cuts", [[0, 23, 40], [0, 37, 40]], ids=["uneven", "a slice of padding"])
def test_slices_of_the_vocabulary_give_what_the_whole_gives(path, cuts):
    T, V = 3, 37
    z_TV, (ids_TK, logp_TK, tail_T) = randn(T, 40, seed=20), keep(randn(T, V, seed=21), 6)
    kept, weight_T = (*pad_some(ids_TK, logp_TK, V), tail_T), signed_weights(T, 22)
    cases = [*PROPER, ("forward", "sampled")] if cuts[1] == 23 else [("jsd", "ghost"), ("reverse", "renorm")]
    ranks = run_on_ranks(on_a_slice, path, cuts, z_TV, kept, weight_T, cases)
    for (mode, tail), *parts in zip(cases, *ranks, strict=True):
        with running("torch"):
            whole = run(topk_tail, [z_TV], kept, torch.float64, mode=mode, tail=tail, weight=weight_T, vocab_size=V)
        for part in parts:
            torch.testing.assert_close(part[:2], whole[:2], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(torch.cat([part[2] for part in parts], 1), whole[2], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options, match", [
    (dict(tail="tail"), "want one of ghost"),
    (dict(tail="renorm", ids_TK=torch.zeros(2, 1, dtype=torch.int32), teacher_logp_TK=torch.zeros(2, 1)), "K = 1"),
    (dict(tail="drop"), "allow_drop=True"),
    (dict(teacher_tail_T=None), "teacher_topk returns it"),
    (dict(teacher_tail_T=torch.zeros(3)), r"want \[T\]"),
    (dict(ids_TK=torch.zeros(2, 6, dtype=torch.int32), teacher_logp_TK=torch.zeros(2, 6)), "1 <= K <= V"),
    (dict(teacher_logp_TK=torch.zeros(2, 3)), r"want \[T, K\] both"),
    (dict(teacher_logp_TK=torch.zeros(2, 2).bfloat16()), "want float32"),
    (dict(ids_TK=torch.zeros(2, 2)), "want int32 or int64"),
    (dict(temperature=0.0), "want > 0"),
    (dict(temperature=2.0, teacher_temperature=1.0), "do not tell the tail"),
    (dict(student_logits_TV=torch.zeros(2, 1, 5)), "Flatten first"),
    (dict(student_logits_TV=torch.zeros(5, 2).t()), "dense"),
    (dict(vocab_size=6), "vocab_size <= columns"),
    (dict(shard=VocabShard("g", 0)), "size of the whole vocabulary"),
    (dict(rows=torch.ones(2)), "int64"),
])
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(student_logits_TV=torch.zeros(2, 5), ids_TK=torch.zeros(2, 2, dtype=torch.int32),
                teacher_logp_TK=torch.zeros(2, 2), teacher_tail_T=torch.zeros(2))
    with pytest.raises(ValueError, match=match):
        topk_tail_kl(**(args | options))
    assert topk_tail_kl_ref(**args).kl.shape == (2,)
