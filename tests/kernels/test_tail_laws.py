"""The laws T1-T4 of the four tails of a truncated divergence; the sampled tail over every draw."""

import math
from functools import partial

import pytest
import torch
from close import DEVICE, PATHS, running
from hypothesis import given
from hypothesis import strategies as st
from tail_table import SHIFTS, TABLE
from topk_cases import ALLOWED, PROPER, randn, run, top_k

from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._topk_inputs import ZERO
from reflux.kernels.token_kl import token_kl
from reflux.kernels.topk_tail_kl import topk_tail_kl

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
both_paths = pytest.mark.parametrize("path", PATHS)
each_proper = pytest.mark.parametrize("divergence, tail", PROPER)
topk_tail = partial(topk_tail_kl, allow_drop=True)


# T1, T2: what kind of number each tail is
@both_paths
@each_proper
def test_equal_distributions_have_no_loss_and_no_gradient(path, divergence, tail):  # T1
    z_TV = randn(3, 60, seed=2)
    with running(path, 64):
        _, kl_T, dz_TV = run(
            topk_tail, [z_TV], top_k(z_TV, 5), torch.float64, divergence=divergence, tail=tail
        )
    assert max(kl_T.abs().max(), dz_TV.abs().max()) < 1e-12


@given(case=st.sampled_from(PROPER), scale=st.sampled_from([0.1, 1.0, 20.0]), seed=SEEDS)
def test_a_proper_tail_is_never_negative(case, scale, seed):  # T1
    (divergence, tail), z_TV = case, randn(3, 50, seed=seed, dtype=torch.float32) * scale
    topk = top_k(randn(3, 50, seed=seed + 1), 6)
    with running("torch"):
        kl_T = topk_tail(z_TV, *topk, divergence=divergence, tail=tail).kl
    assert (kl_T > -2e-6 * max(1, scale)).all()


