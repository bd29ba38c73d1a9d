"""Row functions of the full-vocabulary divergences: two [rows, V] blocks of logits to kl [rows].

    kl_stats     per side the max and the sum of e^(logit - max); for forward and reverse also the
                 weighted difference w = sum e^(b - m) (b - a), which with the sums already is the
                 loss
    kl_losses    jsd and skew only: loss and G, which need the normalised probabilities
    kl_gradient  coeff dkl/dz of the student's logits, which it may overwrite

Three launches and not one, so that slices of a vocabulary on several ranks can add up their sums in
between; at 100,000 classes a row leaves the L2 cache between sweeps anyway. Each sweep keeps its
running numbers per lane of an [R, 8] tile: axis 1 is reduced inside a thread, so the loops need no
barrier.

log p - log q is formed as (a - b) - (difference of the maxima + difference of the log-sums): near p
= q that has a third of the error of subtracting two logsumexps.

Shapes: C rows of a chunk, V vocabulary (this rank's slice of it), stats [5, C]: max z, max u, sum
z, sum u, w.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._chunks import narrow, wide
from ._divergence import DIVERGENCES, divergence_terms, exp_diff, terms
from ._parallel import all_sum, merge_sums
from ._triton import LAUNCH, launch, narrowed, runs_triton, scalar, tl, triton, triton_dtype


@triton.jit
def logits_at(row, v, V, mul, WIDE: tl.constexpr):
    return tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE) * mul


@triton.jit
def kl_stats(
    z,
    u,
    stats,
    chosen,
    stride_z,
    stride_u,
    C,
    V,
    mul_z,
    mul_u,
    DIVERGENCE: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    mul_z = scalar(mul_z, WIDE)
    mul_u = scalar(mul_u, WIDE)
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    if chosen is not None:
        if tl.load(chosen + t) == 0:
            return
    z_row = z + t * stride_z
    u_row = u + t * stride_u
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    m_z = tl.full((R,), float("-inf"), WIDE)
    m_u = tl.full((R,), float("-inf"), WIDE)
    s_z = tl.zeros((R,), WIDE)
    s_u = tl.zeros((R,), WIDE)
    w = tl.zeros((R,), WIDE)
    for start in range(0, V, R * 8):
        a = logits_at(z_row, start + lanes, V, mul_z, WIDE)
        b = logits_at(u_row, start + lanes, V, mul_u, WIDE)
        new_z = tl.maximum(m_z, tl.max(a, 1))
        new_u = tl.maximum(m_u, tl.max(b, 1))
        scale_z = exp_diff(m_z, new_z)
        scale_u = exp_diff(m_u, new_u)
        e_z = exp_diff(a, new_z[:, None])
        e_u = exp_diff(b, new_u[:, None])
        s_z = s_z * scale_z + tl.sum(e_z, 1)
        s_u = s_u * scale_u + tl.sum(e_u, 1)
        if DIVERGENCE == 0:
            w = w * scale_u + tl.sum(tl.where(e_u > 0, e_u * (b - a), 0.0), 1)
        if DIVERGENCE == 1:
            w = w * scale_z + tl.sum(tl.where(e_z > 0, e_z * (a - b), 0.0), 1)
        m_z = new_z
        m_u = new_u
    M_z = tl.max(m_z, 0)
    M_u = tl.max(m_u, 0)
    scale_z = exp_diff(m_z, M_z)
    scale_u = exp_diff(m_u, M_u)
    if DIVERGENCE == 0:
        w = tl.where(scale_u > 0, w * scale_u, 0.0)
    else:
        w = tl.where(scale_z > 0, w * scale_z, 0.0)
    out = stats + t
    tl.store(out, M_z)
    tl.store(out + C, M_u)
    tl.store(out + 2 * C, tl.sum(s_z * scale_z, 0))
    tl.store(out + 3 * C, tl.sum(s_u * scale_u, 0))
    tl.store(out + 4 * C, tl.sum(w, 0))


@triton.jit
def kl_losses(
    z,
    u,
    stats,
    sums,
    chosen,
    stride_z,
    stride_u,
    C,
    V,
    mul_z,
    mul_u,
    beta,
    DIVERGENCE: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    mul_z = scalar(mul_z, WIDE)
    mul_u = scalar(mul_u, WIDE)
    beta = scalar(beta, WIDE)
    t = tl.program_id(0).to(tl.int64)
    if chosen is not None:
        if tl.load(chosen + t) == 0:
            return
    M_z = tl.load(stats + t)
    M_u = tl.load(stats + C + t)
    log_S_z = tl.log(tl.load(stats + 2 * C + t))
    log_S_u = tl.log(tl.load(stats + 3 * C + t))
    apart = (M_z - M_u) + (log_S_z - log_S_u)  # lse_z - lse_u
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    sum_l = tl.zeros((R,), WIDE)
    sum_g = tl.zeros((R,), WIDE)
    for start in range(0, V, R * 8):
        a = logits_at(z + t * stride_z, start + lanes, V, mul_z, WIDE)
        b = logits_at(u + t * stride_u, start + lanes, V, mul_u, WIDE)
        loss, g = terms((a - M_z) - log_S_z, (b - M_u) - log_S_u, (a - b) - apart, beta, DIVERGENCE)
        sum_l += tl.sum(loss, 1)
        sum_g += tl.sum(g, 1)
    tl.store(sums + t, tl.sum(sum_l, 0))
    tl.store(sums + C + t, tl.sum(sum_g, 0))


@triton.jit
def kl_gradient(
    z,
    u,
    stats,
    kl,
    G,
    coeff,
    chosen,
    dz,
    stride_z,
    stride_u,
    stride_d,
    C,
    V,
    mul_z,
    mul_u,
    inv_cap,
    beta,
    DIVERGENCE: tl.constexpr,
    CAPPED: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    mul_z = scalar(mul_z, WIDE)
    mul_u = scalar(mul_u, WIDE)
    inv_cap = scalar(inv_cap, WIDE)
    beta = scalar(beta, WIDE)
    t = tl.program_id(0).to(tl.int64)
    d_row = dz + t * stride_d
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # false for inf and for NaN: such a row gets no gradient
    ok = tl.abs(tl.load(kl + t)) < float("inf")
    if chosen is not None:
        ok = ok & (tl.load(chosen + t) != 0)
    if ok == 0:
        for start in range(0, V, R * 8):
            v = start + lanes
            tl.store(d_row + v, tl.zeros((R, 8), dz.dtype.element_ty), mask=v < V)
        return
    M_z = tl.load(stats + t)
    M_u = tl.load(stats + C + t)
    log_S_z = tl.log(tl.load(stats + 2 * C + t))
    log_S_u = tl.log(tl.load(stats + 3 * C + t))
    apart = (M_z - M_u) + (log_S_z - log_S_u)
    sum_g = tl.load(G + t)
    c = tl.load(coeff + t).to(WIDE) * mul_z
    for start in range(0, V, R * 8):
        v = start + lanes
        raw = logits_at(z + t * stride_z, v, V, 1.0, WIDE)
        a = raw * mul_z
        b = logits_at(u + t * stride_u, v, V, mul_u, WIDE)
        logp = (a - M_z) - log_S_z
        _, g = terms(logp, (b - M_u) - log_S_u, (a - b) - apart, beta, DIVERGENCE)
        p = tl.exp(logp)
        d = c * (g - p * sum_g)
        if CAPPED:
            d = tl.where(p == 0, 0.0, d * (1.0 - (raw * inv_cap) * (raw * inv_cap)))
        tl.store(d_row + v, narrowed(d, dz.dtype.element_ty), mask=v < V)


class KLSpec(NamedTuple):
    """Which divergence of which logits."""

    divergence: str
    beta: float
    scales: tuple[float, float]  # what z and u are multiplied by
    softcap: float  # of the student; 0.0: none
    group: str  # z and u are slices of the vocabulary, the others are on its ranks; "": none


def kl_rows(
    z_CV: Tensor,
    u_CV: Tensor,
    coeff_C: Tensor,
    spec: KLSpec,
    dz_CV: Tensor | None,
    chosen_C: Tensor | None = None,
) -> Tensor:
    """kl [C] of student logits z and teacher logits u.

    Writes coeff * dkl/dz into dz, which may be z; None skips it. chosen (kernels only): rows where
    it is False are not read; their kl and gradient are 0.
    """
    if not runs_triton(z_CV):
        return _kl_rows_torch(z_CV, u_CV, coeff_C, spec, dz_CV)
    (C, V), dtype = z_CV.shape, wide(z_CV.dtype)
    options = {
        "DIVERGENCE": DIVERGENCES.index(spec.divergence),
        "R": max(1, _triton.BLOCK_V // 8),
        "WIDE": triton_dtype(dtype),
        **LAUNCH,
    }
    strides, stats_5C = (z_CV.stride(0), u_CV.stride(0)), z_CV.new_empty(5, C, dtype=dtype)
    sizes = *strides, C, V, *spec.scales
    launch(kl_stats, (C,), z_CV, u_CV, stats_5C, chosen_C, *sizes, **options)
    stats_5C = _merge(stats_5C, spec.divergence, spec.group)
    if spec.divergence in ("forward", "reverse"):
        kl_C, G_C = _loss_and_G(stats_5C, spec.divergence)
    else:
        sums_2C = z_CV.new_empty(2, C, dtype=dtype)
        launch(
            kl_losses, (C,), z_CV, u_CV, stats_5C, sums_2C, chosen_C, *sizes, spec.beta, **options
        )
        kl_C, G_C = all_sum(sums_2C, spec.group)
    if dz_CV is not None:
        launch(
            kl_gradient,
            (C,),
            z_CV,
            u_CV,
            stats_5C,
            kl_C,
            G_C,
            coeff_C,
            chosen_C,
            dz_CV,
            *strides,
            dz_CV.stride(0),
            C,
            V,
            *spec.scales,
            1 / spec.softcap if spec.softcap else 0.0,
            spec.beta,
            CAPPED=spec.softcap > 0,
            **options,
        )
    return kl_C if chosen_C is None else torch.where(chosen_C, kl_C, 0.0)


def _merge(stats_5C: Tensor, divergence: str, group: str) -> Tensor:
    """Statistics of the whole vocabulary from those of its slices: one MAX and one SUM."""
    if not group:
        return stats_5C
    side = 1 if divergence == "forward" else 0  # whose max w is relative to
    top_3C = torch.stack((stats_5C[0], stats_5C[1], stats_5C[side]))
    top_3C, sums_3C = merge_sums(top_3C, stats_5C[2:], group)
    return torch.cat((top_3C[:2], sums_3C))


def _loss_and_G(stats_5C: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """(kl, G) without another sweep: KL(q || p) = w / sum u + (lse_z - lse_u), reverse likewise."""
    top_z_C, top_u_C, sum_z_C, sum_u_C, w_C = stats_5C
    apart_C = (top_z_C - top_u_C) + (sum_z_C.log() - sum_u_C.log())
    if divergence == "forward":
        return w_C / sum_u_C + apart_C, torch.full_like(w_C, -1.0)
    kl_C = w_C / sum_z_C - apart_C
    return kl_C, kl_C


def _kl_rows_torch(
    z_CV: Tensor, u_CV: Tensor, coeff_C: Tensor, spec: KLSpec, dz_CV: Tensor | None
) -> Tensor:
    x_CV, y_CV = (
        x if by == 1 else x * by
        for x, by in zip((x.to(wide(z_CV.dtype)) for x in (z_CV, u_CV)), spec.scales)
    )
    logp_CV, logq_CV = _log_softmax(x_CV, y_CV, spec.group)
    loss_CV, g_CV, p_CV = divergence_terms(logp_CV, logq_CV, spec.divergence, spec.beta)
    kl_C = loss_CV.sum(1)
    if dz_CV is None and not spec.group:
        return kl_C
    G_C = g_CV.sum(1)
    if spec.group:
        kl_C, G_C = all_sum(torch.stack((kl_C, G_C)), spec.group)
    if dz_CV is None:
        return kl_C
    coeff_C = coeff_C * spec.scales[0]
    d_CV = torch.addcmul(g_CV, p_CV, G_C[:, None], value=-1).mul_(coeff_C[:, None])
    if spec.softcap:
        d_CV.mul_(1 - (z_CV / spec.softcap).square_())
    dz_CV.copy_(narrow(d_CV.masked_fill_(~kl_C.isfinite()[:, None], 0.0), dz_CV))
    return kl_C


def _log_softmax(x_CV: Tensor, y_CV: Tensor, group: str) -> tuple[Tensor, Tensor]:
    if not group:
        return x_CV.log_softmax(1), y_CV.log_softmax(1)
    # a slice's own; e^(x - it) sums to one
    lse_2C = torch.stack((x_CV.logsumexp(1), y_CV.logsumexp(1)))
    top_2C, sum_2C = merge_sums(lse_2C, torch.ones_like(lse_2C), group)
    top_2C1, log_sum_2C1 = top_2C[..., None], sum_2C.log()[..., None]
    return (x_CV - top_2C1[0]) - log_sum_2C1[0], (y_CV - top_2C1[1]) - log_sum_2C1[1]
