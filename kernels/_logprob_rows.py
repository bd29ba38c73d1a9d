"""Row functions of log-probability: a [rows, V] block of logits in, per-row results or the gradient out.

One Triton program owns one row and streams it in [R, 8] tiles: axis 1 is 16 bytes of bf16 per thread, reduced inside the
thread, so the loop needs no barrier. Max and log-sum stay apart until the end: their sum, the logsumexp, would round
away the log-sum when the logits are large. CPU tensors take the PyTorch twin below each kernel.

Shapes: C rows of a chunk, V vocabulary, K candidates.  Online softmax: Milakov & Gimelshein, arXiv:1805.02867.
"""
import torch
from torch import Tensor

from . import _triton
from ._chunks import wide
from ._divergence import exp_diff
from ._triton import LAUNCH, runs_triton, tl, triton


@triton.jit
def logprob_forward(logits, target, logp, top, log_s, entropy, stride_t, V, K, inv_temp,
                    ENTROPY: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    k = tl.arange(0, KB)
    y = tl.load(target + t * K + k, mask=k < K, other=-1)
    if tl.max(y, 0) < 0:  # an ignored row
        tl.store(logp + t * K + k, tl.zeros((KB,), WIDE), mask=k < K)
        tl.store(top + t, 0.0)
        tl.store(log_s + t, 0.0)
        if ENTROPY:
            tl.store(entropy + t, 0.0)
        return

    row = logits + t * stride_t
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = tl.full((R,), float("-inf"), WIDE)  # running max of each lane
    s = tl.zeros((R,), WIDE)  # running sum of exp(x - m)
    w = tl.zeros((R,), WIDE)  # running sum of exp(x - m) (x - m): relative to m nothing cancels at |x| = 1e4
    for start in range(0, V, R * 8):
        v = start + lanes
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE) * inv_temp
        m_new = tl.maximum(m, tl.max(x, 1))
        scale = exp_diff(m, m_new)
        e = exp_diff(x, m_new[:, None])
        if ENTROPY:
            w = tl.where(scale > 0, scale * (w + s * (m - m_new)), 0.0)
            w += tl.sum(tl.where(e > 0, e * (x - m_new[:, None]), 0.0), 1)
        s = s * scale + tl.sum(e, 1)
        m = m_new

    M = tl.max(m, 0)
    scale = exp_diff(m, M)
    S = tl.sum(s * scale, 0)
    tl.store(top + t, M)
    tl.store(log_s + t, tl.log(S))
    if ENTROPY:
        W = tl.sum(tl.where(scale > 0, scale * (w + s * (m - M)), 0.0), 0)
        tl.store(entropy + t, tl.log(S) - W / S)
    chosen = (k < K) & (y >= 0)
    x = tl.load(row + tl.where(chosen, y, 0), mask=chosen, other=0.0).to(WIDE) * inv_temp
    tl.store(logp + t * K + k, tl.where(chosen, (x - M) - tl.log(S), 0.0), mask=k < K)


@triton.jit
def logprob_backward(logits, target, top, log_s, entropy, g_logp, g_lse, g_entropy, dlogits, stride_t, stride_d, V, K,
                     inv_temp, inv_cap, ENTROPY: tl.constexpr, CAPPED: tl.constexpr, KB: tl.constexpr, R: tl.constexpr,
                     WIDE: tl.constexpr):
    # dx[v] = sum_k g_k (1[v == y_k] - p_v) + g_lse p_v - g_H p_v (log p_v + H);  dlogits = dx / temperature
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KB)
    y = tl.load(target + t * K + k, mask=k < K, other=-1)
    M = tl.load(top + t)
    log_S = tl.load(log_s + t)
    alive = (tl.max(y, 0) >= 0) & (tl.abs(M + log_S) < float("inf"))  # else ignored, or no distribution at all
    g = tl.load(g_logp + t * K + k, mask=k < K, other=0.0).to(WIDE)
    g = tl.where(y >= 0, g, 0.0)
    c = tl.load(g_lse + t).to(WIDE) - tl.sum(g, 0)
    if ENTROPY:
        g_H = tl.load(g_entropy + t).to(WIDE)
        H = tl.load(entropy + t).to(WIDE)

    row = logits + t * stride_t
    out = dlogits + t * stride_d
    # Duplicate candidates are summed by comparison, so the scatter below needs no atomics.
    chosen = (k < K) & (y >= 0)
    at = tl.where(chosen, y, 0)
    g_id = tl.sum(tl.where(y[:, None] == y[None, :], g[None, :], 0.0), 1)
    raw_k = tl.load(row + at, mask=chosen, other=0.0).to(WIDE)
    logp_k = (raw_k * inv_temp - M) - log_S
    p_k = tl.exp(logp_k)
    d_k = g_id + p_k * c
    if ENTROPY:
        d_k -= tl.where(p_k > 0, g_H * p_k * (logp_k + H), 0.0)
    if CAPPED:
        d_k *= 1.0 - (raw_k * inv_cap) * (raw_k * inv_cap)
    tl.debug_barrier()  # dlogits may be logits itself: every candidate is read before the sweep overwrites it

    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for start in range(0, V, R * 8):
        v = start + lanes
        raw = tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE)
        logp = (raw * inv_temp - M) - log_S
        p = tl.exp(logp)
        d = p * c
        if ENTROPY:
            d -= tl.where(p > 0, g_H * p * (logp + H), 0.0)
        if CAPPED:
            d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)
        tl.store(out + v, tl.where(alive, d * inv_temp, 0.0).to(dlogits.dtype.element_ty), mask=v < V)
    tl.debug_barrier()
    tl.store(out + at, tl.where(alive, d_k * inv_temp, 0.0).to(dlogits.dtype.element_ty), mask=chosen)