@given(divergence=st.sampled_from(DIVERGENCES), V=st.integers(3, 80), seed=SEEDS)
def test_bucket_grows_with_the_support_up_to_the_full_divergence(divergence, V, seed):  # T2
    z_TV, u_TV = randn(3, V, seed=seed), 2 * randn(3, V, seed=seed + 1)
    with running("torch"):
        full_T = token_kl(z_TV, u_TV, divergence=divergence).kl
        buckets = [
            topk_tail(z_TV, *top_k(u_TV, k), divergence=divergence).kl
            for k in (1, 2, 1 + V // 2, V - 1, V)
        ]
    bounds = [torch.zeros_like(full_T), *buckets, full_T]
    for smaller, larger in zip(bounds, bounds[1:]):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(buckets[-1], full_T, rtol=1e-10, atol=1e-12)


@both_paths
@pytest.mark.parametrize("divergence", ["forward", "jsd", "skew_forward", "skew_reverse"])
def test_nothing_outside_the_top_k_is_the_divergence_from_such_a_teacher(path, divergence):
    """Its distribution written out over the whole vocabulary; a student that is the teacher before
    it was cut has a loss, and a gradient that takes its tail away.
    """
    z_TV, topk = randn(4, 50, seed=1), top_k(randn(4, 50, seed=2), 6)
    cut_TV = torch.full_like(z_TV, -torch.inf).scatter(1, topk[0].long(), topk[1].double())
    with running(path, 64):
        got_T = topk_tail(z_TV, *topk, divergence=divergence, tail=ZERO, beta=0.3).kl
        want_T = token_kl(z_TV, cut_TV, divergence=divergence, beta=0.3).kl
        same = run(topk_tail, [topk_logits(topk)], topk, torch.float64, tail=ZERO)
    torch.testing.assert_close(got_T, want_T, rtol=1e-10, atol=1e-12)
    assert (same[1] > 0).all()


def topk_logits(topk):
    """Logits [T, 50] with that top-k, the tail's mass spread evenly."""
    ids_TK, logp_TK, tail_T = topk
    rest_T1 = (tail_T - math.log(50 - ids_TK.shape[1]))[:, None].double()
    return rest_T1.expand(-1, 50).clone().scatter(1, ids_TK.long(), logp_TK.double())


@both_paths
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
# T2: D = P C + KL_bern, D_r = Q C_r + ...
def test_bucket_is_renorm_times_the_mass_plus_the_kl_of_the_masses(path, divergence):
    z_TV, topk = randn(4, 50, seed=1), top_k(randn(4, 50, seed=2), 6)
    with running(path, 64):
        bucket_T, renorm_T = (
            topk_tail(z_TV, *topk, divergence=divergence, tail=t).kl for t in ("bucket", "renorm")
        )
    P_T, Q_T = topk[1].exp().sum(1), z_TV.softmax(1).gather(1, topk[0].long()).sum(1)
    a_T, b_T = (P_T, Q_T) if divergence == "forward" else (Q_T, P_T)
    masses_T = a_T * (a_T / b_T).log() + (1 - a_T) * ((1 - a_T) / (1 - b_T)).log()
    torch.testing.assert_close(bucket_T, a_T * renorm_T + masses_T, rtol=1e-10, atol=1e-12)


# T3: gradients inside and outside the support, written by hand: teacher p with mass P, student q
# with mass Q in S
def closed_form(q_TV, p_TV, in_topk_TV, divergence: str, tail: str):
    P_T1, Q_T1 = (torch.where(in_topk_TV, x, 0.0).sum(1, keepdim=True) for x in (p_TV, q_TV))
    if (divergence, tail) in (("forward", "drop"), ("forward", "sampled")):
        return torch.where(in_topk_TV, P_T1 * q_TV - p_TV, P_T1 * q_TV)
    if divergence == "forward" and tail == ZERO:
        return torch.where(in_topk_TV, q_TV - p_TV / P_T1, q_TV)
    if divergence == "forward" and tail == "renorm":
        return torch.where(in_topk_TV, q_TV / Q_T1 - p_TV / P_T1, 0.0)
    if divergence == "forward":
        return torch.where(in_topk_TV, q_TV - p_TV, q_TV * (P_T1 - Q_T1) / (1 - Q_T1))
    if tail == "renorm":
        r_TV, s_TV = (torch.where(in_topk_TV, x, 0.0) / m for x, m in ((p_TV, P_T1), (q_TV, Q_T1)))
        gap_TV = torch.where(in_topk_TV, (s_TV / r_TV).log(), 0.0)
        return s_TV * (gap_TV - (s_TV * gap_TV).sum(1, keepdim=True))
    tail_gap_T1 = ((1 - Q_T1) / (1 - P_T1)).log()
    gap_TV = torch.where(in_topk_TV, (q_TV / p_TV).log(), tail_gap_T1)
    return q_TV * (gap_TV - (q_TV * gap_TV).sum(1, keepdim=True))


@both_paths
@pytest.mark.parametrize("divergence, tail", [c for c in ALLOWED if c[0] in ("forward", "reverse")])
def test_gradients_are_the_closed_forms(path, divergence, tail):  # T3
    z_TV, u_TV = randn(3, 40, seed=3), randn(3, 40, seed=4)
    topk = top_k(u_TV, 5, 2.0)
    q_TV, p_TV = (z_TV / 2).softmax(1), (u_TV / 2).softmax(1)
    in_topk_TV = torch.zeros_like(z_TV, dtype=torch.bool).scatter(1, topk[0].long(), True)
    with running(path, 64):
        _, _, dz_TV = run(
            topk_tail,
            [z_TV],
            topk,
            torch.float64,
            divergence=divergence,
            tail=tail,
            temperature=2.0,
        )
    torch.testing.assert_close(
        dz_TV,
        -0.7 / 2 * closed_form(q_TV, p_TV, in_topk_TV, divergence, tail),
        rtol=1e-9,
        atol=1e-13,
    )
    torch.testing.assert_close(
        dz_TV.sum(1), torch.zeros(3, dtype=torch.float64, device=DEVICE), rtol=0, atol=1e-13
    )


# T1's exceptions: a gradient at p = q, a negative value
def test_dropping_the_tail_is_not_a_divergence():
    z_1V = randn(1, 30, seed=5)
    topk = top_k(z_1V, 4)
    with running("torch"):
        _, kl_1, dz_1V = run(topk_tail, [z_1V], topk, torch.float64, tail="drop")
        nearer = topk_tail(
            z_1V.scatter_add(
                1, topk[0].long(), torch.ones(1, 4, dtype=torch.float64, device=DEVICE)
            ),
            *topk,
            tail="drop",
        ).kl
    assert kl_1.abs() < 1e-12 and dz_1V.abs().max() > 1e-3 and nearer < -0.1


def tilted(n: int, kl: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two distributions over n tokens, KL(first || second) = kl."""
    slope_N, low, high = torch.linspace(-1, 1, n, dtype=torch.float64, device=DEVICE), 0.0, 10.0
    flat_N = torch.full((n,), -math.log(n), dtype=torch.float64, device=DEVICE)
    for _ in range(60):
        middle = (low + high) / 2
        tilted_N = (middle * slope_N).log_softmax(0)
        low, high = (
            (middle, high) if (tilted_N.exp() * (tilted_N - flat_N)).sum() < kl else (low, middle)
        )
    return tilted_N, flat_N


def on_the_ray(shifts) -> tuple:
    """(student logits [shifts, 2000], teacher logits alike, top-k) with the table's numbers."""
    V, K, P, Q = 2000, 20, 0.228, 0.349
    (in_q, in_p), (out_q, out_p) = tilted(K, 0.227), tilted(V - K, 0.304)
    teacher_V = torch.cat([in_p + math.log(P), out_p + math.log(1 - P)])
    student_V = torch.cat([in_q + math.log(Q), out_q + math.log(1 - Q)])
    student_SV = student_V + torch.tensor(shifts, dtype=torch.float64, device=DEVICE)[:, None] * (
        torch.arange(V, device=DEVICE) < K
    )
    n = len(shifts)
    topk = (
        torch.arange(K, device=DEVICE).expand(n, K),
        teacher_V[:K].expand(n, K),
        torch.full((n,), math.log(1 - P), device=DEVICE).double(),
    )
    return student_SV, teacher_V.expand(n, V), topk


def test_the_table_of_the_exploit():  # T4
    student_SV, teacher_SV, topk = on_the_ray(SHIFTS)
    logq_SK = student_SV.log_softmax(1)[:, :20]
    with running("torch"):
        values = {
            "truncated": (logq_SK.exp() * (logq_SK - topk[1])).sum(1),
            "full": token_kl(student_SV, teacher_SV, divergence="reverse").kl,
            **{
                tail: topk_tail(student_SV, *topk, divergence="reverse", tail=tail).kl
                for tail in ("bucket", "renorm")
            },
        }
    for name, row in TABLE.items():
        assert values[name].tolist() == pytest.approx(row, abs=1.6e-3), name
    assert ((values["bucket"] >= 0) & (values["bucket"] <= values["full"])).all()


# T4: least at logit Q = logit P - C_r, and rising ever after
def test_the_bucket_turns_where_the_mass_is_right():
    shifts = torch.linspace(2, -12, 561, dtype=torch.float64, device=DEVICE)
    student_SV, _, topk = on_the_ray(shifts.tolist())
    with running("torch"):
        bucket_S = topk_tail(student_SV, *topk, divergence="reverse").kl
    logit_S = torch.log(0.349 / torch.tensor(1 - 0.349, device=DEVICE)) + shifts
    turn = math.log(0.228 / (1 - 0.228)) - 0.227
    assert abs(logit_S[bucket_S.argmin()] - turn) < 0.03
    beyond_S = bucket_S[logit_S < turn - 0.03]
    assert (beyond_S.diff() > 0).all() and len(beyond_S) > 300


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "forward"])
@pytest.mark.parametrize("tail", ["drop", "sampled"])
def test_what_pays_for_leaving_the_support_is_refused(divergence, tail):  # T4
    with pytest.raises(ValueError, match="use tail='bucket'"):
        topk_tail(
            randn(2, 9, seed=1), *top_k(randn(2, 9, seed=2), 3), divergence=divergence, tail=tail
        )


