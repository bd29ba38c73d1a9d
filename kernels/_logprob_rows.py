"""Row functions of log-probability: [rows, V] logits to per-row statistics, or to the gradient.

One Triton program owns one row and streams it in [R, 8] tiles: axis 1 is 16 bytes of bf16 per
thread, reduced inside the thread, so the loop needs no barrier. Statistics and gradient are two
kernels, because a vocabulary in slices merges the statistics of all ranks in between. Max and
log-sum stay apart until the end: their sum, the logsumexp, would round away the log-sum when the
logits are large. CPU tensors take the PyTorch twin below each kernel.

Targets are rows of the local slice: PADDING marks no token, ELSEWHERE a token of another rank's
slice.

Shapes: T tokens, C rows of a chunk, V vocabulary, K candidates.
Online softmax: Milakov & Gimelshein, arXiv:1805.02867.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._chunks import narrow, wide
from ._divergence import exp_diff
from ._parallel import all_max, all_sum
from ._triton import (
    LAUNCH,
    check_ids,
    launch,
    narrowed,
    runs_triton,
    scalar,
    tl,
    triton,
    triton_dtype,
)

PADDING, ELSEWHERE = -1, -2
LOWEST = -1000.0  # e to it is 0 in fp64, too; stands for -inf where 0 * -inf would be NaN
# candidates the gradient kernel compares with each other at once; more go block by block
PAIRS = 64


class LogProb(NamedTuple):
    logp: Tensor  # [T] or [T, K], like target
    lse: Tensor  # [T]
    entropy: Tensor | None  # [T] if asked for


@triton.jit
def logprob_stats(
    logits,
    target,
    chosen,
    top,
    total,
    weighted,
    stride_t,
    V,
    K,
    inv_temp,
    ENTROPY: tl.constexpr,
    KB: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    inv_temp = scalar(inv_temp, WIDE)
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    row = logits + t * stride_t
    k = tl.arange(0, KB)
    live = 0
    for first in range(0, K, KB):
        y = tl.load(target + t * K + first + k, mask=first + k < K, other=-1)
        x_k = tl.load(row + tl.where(y >= 0, y, 0), mask=y >= 0, other=0.0).to(WIDE) * inv_temp
        tl.store(chosen + t * K + first + k, x_k, mask=first + k < K)
        live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))
    if live == 0:  # an ignored row: its logits are not read
        tl.store(top + t, 0.0)
        tl.store(total + t, 1.0)
        if ENTROPY:
            tl.store(weighted + t, 0.0)
        return

    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = tl.full((R,), float("-inf"), WIDE)  # running max of each lane
    s = tl.zeros((R,), WIDE)  # running sum of exp(x - m)
    # running sum of exp(x - m) (x - m): relative to m nothing cancels at |x| = 1e4
    w = tl.zeros((R,), WIDE)
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
    tl.store(top + t, M)
    tl.store(total + t, tl.sum(s * scale, 0))
    if ENTROPY:
        tl.store(weighted + t, tl.sum(tl.where(scale > 0, scale * (w + s * (m - M)), 0.0), 0))


@triton.jit
def logprob_gradient(
    logits,
    target,
    top,
    log_s,
    entropy,
    g_logp,
    g_all,
    g_entropy,
    scratch,
    dlogits,
    stride_t,
    stride_d,
    V,
    K,
    inv_temp,
    inv_cap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    KB: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    # dx[v] = sum_k g_k 1[v == y_k] + g_all p_v - g_H p_v (log p_v + H);  dlogits = dx / temperature
    inv_temp = scalar(inv_temp, WIDE)
    inv_cap = scalar(inv_cap, WIDE)
    t = tl.program_id(0).to(tl.int64)
    M = tl.load(top + t)
    log_S = tl.load(log_s + t)
    row = logits + t * stride_t
    out = dlogits + t * stride_d
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # ignored, or no distribution at all: nothing is read
    if not (tl.abs(M + log_S) < float("inf")):
        for start in range(0, V, R * 8):
            tl.store(
                out + start + lanes,
                tl.zeros((R, 8), dlogits.dtype.element_ty),
                mask=start + lanes < V,
            )
        return

    c = tl.load(g_all + t).to(WIDE)
    if ENTROPY:
        g_H = tl.load(g_entropy + t).to(WIDE)
        H = tl.load(entropy + t).to(WIDE)
    k = tl.arange(0, KB)
    # Equal candidates are summed by comparison, so the scatter below needs no atomics.
    for first in range(0, K, KB):
        y = tl.load(target + t * K + first + k, mask=first + k < K, other=-1)
        g = tl.zeros((KB,), WIDE)
        for other in range(0, K, KB):
            y_2 = tl.load(target + t * K + other + k, mask=other + k < K, other=-1)
            g_2 = tl.load(g_logp + t * K + other + k, mask=other + k < K, other=0.0).to(WIDE)
            g += tl.sum(tl.where(y[:, None] == y_2[None, :], g_2[None, :], 0.0), 1)
        raw = tl.load(row + tl.where(y >= 0, y, 0), mask=y >= 0, other=0.0).to(WIDE)
        logp = (raw * inv_temp - M) - log_S
        p = tl.exp(logp)
        d = g + p * c
        if ENTROPY:
            d -= tl.where(p > 0, g_H * p * (logp + H), 0.0)
        if CAPPED:
            d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)
        tl.store(scratch + t * K + first + k, d * inv_temp, mask=first + k < K)
    # dlogits may be logits itself: every candidate is read before the sweep overwrites it
    tl.debug_barrier()

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
        tl.store(out + v, narrowed(d * inv_temp, dlogits.dtype.element_ty), mask=v < V)
    tl.debug_barrier()
    for first in range(0, K, KB):
        y = tl.load(target + t * K + first + k, mask=first + k < K, other=-1)
        d = tl.load(scratch + t * K + first + k, mask=first + k < K, other=0.0)
        tl.store(out + tl.where(y >= 0, y, 0), narrowed(d, dlogits.dtype.element_ty), mask=y >= 0)


def _kernel_options(logits_CV: Tensor, K: int) -> dict:
    return {
        "KB": min(triton.next_power_of_2(K), PAIRS),
        "R": max(1, _triton.BLOCK_V // 8),
        "WIDE": triton_dtype(wide(logits_CV.dtype)),
        **LAUNCH,
    }


def check_target(op: str, target: Tensor, T: int, V: int) -> Tensor:
    """target as int64 [T, K], with PADDING where it is not a token."""
    shape = target.shape
    if not (
        len(shape) in (1, 2)
        and shape[0] == T
        and shape[1:] != (0,)
        and not target.is_floating_point()
    ):
        raise ValueError(
            f"{op}: target is {target.dtype} {list(shape)} for {T} rows; want integers [T], or [T, "
            "K] with K >= 1"
        )
    check_ids(op, target, V, distinct=False)
    target_TK = (target[:, None] if target.ndim == 1 else target).long()
    return target_TK.masked_fill((target_TK < 0) | (target_TK >= V), PADDING).contiguous()


def local_target(target_TK: Tensor, start: int, width: int, rows_M: Tensor | None = None) -> Tensor:
    """Ids as rows of the slice start .. start + width. Rows that were not chosen are padding."""
    padding_TK = target_TK == PADDING
    if rows_M is not None:
        left_out_T = torch.ones_like(padding_TK[:, 0]).index_fill_(0, rows_M, False)
        padding_TK = padding_TK | left_out_T[:, None]
    mine_TK = (target_TK >= start) & (target_TK < start + width)
    return torch.where(padding_TK, PADDING, torch.where(mine_TK, target_TK - start, ELSEWHERE))


def logprob_rows(
    logits_CV: Tensor,
    target_CK: Tensor,
    inv_temp: float,
    entropy: bool,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [C, K], lse [C], entropy [C] or empty; for the gradient top and log_s [C].

    lse = top + log_s.
    """
    (C, V), K = logits_CV.shape, target_CK.shape[1]
    if not runs_triton(logits_CV):
        return merge_slices(
            *_stats_torch(logits_CV, target_CK, inv_temp, entropy), target_CK, group
        )
    chosen_CK, top_C, total_C, weighted_C = (
        logits_CV.new_empty(n, dtype=wide(logits_CV.dtype))
        for n in ((C, K), C, C, C if entropy else 0)
    )
    launch(
        logprob_stats,
        (C,),
        logits_CV,
        target_CK,
        chosen_CK,
        top_C,
        total_C,
        weighted_C,
        logits_CV.stride(0),
        V,
        K,
        inv_temp,
        ENTROPY=entropy,
        **_kernel_options(logits_CV, K),
    )
    return merge_slices(chosen_CK, top_C, total_C, weighted_C, target_CK, group)


