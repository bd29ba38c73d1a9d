"""Row function of the full-vocabulary divergences: two [rows, V] blocks of logits in, kl and the student's gradient out.

Sweep 1 streams both rows and keeps, per lane of an [R, 8] tile, the running max and sum of each side; for forward and
reverse KL also sum e^(b - m) (b - a), which already is the loss. jsd and skew need a sweep for the loss and G. The last
sweep writes the gradient, which may overwrite the logits. log p - log q is formed as (a - b) - (difference of the maxima
+ difference of the log-sums): near p = q that has a third of the error of subtracting two logsumexps.

Shapes: C rows of a chunk, V vocabulary.
"""
import torch
from torch import Tensor

from . import _triton
from ._chunks import wide
from ._divergence import MODES, divergence_terms, exp_diff, terms
from ._triton import LAUNCH, runs_triton, tl, triton


@triton.jit
def kl_sweeps(z, u, kl, coeff, dz, stride_z, stride_u, stride_d, V, inv_temp, inv_cap, beta, MODE: tl.constexpr,
              GRADIENT: tl.constexpr, CAPPED: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    z_row = z + t * stride_z
    u_row = u + t * stride_u
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    m_z = tl.full((R,), float("-inf"), WIDE)
    m_u = tl.full((R,), float("-inf"), WIDE)
    s_z = tl.zeros((R,), WIDE)
    s_u = tl.zeros((R,), WIDE)
    w = tl.zeros((R,), WIDE)
    for start in range(0, V, R * 8):
        v = start + lanes
        a = tl.load(z_row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
        b = tl.load(u_row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
        new_z = tl.maximum(m_z, tl.max(a, 1))
        new_u = tl.maximum(m_u, tl.max(b, 1))
        scale_z = exp_diff(m_z, new_z)
        scale_u = exp_diff(m_u, new_u)
        e_z = exp_diff(a, new_z[:, None])
        e_u = exp_diff(b, new_u[:, None])
        s_z = s_z * scale_z + tl.sum(e_z, 1)
        s_u = s_u * scale_u + tl.sum(e_u, 1)
        if MODE == 0:
            w = w * scale_u + tl.sum(tl.where(e_u > 0, e_u * (b - a), 0.0), 1)
        if MODE == 1:
            w = w * scale_z + tl.sum(tl.where(e_z > 0, e_z * (a - b), 0.0), 1)
        m_z = new_z
        m_u = new_u
    M_z = tl.max(m_z, 0)
    M_u = tl.max(m_u, 0)
    scale_z = exp_diff(m_z, M_z)
    scale_u = exp_diff(m_u, M_u)
    S_z = tl.sum(s_z * scale_z, 0)
    S_u = tl.sum(s_u * scale_u, 0)
    log_S_z = tl.log(S_z)
    log_S_u = tl.log(S_u)
    apart = (M_z - M_u) + (log_S_z - log_S_u)  # lse_z - lse_u
    if MODE == 0:
        loss = tl.sum(tl.where(scale_u > 0, w * scale_u, 0.0), 0) / S_u + apart
        G = loss * 0.0 - 1.0
    elif MODE == 1:
        loss = tl.sum(tl.where(scale_z > 0, w * scale_z, 0.0), 0) / S_z - apart
        G = loss
    else:
        sum_l = tl.zeros((R,), WIDE)
        sum_g = tl.zeros((R,), WIDE)
        for start in range(0, V, R * 8):
            v = start + lanes
            a = tl.load(z_row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
            b = tl.load(u_row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
            one, g = terms((a - M_z) - log_S_z, (b - M_u) - log_S_u, (a - b) - apart, beta, MODE)
            sum_l += tl.sum(one, 1)
            sum_g += tl.sum(g, 1)
        loss = tl.sum(sum_l, 0)
        G = tl.sum(sum_g, 0)
    tl.store(kl + t, loss)
    if GRADIENT:
        ok = tl.abs(loss) < float("inf")  # false for inf and for NaN: such a row gets no gradient
        c = tl.load(coeff + t).to(WIDE) * inv_temp
        d_row = dz + t * stride_d
        for start in range(0, V, R * 8):
            v = start + lanes
            raw = tl.load(z_row + v, mask=v < V, other=float("-inf")).to(WIDE)
            a = raw * inv_temp
            b = tl.load(u_row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
            logp = (a - M_z) - log_S_z
            _, g = terms(logp, (b - M_u) - log_S_u, (a - b) - apart, beta, MODE)
            d = c * (g - tl.exp(logp) * G)
            if CAPPED:
                d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)
            tl.store(d_row + v, tl.where(ok, d, 0.0).to(dz.dtype.element_ty), mask=v < V)


def kl_rows(z_CV: Tensor, u_CV: Tensor, coeff_C: Tensor, inv_temp: float, mode: str, beta: float, softcap: float,
            dz_CV: Tensor | None) -> Tensor:
    """kl [C] of student logits z and teacher logits u. Writes coeff * dkl/dz into dz, which may be z; None skips it."""
    if not runs_triton(z_CV):
        return _kl_rows_torch(z_CV, u_CV, coeff_C, inv_temp, mode, beta, softcap, dz_CV)
    (C, V), dtype = z_CV.shape, wide(z_CV.dtype)
    kl_C = z_CV.new_empty(C, dtype=dtype)
    out_CV = z_CV if dz_CV is None else dz_CV
    kl_sweeps[(C,)](z_CV, u_CV, kl_C, coeff_C, out_CV, z_CV.stride(0), u_CV.stride(0), out_CV.stride(0), V, inv_temp,
                    1 / softcap if softcap else 0.0, beta, MODE=MODES.index(mode), GRADIENT=dz_CV is not None,
                    CAPPED=softcap > 0, R=max(1, _triton.BLOCK_V // 8),
                    WIDE=tl.float64 if dtype == torch.float64 else tl.float32, **LAUNCH)
    return kl_C


def _kl_rows_torch(z_CV: Tensor, u_CV: Tensor, coeff_C: Tensor, inv_temp: float, mode: str, beta: float,
                   softcap: float, dz_CV: Tensor | None) -> Tensor:
    logp_CV, logq_CV = ((x if inv_temp == 1 else x * inv_temp).log_softmax(-1)
                        for x in (x.to(wide(x.dtype)) for x in (z_CV, u_CV)))
    loss_CV, g_CV, p_CV = divergence_terms(logp_CV, logq_CV, mode, beta)
    kl_C = loss_CV.sum(1)
    if dz_CV is None:
        return kl_C
    d_CV = torch.addcmul(g_CV, p_CV, g_CV.sum(1, keepdim=True), value=-1).mul_((coeff_C * inv_temp)[:, None])
    if softcap:
        d_CV.mul_(1 - (z_CV / softcap).square_())
    dz_CV.copy_(d_CV.masked_fill_(~kl_C.isfinite()[:, None], 0.0))
    return kl_C