def _kernel_options(logits_CV: Tensor, K: int) -> dict:
    double = wide(logits_CV.dtype) == torch.float64
    return {"KB": triton.next_power_of_2(K), "R": max(1, _triton.BLOCK_V // 8),
            "WIDE": tl.float64 if double else tl.float32, **LAUNCH}


def logprob_rows(logits_CV: Tensor, target_CK: Tensor, inv_temp: float, entropy: bool) -> tuple[Tensor, ...]:
    """(logp [C, K], top [C], log_s [C], entropy [C] or empty). logsumexp = top + log_s."""
    (C, V), K = logits_CV.shape, target_CK.shape[1]
    if not runs_triton(logits_CV):
        return _logprob_rows_torch(logits_CV, target_CK, inv_temp, entropy)
    dtype = wide(logits_CV.dtype)
    logp_CK = logits_CV.new_empty(C, K, dtype=dtype)
    top_C, log_s_C, entropy_C = (logits_CV.new_empty(n, dtype=dtype) for n in (C, C, C if entropy else 0))
    logprob_forward[(C,)](logits_CV, target_CK, logp_CK, top_C, log_s_C, entropy_C, logits_CV.stride(0), V, K, inv_temp,
                          ENTROPY=entropy, **_kernel_options(logits_CV, K))
    return logp_CK, top_C, log_s_C, entropy_C


def logprob_rows_backward(logits_CV: Tensor, target_CK: Tensor, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...],
                          inv_temp: float, softcap: float, out_CV: Tensor) -> Tensor:
    """dlogits [C, V]; a kernel writes it to out, which may be logits. saved: top, log_s, entropy; grads: of logp, lse,
    entropy."""
    (C, V), K = logits_CV.shape, target_CK.shape[1]
    if not runs_triton(logits_CV):
        return _logprob_rows_backward_torch(logits_CV, target_CK, saved[2], grads, inv_temp, softcap)
    logprob_backward[(C,)](logits_CV, target_CK, *saved, *grads, out_CV, logits_CV.stride(0), out_CV.stride(0), V, K,
                           inv_temp, 1 / softcap if softcap else 0.0, ENTROPY=saved[2].numel() > 0, CAPPED=softcap > 0,
                           **_kernel_options(logits_CV, K))
    return out_CV


def _log_softmax(logits_CV: Tensor, inv_temp: float) -> Tensor:
    x_CV = logits_CV.to(wide(logits_CV.dtype))
    return (x_CV if inv_temp == 1 else x_CV * inv_temp).log_softmax(-1)


def _logprob_rows_torch(logits_CV: Tensor, target_CK: Tensor, inv_temp: float, entropy: bool) -> tuple[Tensor, ...]:
    logp_CV = _log_softmax(logits_CV, inv_temp)
    logp_CK = logp_CV.gather(1, target_CK.clamp(min=0)).masked_fill_(target_CK < 0, 0.0)
    ignored_C = (target_CK < 0).all(1)
    log_s_C = logp_CV.amax(1).neg_().masked_fill_(ignored_C, 0.0)
    top_C = logits_CV.amax(1).to(log_s_C.dtype).mul_(inv_temp).masked_fill_(ignored_C, 0.0)
    if not entropy:
        return logp_CK, top_C, log_s_C, logits_CV.new_empty(0, dtype=log_s_C.dtype)
    p_CV = logp_CV.exp()
    lowest = torch.finfo(logp_CV.dtype).min  # 0 * -inf would be NaN
    entropy_C = p_CV.mul_(logp_CV.clamp_(min=lowest)).sum(1).neg_().masked_fill_(ignored_C, 0.0)
    return logp_CK, top_C, log_s_C, entropy_C


def _logprob_rows_backward_torch(logits_CV: Tensor, target_CK: Tensor, entropy_C: Tensor, grads: tuple[Tensor, ...],
                                 inv_temp: float, softcap: float) -> Tensor:
    g_logp_CK, g_lse_C, g_entropy_C = grads
    logp_CV = _log_softmax(logits_CV, inv_temp)
    g_CK = g_logp_CK.masked_fill(target_CK < 0, 0.0)
    c_C1 = (g_lse_C - g_CK.sum(1))[:, None]
    d_CV = logp_CV.exp()
    if entropy_C.numel():
        logp_CV.clamp_(min=torch.finfo(logp_CV.dtype).min)  # 0 * -inf would be NaN
        d_CV.mul_(logp_CV.add_(entropy_C[:, None]).mul_(-g_entropy_C[:, None]).add_(c_C1))
    else:
        d_CV.mul_(c_C1)
    d_CV.scatter_add_(1, target_CK.clamp(min=0), g_CK)
    if softcap:
        d_CV.mul_(1 - (logits_CV / softcap).square_())
    dead_C = (target_CK < 0).all(1) | ~logits_CV.amax(1).isfinite()  # ignored, or no distribution at all
    return d_CV.mul_(inv_temp).masked_fill_(dead_C[:, None], 0.0)