# sampled: unbiased, over every outcome of drawing two ids with replacement
@both_paths
def test_sampled_gradients_average_to_the_full_forward_kl(path):
    V = 7
    z_1V, u_1V = randn(1, V, seed=3), randn(1, V, seed=4)
    q_V = u_1V.softmax(1)[0]
    first, second = (
        x.flatten()
        for x in torch.meshgrid(
            torch.arange(V, device=DEVICE), torch.arange(V, device=DEVICE), indexing="ij"
        )
    )
    # merged when collected: weight 1, one id
    once = (first == second)[:, None] & torch.tensor([[False, True]], device=DEVICE)
    ids_N2 = torch.stack([first, second], 1).masked_fill(once, -1).to(DEVICE)
    logw_N2 = (
        torch.full((V * V, 2), 0.5, dtype=torch.float64)
        .masked_fill(once.any(1, keepdim=True), 1.0)
        .log()
        .to(DEVICE)
    )
    with running(path, 64):
        _, _, dz_NV = run(
            topk_tail,
            [z_1V.expand(V * V, V)],
            (ids_N2, logw_N2),
            torch.float64,
            tail="sampled",
            weight=q_V[first] * q_V[second],
        )
        _, _, full_1V = run(token_kl, [z_1V], (u_1V,), torch.float64)
    torch.testing.assert_close(dz_NV.sum(0, keepdim=True), full_1V, rtol=1e-10, atol=1e-13)
