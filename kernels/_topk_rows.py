"""Row function of the truncated divergences: a [rows, V] block of student logits against kept teacher rows.

The K logits of the support are lifted out and -inf written in their place; the streaming logsumexp of what is left *is*
the tail. No log(1 - sum p), which returns nothing at a tail of 1e-9. The gradient sweep then writes the tail's gradient
(0 at the support, where exp(-inf) stands) and the K gradients of the support go on top.

Shapes: C rows of a chunk, V vocabulary, K kept ids.
"""
import torch
from torch import Tensor

from . import _triton
from ._divergence import MODES, divergence_terms, exp_diff, terms
from ._triton import LAUNCH, runs_triton, tl, triton

TAILS = ("ghost", "renorm", "drop", "sampled")  # their index is TAIL in the kernel


@triton.jit
def topk_sweeps(z, ids, teacher_logp, teacher_tail, kl, coeff, stride_z, V, K, inv_temp, inv_cap, beta,
                MODE: tl.constexpr, TAIL: tl.constexpr, GRADIENT: tl.constexpr, CAPPED: tl.constexpr, KB: tl.constexpr,
                R: tl.constexpr, WIDE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    row = z + t * stride_z
    k = tl.arange(0, KB)
    y = tl.load(ids + t * K + k, mask=k < K, other=-1)
    logq = tl.load(teacher_logp + t * K + k, mask=k < K, other=float("-inf")).to(WIDE)
    live = (k < K) & (y >= 0) & (y < V) & (logq > float("-inf"))
    n_live = tl.sum(live.to(tl.int32), 0)
    y = tl.where(live, y, 0)
    logq = tl.where(live, logq, float("-inf"))
    raw_k = tl.load(row + y, mask=live, other=float("-inf")).to(WIDE)
    a_k = raw_k * inv_temp
    tl.debug_barrier()  # every read of the support before any thread knocks it out
    tl.store(row + y, tl.full((KB,), float("-inf"), z.dtype.element_ty), mask=live)
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
    tail_lse = tl.where(M == float("-inf"), float("-inf"), M + tl.log(tl.sum(s * exp_diff(m, M), 0)))
    m_k = tl.max(a_k, 0)
    support_lse = tl.where(m_k == float("-inf"), float("-inf"), m_k + tl.log(tl.sum(exp_diff(a_k, m_k), 0)))
    top = tl.maximum(support_lse, tail_lse)
    lse = top + tl.log(exp_diff(support_lse, top) + exp_diff(tail_lse, top))

    if TAIL == 1:
        m_q = tl.max(logq, 0)
        logq = tl.where(live, logq - (m_q + tl.log(tl.sum(exp_diff(logq, m_q), 0))), float("-inf"))
        logp = tl.where(live, a_k - support_lse, float("-inf"))
    else:
        logp = tl.where(live, a_k - lse, float("-inf"))
    one, g = terms(logp, logq, logp - logq, beta, MODE)
    if TAIL == 3:
        one = tl.where(live, -tl.exp(logq) * logp, 0.0)
    loss = tl.sum(one, 0)
    G = tl.sum(g, 0)
    g_tail = loss * 0.0
    p_tail = loss * 0.0
    if TAIL == 0:
        logp_tail = tail_lse - lse
        logq_tail = tl.load(teacher_tail + t).to(WIDE)
        logq_tail = tl.where(n_live == V, float("-inf"), logq_tail)  # no tail, whatever its mass was rounded to
        l_tail, g_tail = terms(logp_tail, logq_tail, logp_tail - logq_tail, beta, MODE)
        loss += l_tail
        G += g_tail
    if TAIL != 1:
        p_tail = tl.exp(tail_lse - lse)
    loss = tl.where(n_live > 0, loss, 0.0)
    tl.store(kl + t, loss)
    if GRADIENT:
        ok = (tl.abs(loss) < float("inf")) & (n_live > 0)
        c = tl.load(coeff + t).to(WIDE) * inv_temp
        c_tail = c * (g_tail - G * p_tail)  # shared out by exp(a - tail_lse)
        if TAIL == 1:
            c_tail = c * 0.0  # the partition function cancels: nothing outside the support moves
        base = tl.where(tail_lse == float("-inf"), 0.0, tail_lse)
        for start in range(0, V, R * 8):
            v = start + lanes
            raw = tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE)
            e = tl.exp(raw * inv_temp - base)
            d = c_tail * e
            if CAPPED:
                d = tl.where(e > 0, d * (1.0 - (raw * inv_cap) * (raw * inv_cap)), 0.0)
            tl.store(row + v, tl.where(ok, d, 0.0).to(z.dtype.element_ty), mask=v < V)
        tl.debug_barrier()  # the sweep has written the support's zeros before their gradients land
        d_k = c * (g - tl.exp(logp) * G)
        if CAPPED:
            d_k *= 1.0 - (raw_k * inv_cap) * (raw_k * inv_cap)
        tl.store(row + y, tl.where(ok, d_k, 0.0).to(z.dtype.element_ty), mask=live)