def merge_slices(
    chosen_CK: Tensor,
    top_C: Tensor,
    total_C: Tensor,
    weighted_C: Tensor,
    target_CK: Tensor,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From a slice's statistics to all slices': one MAX and one SUM of 3 + K numbers a row."""
    peak_C = all_max(top_C.clone(), group) if group else top_C
    x_CK = torch.where(target_CK >= 0, chosen_CK - peak_C[:, None], 0.0)
    if group:
        # nothing in this slice: its sums are 0
        shift_C = torch.where(top_C == -torch.inf, 0.0, top_C - peak_C)
        parts = [x_CK, (total_C * shift_C.exp())[:, None]]
        if weighted_C.numel():
            parts.append(((weighted_C + total_C * shift_C) * shift_C.exp())[:, None])
        x_CK, total_C, *weighted = all_sum(torch.cat(parts, 1), group).split(
            [x_CK.shape[1]] + [1] * (len(parts) - 1), 1
        )
        total_C, weighted_C = total_C[:, 0], weighted[0][:, 0] if weighted else weighted_C
    ignored_C = (target_CK == PADDING).all(1)
    log_s_C = total_C.log()
    logp_CK = torch.where(target_CK == PADDING, 0.0, x_CK - log_s_C[:, None])
    lse_C = torch.where(ignored_C, 0.0, peak_C + log_s_C)
    if weighted_C.numel():
        weighted_C = torch.where(ignored_C, 0.0, log_s_C - weighted_C / total_C)
    # An infinite log-sum tells the gradient that a row is ignored, whatever stands in its logits.
    return (
        logp_CK,
        lse_C,
        weighted_C,
        torch.where(ignored_C, 0.0, peak_C),
        torch.where(ignored_C, torch.inf, log_s_C),
    )


def upstream(
    target_CK: Tensor,
    logp_CK: Tensor,
    g_logp_CK: Tensor,
    g_lse_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(g_logp, g_all) for `logprob_gradient_`.

    g_logp is what each candidate gets, g_all = g_lse - sum g_logp the factor of all p_v. A
    candidate whose log-probability is not finite gets nothing and takes nothing from the others.
    """
    g_CK = torch.where((target_CK != PADDING) & logp_CK.isfinite(), g_logp_CK, 0.0).contiguous()
    return g_CK, -g_CK.sum(1) if g_lse_C is None else g_lse_C - g_CK.sum(1)


def logprob_gradient_(
    logits_CV: Tensor,
    target_CK: Tensor,
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    inv_temp: float,
    softcap: float,
    out_CV: Tensor,
) -> Tensor:
    """Writes dlogits into out, which may be logits.

    saved: top, log_s, entropy; grads: g_logp, g_all, g_entropy.
    """
    (C, V), K = logits_CV.shape, target_CK.shape[1]
    if not runs_triton(logits_CV):
        return _gradient_torch_(logits_CV, target_CK, saved, grads, inv_temp, softcap, out_CV)
    scratch_CK = torch.empty_like(grads[0])
    launch(
        logprob_gradient,
        (C,),
        logits_CV,
        target_CK,
        *saved,
        *grads,
        scratch_CK,
        out_CV,
        logits_CV.stride(0),
        out_CV.stride(0),
        V,
        K,
        inv_temp,
        1 / softcap if softcap else 0.0,
        ENTROPY=saved[2].numel() > 0,
        CAPPED=softcap > 0,
        **_kernel_options(logits_CV, K),
    )
    return out_CV


def _scaled(logits_CV: Tensor, inv_temp: float) -> Tensor:
    x_CV = logits_CV.to(wide(logits_CV.dtype))
    return x_CV if inv_temp == 1 else x_CV * inv_temp


def _stats_torch(
    logits_CV: Tensor, target_CK: Tensor, inv_temp: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # a slice of nothing but padding: a maximum wants something to look at
    if not logits_CV.shape[1]:
        logits_CV = logits_CV.new_full((logits_CV.shape[0], 1), -torch.inf)
    x_CV = _scaled(logits_CV, inv_temp)
    chosen_CK = x_CV.gather(1, target_CK.clamp(min=0))
    top_C = x_CV.amax(1)
    shifted_CV = x_CV - torch.where(top_C == -torch.inf, 0.0, top_C)[:, None]
    if not entropy:
        return chosen_CK, top_C, shifted_CV.exp_().sum(1), top_C.new_empty(0)
    e_CV = shifted_CV.exp()
    return chosen_CK, top_C, e_CV.sum(1), e_CV.mul_(shifted_CV.clamp_(min=LOWEST)).sum(1)


def _gradient_torch_(
    logits_CV: Tensor,
    target_CK: Tensor,
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    inv_temp: float,
    softcap: float,
    out_CV: Tensor,
) -> Tensor:
    (top_C, log_s_C, entropy_C), (g_logp_CK, g_all_C, g_entropy_C) = saved, grads
    logp_CV = (_scaled(logits_CV, inv_temp) - top_C[:, None]).sub_(log_s_C[:, None])
    d_CV = logp_CV.exp()
    if entropy_C.numel():
        d_CV.mul_(
            logp_CV.clamp_(min=LOWEST)
            .add_(entropy_C[:, None])
            .mul_(-g_entropy_C[:, None])
            .add_(g_all_C[:, None])
        )
    else:
        d_CV.mul_(g_all_C[:, None])
    if d_CV.shape[1]:
        d_CV.scatter_add_(1, target_CK.clamp(min=0), torch.where(target_CK >= 0, g_logp_CK, 0.0))
    if softcap:
        d_CV.mul_(1 - (logits_CV / softcap).square_())
    dead_C1 = ~(top_C + log_s_C).isfinite()[:, None]  # ignored, or no distribution at all
    return out_CV.copy_(narrow(d_CV.mul_(inv_temp).masked_fill_(dead_C1, 0.0), out_CV))
