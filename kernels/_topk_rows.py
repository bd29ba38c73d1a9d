"""Row functions of the truncated divergences: [rows, V] student logits against a teacher's top-k.

    topk_lift      takes the K logits of the support out and writes -inf in their place; the max and
                   the sum of what is left, streamed, *are* the tail. No log(1 - sum p), which
                   returns nothing at a tail of 1e-9
    topk_terms     from these K + 2 numbers: kl, the gradients of the K logits, and the factor by
                   which exp(a - tail max) becomes the gradient of a tail logit a
    topk_gradient  writes both over the logits

Between the first two, ranks that hold slices of a vocabulary add up. Ids are -1 where padded
(`topk_inputs`), else distinct and < V.

Shapes: C rows of a chunk, V vocabulary, K top-k ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._chunks import narrow, wide
from ._divergence import DIVERGENCES, divergence_terms, exp_diff, terms
from ._parallel import all_sum, merge_sums
from ._topk_inputs import TAILS
from ._triton import LAUNCH, launch, narrowed, runs_triton, scalar, tl, triton, triton_dtype


class TopKSpec(NamedTuple):
    """Which truncated divergence of which logits."""

    divergence: str
    tail: str
    beta: float
    inv_temp: float  # logits are multiplied by this, logit_scale included where there is no cap
    softcap: float  # 0.0: none
    vocab_size: int  # of all slices together
    group: str  # the logits are a slice of the vocabulary, the others are on its ranks; "": none


@triton.jit
def topk_lift(
    z,
    ids,
    raw_k,
    tail_max,
    tail_sum,
    stride_z,
    V,
    K,
    inv_temp,
    KB: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    inv_temp = scalar(inv_temp, WIDE)
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    row = z + t * stride_z
    k = tl.arange(0, KB)
    y = tl.load(ids + t * K + k, mask=k < K, other=-1)
    here = y >= 0
    y = tl.where(here, y, 0)
    raw = tl.load(row + y, mask=here, other=0.0).to(WIDE)
    tl.debug_barrier()  # every read of the support before any thread knocks it out
    # stored as the dtype of z; the interpreters of triton 3.6 and 3.7 make no constant in bf16
    tl.store(row + y, tl.full((KB,), float("-inf"), tl.float32), mask=here)
    tl.store(raw_k + t * K + k, raw, mask=k < K)
    tl.debug_barrier()
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = tl.full((R,), float("-inf"), WIDE)
    s = tl.zeros((R,), WIDE)
    for start in range(0, V, R * 8):
        v = start + lanes
        a = tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
        m_new = tl.maximum(m, tl.max(a, 1))
        s = s * exp_diff(m, m_new) + tl.sum(exp_diff(a, m_new[:, None]), 1)
        m = m_new
    M = tl.max(m, 0)
    tl.store(tail_max + t, M)
    tl.store(tail_sum + t, tl.sum(s * exp_diff(m, M), 0))


@triton.jit
def topk_terms(
    raw_k,
    teacher_logp,
    teacher_tail,
    tail_max,
    tail_sum,
    coeff,
    kl,
    d_k,
    factor,
    K,
    V,
    inv_temp,
    inv_cap,
    beta,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    CAPPED: tl.constexpr,
    KB: tl.constexpr,
    WIDE: tl.constexpr,
):
    inv_temp = scalar(inv_temp, WIDE)
    inv_cap = scalar(inv_cap, WIDE)
    beta = scalar(beta, WIDE)
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KB)
    logq = tl.load(teacher_logp + t * K + k, mask=k < K, other=float("-inf")).to(WIDE)
    raw = tl.load(raw_k + t * K + k, mask=k < K, other=0.0).to(WIDE)
    live = logq != float("-inf")
    n_live = tl.sum(live.to(tl.int32), 0)
    a = tl.where(live, raw * inv_temp, float("-inf"))
    top = tl.max(a, 0)
    if TAIL != 1:
        M = tl.load(tail_max + t).to(WIDE)
        S = tl.load(tail_sum + t).to(WIDE)
        top = tl.maximum(top, M)
    top = tl.where(top == float("-inf"), 0.0, top)
    s = tl.sum(tl.exp(a - top), 0)
    if TAIL != 1:
        s_tail = S * tl.exp(M - top)
        s += s_tail
    log_s = tl.log(s)  # kept apart from the maximum, which may be large
    logp = tl.where(live, (a - top) - log_s, float("-inf"))
    if TAIL == 1:
        m_q = tl.max(logq, 0)
        m_q = tl.where(m_q == float("-inf"), 0.0, m_q)
        logq = tl.where(live, (logq - m_q) - tl.log(tl.sum(tl.exp(logq - m_q), 0)), float("-inf"))
    one, g = terms(logp, logq, logp - logq, beta, DIVERGENCE)
    if TAIL == 3:
        one = tl.where(live, -tl.exp(logq) * logp, 0.0)
    loss = tl.sum(one, 0)
    G = tl.sum(g, 0)
    if TAIL != 1:  # one more class
        logp_tail = (M - top) + (tl.log(S) - log_s)
        logq_tail = tl.load(teacher_tail + t).to(WIDE)
        # no tail, whatever its mass was rounded to
        logq_tail = tl.where(n_live == V, float("-inf"), logq_tail)
        l_tail, g_tail = terms(logp_tail, logq_tail, logp_tail - logq_tail, beta, DIVERGENCE)
        loss += l_tail
        G += g_tail
    loss = tl.where(n_live > 0, loss, 0.0)
    tl.store(kl + t, loss)
    # false for inf and for NaN: such a row gets no gradient
    ok = (tl.abs(loss) < float("inf")) & (n_live > 0)
    c = tl.load(coeff + t).to(WIDE) * inv_temp
    d = c * (g - tl.exp(logp) * G)
    if CAPPED:
        d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)
    d = tl.where(live, d, 0.0)
    tl.store(d_k + t * K + k, tl.where(ok, d, 0.0), mask=k < K)
    if TAIL != 1:
        d_tail = c * (g_tail - G * (s_tail / s))
        tl.store(factor + t, tl.where(ok & (S > 0), d_tail / S, 0.0))


@triton.jit
def topk_gradient(
    z,
    ids,
    d_k,
    factor,
    tail_max,
    dz,
    stride_z,
    stride_d,
    V,
    K,
    inv_temp,
    inv_cap,
    CAPPED: tl.constexpr,
    KB: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    inv_temp = scalar(inv_temp, WIDE)
    inv_cap = scalar(inv_cap, WIDE)
    t = tl.program_id(0).to(tl.int64)
    row = z + t * stride_z
    d_row = dz + t * stride_d
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    c = tl.load(factor + t).to(WIDE)
    M = tl.load(tail_max + t).to(WIDE)
    if c == 0:  # renorm, a row without weight, a row that is not finite: nothing to read
        for start in range(0, V, R * 8):
            v = start + lanes
            tl.store(d_row + v, tl.zeros((R, 8), dz.dtype.element_ty), mask=v < V)
    else:
        for start in range(0, V, R * 8):
            v = start + lanes
            raw = tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE)
            e = exp_diff(raw * inv_temp, M)
            d = c * e
            if CAPPED:
                d = tl.where(e > 0, d * (1.0 - (raw * inv_cap) * (raw * inv_cap)), 0.0)
            tl.store(d_row + v, narrowed(d, dz.dtype.element_ty), mask=v < V)
    tl.debug_barrier()  # the sweep has written the support's zeros before their gradients land
    k = tl.arange(0, KB)
    y = tl.load(ids + t * K + k, mask=k < K, other=-1)
    d = tl.load(d_k + t * K + k, mask=k < K, other=0.0)
    tl.store(d_row + tl.where(y >= 0, y, 0), narrowed(d, dz.dtype.element_ty), mask=y >= 0)


def topk_rows_(
    z_CV: Tensor,
    ids_CK: Tensor,
    logq_CK: Tensor,
    logq_tail_C: Tensor,
    coeff_C: Tensor,
    spec: TopKSpec,
    dz_CV: Tensor | None,
) -> Tensor:
    """kl [C] of student logits z, which are overwritten.

    Writes coeff * dkl/dz into dz, which may be z; None skips it. z is fp32 or fp64; where kernels
    run, also bf16 or fp16. With a group, z is this rank's slice of the vocabulary, and so are the
    ids: -1 for those of other ranks, whose logq is here all the same.
    """
    raw_CK, tail_max_C, tail_sum_C = _lift_(z_CV, ids_CK, spec)
    raw_CK = all_sum(raw_CK, spec.group)  # one rank has the logit, the others 0
    if spec.tail != "renorm":
        tail_max_C, (tail_sum_C,) = merge_sums(tail_max_C, tail_sum_C[None], spec.group)
    kl_C, d_CK, factor_C = topk_terms_of(
        raw_CK, logq_CK, logq_tail_C, tail_max_C, tail_sum_C, coeff_C, spec
    )
    if dz_CV is not None:
        _write_gradient(z_CV, ids_CK, d_CK, factor_C, tail_max_C, spec, dz_CV)
    return kl_C


def _lift_(z_CV: Tensor, ids_CK: Tensor, spec: TopKSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(support logits [C, K], 0 where padded; max [C] and sum [C] of e^(a - max) of the tail).

    a = logit * inv_temp. Overwrites the support in z with -inf. renorm needs no tail: it gets
    zeros, and z is left alone.
    """
    (C, V), K, dtype = z_CV.shape, ids_CK.shape[1], wide(z_CV.dtype)
    if spec.tail == "renorm":
        none_C = z_CV.new_zeros(C, dtype=dtype)
        return _support_torch(z_CV, ids_CK).to(dtype), none_C, none_C
    if not runs_triton(z_CV):
        return _lift_torch_(z_CV, ids_CK, spec)
    raw_CK, tail_max_C, tail_sum_C = (
        z_CV.new_empty(shape, dtype=dtype) for shape in ((C, K), C, C)
    )
    launch(
        topk_lift,
        (C,),
        z_CV,
        ids_CK,
        raw_CK,
        tail_max_C,
        tail_sum_C,
        z_CV.stride(0),
        V,
        K,
        spec.inv_temp,
        KB=triton.next_power_of_2(K),
        R=max(1, _triton.BLOCK_V // 8),
        WIDE=triton_dtype(dtype),
        **LAUNCH,
    )
    return raw_CK, tail_max_C, tail_sum_C


def topk_terms_of(
    raw_CK: Tensor,
    logq_CK: Tensor,
    logq_tail_C: Tensor,
    tail_max_C: Tensor,
    tail_sum_C: Tensor,
    coeff_C: Tensor,
    spec: TopKSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl [C], coeff * dkl/dlogit of the support [C, K], factor [C]).

    factor * e^(a - tail max) is coeff * dkl/dlogit of a tail logit; 0 for renorm. A row whose kl is
    not finite gets 0 for both.
    """
    if not runs_triton(raw_CK):
        return _terms_torch(raw_CK, logq_CK, logq_tail_C, tail_max_C, tail_sum_C, coeff_C, spec)
    C, K = raw_CK.shape
    kl_C, d_CK, factor_C = raw_CK.new_empty(C), raw_CK.new_empty(C, K), raw_CK.new_zeros(C)
    launch(
        topk_terms,
        (C,),
        raw_CK,
        logq_CK,
        logq_tail_C,
        tail_max_C,
        tail_sum_C,
        coeff_C,
        kl_C,
        d_CK,
        factor_C,
        K,
        spec.vocab_size,
        spec.inv_temp,
        _inverse(spec.softcap),
        spec.beta,
        DIVERGENCE=DIVERGENCES.index(spec.divergence),
        TAIL=TAILS.index(spec.tail),
        CAPPED=spec.softcap > 0,
        KB=triton.next_power_of_2(K),
        WIDE=triton_dtype(raw_CK.dtype),
        **LAUNCH,
    )
    return kl_C, d_CK, factor_C


def _write_gradient(
    z_CV: Tensor,
    ids_CK: Tensor,
    d_CK: Tensor,
    factor_C: Tensor,
    tail_max_C: Tensor,
    spec: TopKSpec,
    dz_CV: Tensor,
) -> None:
    """The gradient of all logits into dz, from z as `_lift_` left it."""
    (C, V), K = z_CV.shape, ids_CK.shape[1]
    if runs_triton(z_CV):
        launch(
            topk_gradient,
            (C,),
            z_CV,
            ids_CK,
            d_CK,
            factor_C,
            tail_max_C,
            dz_CV,
            z_CV.stride(0),
            dz_CV.stride(0),
            V,
            K,
            spec.inv_temp,
            _inverse(spec.softcap),
            CAPPED=spec.softcap > 0,
            KB=triton.next_power_of_2(K),
            R=max(1, _triton.BLOCK_V // 8),
            WIDE=triton_dtype(d_CK.dtype),
            **LAUNCH,
        )
    elif spec.tail == "renorm":  # the partition function cancels: nothing outside the support moves
        _add_support_torch_(dz_CV.zero_(), ids_CK, d_CK)
    else:
        _gradient_torch(z_CV, ids_CK, d_CK, factor_C, tail_max_C, spec, dz_CV)


def _inverse(softcap: float) -> float:
    return 1 / softcap if softcap else 0.0


def _support_torch(z_CV: Tensor, ids_CK: Tensor) -> Tensor:
    if not z_CV.shape[1]:  # a slice of padding only
        return z_CV.new_zeros(ids_CK.shape)
    return z_CV.gather(1, ids_CK.clamp(min=0).long()).masked_fill_(ids_CK < 0, 0.0)


def _add_support_torch_(z_CV: Tensor, ids_CK: Tensor, d_CK: Tensor) -> None:
    """Padding adds 0 to column 0, which changes nothing in whatever order."""
    if z_CV.shape[1]:
        z_CV.scatter_add_(
            1, ids_CK.clamp(min=0).long(), d_CK.masked_fill(ids_CK < 0, 0.0).to(z_CV.dtype)
        )


def _lift_torch_(z_CV: Tensor, ids_CK: Tensor, spec: TopKSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves z multiplied by inv_temp, too."""
    raw_CK = _support_torch(z_CV, ids_CK)
    a_CV = z_CV.mul_(spec.inv_temp)
    _add_support_torch_(a_CV, ids_CK, torch.full_like(raw_CK, -torch.inf))
    max_C = a_CV.amax(1) if a_CV.shape[1] else a_CV.new_full(a_CV.shape[:1], -torch.inf)
    return raw_CK, max_C, (a_CV - _finite(max_C)[:, None]).exp_().sum(1)


def _finite(max_C: Tensor) -> Tensor:
    """What a maximum is subtracted as: -inf - -inf would be NaN."""
    return max_C.masked_fill(max_C == -torch.inf, 0.0)


def _log_probs(
    a_CK: Tensor,
    logq_CK: Tensor,
    logq_tail_C: Tensor,
    tail_max_C: Tensor,
    tail_sum_C: Tensor,
    spec: TopKSpec,
) -> tuple[Tensor, Tensor]:
    """Of student and teacher: of the support [C, K] for renorm, else with the tail [C, K + 1]."""
    if spec.tail == "renorm":
        return a_CK.log_softmax(1), logq_CK.log_softmax(1)
    top_C1 = _finite(torch.maximum(a_CK.amax(1), tail_max_C))[:, None]
    tail_C = tail_max_C - top_C1[:, 0]
    log_s_C1 = ((a_CK - top_C1).exp().sum(1) + tail_sum_C * tail_C.exp()).log()[:, None]
    logp_CK = torch.cat([a_CK - top_C1, (tail_C + tail_sum_C.log())[:, None]], 1) - log_s_C1
    # whatever its mass was rounded to
    no_tail_C = (logq_CK != -torch.inf).sum(1) == spec.vocab_size
    return logp_CK, torch.cat([logq_CK, logq_tail_C.masked_fill(no_tail_C, -torch.inf)[:, None]], 1)


def _terms_torch(
    raw_CK: Tensor,
    logq_CK: Tensor,
    logq_tail_C: Tensor,
    tail_max_C: Tensor,
    tail_sum_C: Tensor,
    coeff_C: Tensor,
    spec: TopKSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    K, live_CK = raw_CK.shape[1], logq_CK != -torch.inf
    a_CK = (raw_CK * spec.inv_temp).masked_fill_(~live_CK, -torch.inf)
    logp_CK, logq_CK = _log_probs(a_CK, logq_CK, logq_tail_C, tail_max_C, tail_sum_C, spec)
    loss, g, p = divergence_terms(logp_CK, logq_CK, spec.divergence, spec.beta)
    if spec.tail == "sampled":
        loss = torch.where(g == 0, 0.0, g * logp_CK)  # forward: g is -q
    kl_C = loss.sum(1).masked_fill_(~live_CK.any(1), 0.0)
    dead_C1 = ~(kl_C.isfinite() & live_CK.any(1))[:, None]
    d_CK = (
        (g - p * g.sum(1, keepdim=True))
        .mul_((coeff_C * spec.inv_temp)[:, None])
        .masked_fill_(dead_C1, 0.0)
    )
    factor_C = (
        (d_CK[:, K:] / tail_sum_C[:, None]).masked_fill_(tail_sum_C[:, None] == 0, 0.0)[:, 0]
        if spec.tail != "renorm"
        else tail_sum_C
    )
    d_CK = d_CK[:, :K].masked_fill(~live_CK, 0.0)
    return kl_C, d_CK.mul_(1 - (raw_CK / spec.softcap).square()) if spec.softcap else d_CK, factor_C


def _gradient_torch(
    z_CV: Tensor,
    ids_CK: Tensor,
    d_CK: Tensor,
    factor_C: Tensor,
    tail_max_C: Tensor,
    spec: TopKSpec,
    dz_CV: Tensor,
) -> None:
    """z is already multiplied by inv_temp. Knocked-out logits have a cap factor of 1 - inf: 0."""
    cap_CV = (
        (z_CV / (spec.inv_temp * spec.softcap)).square_().neg_().add_(1).clamp_(min=0)
        if spec.softcap
        else None
    )
    d_CV = z_CV.sub_(_finite(tail_max_C)[:, None]).exp_().mul_(factor_C[:, None])
    if cap_CV is not None:
        d_CV.mul_(cap_CV)
    d_CV.masked_fill_((factor_C == 0)[:, None], 0.0)
    _add_support_torch_(d_CV, ids_CK, d_CK)
    if dz_CV is not z_CV:
        dz_CV.copy_(narrow(d_CV, dz_CV))