def topk_rows_(z_CV: Tensor, ids_CK: Tensor, teacher_logp_CK: Tensor, teacher_tail_C: Tensor, coeff_C: Tensor,
               inv_temp: float, mode: str, tail: str, beta: float, softcap: float, gradient: bool) -> Tensor:
    """kl [C]. Overwrites z, fp32 or fp64, with coeff * dkl/dz if gradient, else with nothing of use."""
    C, V = z_CV.shape
    if not runs_triton(z_CV):
        return _topk_rows_torch_(z_CV, ids_CK, teacher_logp_CK, teacher_tail_C, coeff_C, inv_temp, mode, tail, beta,
                                 softcap, gradient)
    kl_C = z_CV.new_empty(C)
    topk_sweeps[(C,)](z_CV, ids_CK, teacher_logp_CK, teacher_tail_C, kl_C, coeff_C, z_CV.stride(0), V, ids_CK.shape[1],
                      inv_temp, 1 / softcap if softcap else 0.0, beta, MODE=MODES.index(mode), TAIL=TAILS.index(tail),
                      GRADIENT=gradient, CAPPED=softcap > 0, KB=triton.next_power_of_2(ids_CK.shape[1]),
                      R=max(1, _triton.BLOCK_V // 8), WIDE=tl.float64 if z_CV.dtype == torch.float64 else tl.float32,
                      **LAUNCH)
    return kl_C


def _class_terms(a_CK, tail_lse_C1, logq_CK, logq_tail_C1, mode: str, tail: str, beta: float):
    """(kl [C], g [C, K], p [C, K], G [C, 1], the tail's share of dkl [C, 1]) from the support and the tail's lse."""
    support_lse_C1 = a_CK.logsumexp(1, keepdim=True)
    if tail == "renorm":
        loss, g, p = divergence_terms(a_CK - support_lse_C1, logq_CK - logq_CK.logsumexp(1, keepdim=True), mode, beta)
        return loss.sum(1), g, p, g.sum(1, keepdim=True), torch.zeros_like(tail_lse_C1)
    lse_C1 = torch.logaddexp(support_lse_C1, tail_lse_C1)
    logp_CK, logp_tail_C1 = a_CK - lse_C1, tail_lse_C1 - lse_C1
    if tail == "ghost":  # one more class
        loss, g, p = divergence_terms(torch.cat([logp_CK, logp_tail_C1], 1), torch.cat([logq_CK, logq_tail_C1], 1),
                                      mode, beta)
        G_C1 = g.sum(1, keepdim=True)
        return loss.sum(1), g[:, :-1], p[:, :-1], G_C1, g[:, -1:] - p[:, -1:] * G_C1
    loss, g, p = divergence_terms(logp_CK, logq_CK, mode, beta)
    if tail == "sampled":
        loss = torch.where(g < 0, g * logp_CK, 0.0)  # forward: g is -q
    G_C1 = g.sum(1, keepdim=True)
    return loss.sum(1), g, p, G_C1, -logp_tail_C1.exp() * G_C1


def _topk_rows_torch_(z_CV: Tensor, ids_CK: Tensor, teacher_logp_CK: Tensor, teacher_tail_C: Tensor, coeff_C: Tensor,
                      inv_temp: float, mode: str, tail: str, beta: float, softcap: float, gradient: bool) -> Tensor:
    V = z_CV.shape[1]
    live_CK = (ids_CK >= 0) & (ids_CK < V) & (teacher_logp_CK > -torch.inf)
    logq_CK = teacher_logp_CK.masked_fill(~live_CK, -torch.inf)
    live_row_C = live_CK.any(1)
    # Padding points at a live id of its row: knocked out anyway, and adding 0 there changes nothing.
    first_C1 = live_CK.int().argmax(1, keepdim=True)
    ids_CK = torch.where(live_CK, ids_CK, ids_CK.gather(1, first_C1).clamp(0, V - 1)).long()
    cap_CV = 1 - (z_CV / softcap).square_() if softcap and gradient else None
    a_CV = z_CV.mul_(inv_temp)
    a_CK = a_CV.gather(1, ids_CK).masked_fill_(~live_CK, -torch.inf)
    a_CV.scatter_(1, ids_CK, -torch.inf)
    tail_lse_C1 = a_CV.logsumexp(1, keepdim=True)
    no_tail_C = live_CK.sum(1) == V  # whatever its mass was rounded to
    logq_tail_C1 = teacher_tail_C.masked_fill(no_tail_C, -torch.inf)[:, None]
    kl_C, g_CK, p_CK, G_C1, share_C1 = _class_terms(a_CK, tail_lse_C1, logq_CK, logq_tail_C1, mode, tail, beta)
    kl_C = kl_C.masked_fill(~live_row_C, 0.0)
    if not gradient:
        return kl_C
    d_CV = a_CV.sub_(tail_lse_C1.masked_fill(tail_lse_C1 == -torch.inf, 0.0)).exp_().mul_(share_C1)
    d_CV.scatter_add_(1, ids_CK, (g_CK - p_CK * G_C1).masked_fill_(~live_CK, 0.0))
    if cap_CV is not None:
        d_CV.mul_(cap_CV)
    d_CV.mul_((coeff_C * inv_temp)[:, None]).masked_fill_(~(kl_C.isfinite() & live_row_C)[:, None], 0.0)
    return kl_C
