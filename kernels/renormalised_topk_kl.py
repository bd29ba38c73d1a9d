"""Divergence of student and teacher, each renormalised over K ids: no GEMM, no [T, V] logits.

    z[t, k] = softcap tanh(logit_scale (hidden[t] . head[ids[t, k]] + bias[ids[t, k]]) / softcap),
        no tanh without a softcap
    p = softmax_k(z / temperature),  q = softmax_k(teacher_logp)
    kl[t] = D(p[t], q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in
        _divergence.py)
    total = sum_t weight[t] kl[t], with its gradients made in the forward, as in linear_kl

The partition function cancels, so only K head rows a token are read: twice for hidden, and the K
hidden rows of an id once for the head, 3 T K D elements in all against three GEMMs of T V D
multiply-adds. On a GPU with 184 FLOP a byte both take equally long at K = V / 184 if rows stream at
full bandwidth; as rows are gathered, `gather_is_cheaper` wants K <= V / 600. Where it holds,
linear_topk_kl(tail="renorm") calls this op by itself.

The head's gradient sorts the (id, token) pairs once and sums the hidden rows of each id in that
order: no atomics, the same bits every time, and no fp32 copy of the head.

ids < 0 or >= V, and a teacher_logp of -inf, are padding; a row with fewer than two ids has kl 0 and
no gradient. The ids of a row must be distinct (checked with REFLUX_KERNELS_DEBUG=1). A row whose kl
is inf or NaN keeps it and contributes a zero gradient. The loss does not see mass that leaves the
ids: see the tails of topk_tail_kl.

Shapes: T tokens, M chosen rows, K top-k ids, D hidden, V vocabulary, N = M K pairs of row and id, C
rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _triton
from ._chunks import CPU_CHUNK_BYTES, wide
from ._divergence import divergence_ref
from ._head import Head, checked_head
from ._loss import (
    LinearKL,
    LossOptions,
    fake_head_loss,
    loss_factor,
    loss_ref,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from ._parallel import VocabShard, all_sum, local_width, slice_of
from ._topk_inputs import check_tail, check_topk, local_ids, topk_inputs
from ._topk_rows import TopKSpec, topk_terms_of
from ._triton import LAUNCH, launch, runs_triton, tl, triton, triton_dtype

# of the vocabulary: V / 184 is where both take equally long if gathers stream at full bandwidth
GATHER_BELOW = 1 / 600
# head or hidden rows a program reads at once, BLOCK_V / 8 columns each: no spills, not timed yet
ROWS = 16


def gather_is_cheaper(K: int, V: int) -> bool:
    return K <= V * GATHER_BELOW


def renormalised_topk_kl_ref(
    hidden_TD: Tensor,
    head_VD: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> LinearKL:
    """The definition, with [T, K, D] in memory. fp32 arithmetic, or fp64 when given fp64."""
    dtype, V = wide(hidden_TD.dtype), len(head_VD) if vocab_size is None else vocab_size
    live_TK = (ids_TK >= 0) & (ids_TK < V) & (teacher_logp_TK != -torch.inf)
    safe_TK = torch.where(live_TK, ids_TK, 0).long()
    z_TK = torch.einsum("td,tkd->tk", hidden_TD.to(dtype), head_VD.to(dtype)[safe_TK])
    z_TK = logit_scale * (z_TK if bias is None else z_TK + bias.to(dtype)[safe_TK])
    a_TK = (softcap * torch.tanh(z_TK / softcap) if softcap else z_TK) / temperature
    logp_TK, logq_TK = (
        x.to(dtype).masked_fill(~live_TK, -torch.inf).log_softmax(1)
        for x in (a_TK, teacher_logp_TK)
    )
    kl_T = torch.where(live_TK.any(1), divergence_ref(logp_TK, logq_TK, divergence, beta), 0.0)
    return loss_ref(kl_T, weight, rows, temperature**2 if scale_t2 else 1.0)


@triton.jit
def gather_dot(
    x,
    w,
    ids,
    dots,
    stride_x,
    stride_v,
    stride_w,
    D,
    K,
    KB: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * KB + tl.arange(0, KB)
    y = tl.load(ids + t * K + k, mask=k < K, other=-1)
    row = w + tl.where(y >= 0, y, 0).to(tl.int64)[:, None] * stride_v
    acc = tl.zeros((KB, DB), WIDE)
    for start in range(0, D, DB):
        d = start + tl.arange(0, DB)
        x_d = tl.load(x + t * stride_x + d, mask=d < D, other=0.0).to(WIDE)
        w_kd = tl.load(
            row + (d * stride_w)[None, :], mask=(y >= 0)[:, None] & (d < D)[None, :], other=0.0
        ).to(WIDE)
        acc += w_kd * x_d[None, :]
    tl.store(dots + t * K + k, tl.sum(acc, 1), mask=k < K)


@triton.jit
def gather_rows(
    w,
    ids,
    c_k,
    dx,
    stride_v,
    stride_w,
    D,
    K,
    KB: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DB + tl.arange(0, DB)
    acc = tl.zeros((KB, DB), WIDE)
    for start in range(0, K, KB):
        k = start + tl.arange(0, KB)
        y = tl.load(ids + t * K + k, mask=k < K, other=-1)
        c = tl.load(c_k + t * K + k, mask=k < K, other=0.0).to(WIDE)
        row = w + tl.where(y >= 0, y, 0).to(tl.int64)[:, None] * stride_v
        w_kd = tl.load(
            row + (d * stride_w)[None, :], mask=(y >= 0)[:, None] & (d < D)[None, :], other=0.0
        ).to(WIDE)
        acc += c[:, None] * w_kd
    tl.store(dx + t * D + d, tl.sum(acc, 0).to(dx.dtype.element_ty), mask=d < D)


@triton.jit
def sum_pairs(
    x,
    order,
    c_n,
    offset,
    dhead,
    stride_x,
    D,
    K,
    NB: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DB + tl.arange(0, DB)
    first = tl.load(offset + v)
    end = tl.load(offset + v + 1)
    if first < end:  # else the id is in no top-k, and zeros are there already
        acc = tl.zeros((NB, DB), WIDE)
        for start in range(first, end, NB):
            i = start + tl.arange(0, NB)
            n = tl.load(order + i, mask=i < end, other=0)
            c = tl.load(c_n + n, mask=i < end, other=0.0).to(WIDE)
            rows = x + (n // K)[:, None] * stride_x + d[None, :]
            acc += c[:, None] * tl.load(
                rows, mask=(i < end)[:, None] & (d < D)[None, :], other=0.0
            ).to(WIDE)
        tl.store(dhead + v * D + d, tl.sum(acc, 0).to(dhead.dtype.element_ty), mask=d < D)


def _tiles(dtype: torch.dtype) -> dict:
    return {
        "DB": max(16, _triton.BLOCK_V // 8),
        "WIDE": triton_dtype(dtype),
        **LAUNCH,
    }


def _dots(x_MD: Tensor, head_VD: Tensor, ids_MK: Tensor) -> Tensor:
    """x[m] . head[ids[m, k]] [M, K] in fp32 or fp64; 0 where an id is -1."""
    (M, D), K, dtype = x_MD.shape, ids_MK.shape[1], wide(x_MD.dtype)
    dots_MK = x_MD.new_empty(M, K, dtype=dtype)
    if runs_triton(x_MD):
        launch(
            gather_dot,
            (M, triton.cdiv(K, ROWS)),
            x_MD,
            head_VD,
            ids_MK,
            dots_MK,
            x_MD.stride(0),
            *head_VD.stride(),
            D,
            K,
            KB=ROWS,
            **_tiles(dtype),
        )
        return dots_MK
    for c in _pieces(M, K * D * dtype.itemsize):
        with torch.autocast("cpu", enabled=False):  # it reaches into a custom op
            dots_CK1 = torch.bmm(
                _head_rows(head_VD, ids_MK[c], dtype), x_MD[c].to(dtype)[:, :, None]
            )
        dots_MK[c] = dots_CK1[:, :, 0].masked_fill_(ids_MK[c] < 0, 0.0)
    return dots_MK


def _dhidden(head_VD: Tensor, ids_MK: Tensor, d_MK: Tensor) -> Tensor:
    """sum_k d[m, k] head[ids[m, k]] [M, D] in the dtype of the head."""
    (M, K), D = ids_MK.shape, head_VD.shape[1]
    dx_MD = head_VD.new_empty(M, D)
    if runs_triton(head_VD):
        tiles = _tiles(d_MK.dtype)
        launch(
            gather_rows,
            (M, triton.cdiv(D, tiles["DB"])),
            head_VD,
            ids_MK,
            d_MK,
            dx_MD,
            *head_VD.stride(),
            D,
            K,
            KB=ROWS,
            **tiles,
        )
        return dx_MD
    for c in _pieces(M, K * D * d_MK.dtype.itemsize):
        d_C1K = d_MK[c].masked_fill(ids_MK[c] < 0, 0.0)[:, None]
        with torch.autocast("cpu", enabled=False):
            dx_MD[c] = torch.bmm(d_C1K, _head_rows(head_VD, ids_MK[c], d_MK.dtype))[:, 0].to(
                dx_MD.dtype
            )
    return dx_MD


def _dhead(x_MD: Tensor, ids_MK: Tensor, d_MK: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """sum of d[m, k] x[m] over the pairs with ids[m, k] = v, [V, D], added in the order of m."""
    (M, K), D = ids_MK.shape, x_MD.shape[1]
    if runs_triton(x_MD):
        dhead_VD, tiles = x_MD.new_zeros(V, D, dtype=dtype), _tiles(d_MK.dtype)
        sorted_N, order_N = ids_MK.flatten().sort(stable=True)
        offset_V1 = torch.searchsorted(
            sorted_N, torch.arange(V + 1, device=x_MD.device, dtype=sorted_N.dtype)
        )
        launch(
            sum_pairs,
            (V, triton.cdiv(D, tiles["DB"])),
            x_MD,
            order_N,
            d_MK,
            offset_V1,
            dhead_VD,
            x_MD.stride(0),
            D,
            K,
            NB=ROWS,
            **tiles,
        )
        return dhead_VD
    dhead_VD = d_MK.new_zeros(V, D)
    for c in _pieces(M, K * D * d_MK.dtype.itemsize):
        pairs_CKD = (
            d_MK[c].masked_fill(ids_MK[c] < 0, 0.0)[:, :, None] * x_MD[c].to(d_MK.dtype)[:, None]
        )
        dhead_VD.index_add_(0, ids_MK[c].clamp(min=0).flatten(), pairs_CKD.flatten(0, 1))
    return dhead_VD.to(dtype)


def _head_rows(head_VD: Tensor, ids_CK: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        head_VD[ids_CK.clamp(min=0).long()].to(dtype)
        if len(head_VD)
        else head_VD.new_zeros(*ids_CK.shape, head_VD.shape[1], dtype=dtype)
    )


def _pieces(M: int, row_bytes: int) -> Iterator[slice]:
    """Ranges of rows whose gathered head rows fit the budget of a CPU."""
    size = max(1, CPU_CHUNK_BYTES // max(1, row_bytes))
    return (slice(start, start + size) for start in range(0, M, size))


@torch.library.custom_op("reflux::renormalised_topk_kl", mutates_args=())
def _op(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    group: str,
    vocab_start: int,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], gradients of total in hidden, head and bias or empty."""
    rows = slice(None) if rows_M is None else rows_M
    x_MD = hidden_TD[rows].contiguous()
    head = Head(x_MD, head_VD, bias_V, logit_scale, softcap)
    V = local_width(len(head_VD), vocab_size, vocab_start)
    ids_MK = local_ids(ids_TK[rows], vocab_start, V, group)
    scale, gradient_scale = head.scales(temperature)
    spec = TopKSpec(divergence, "renorm", beta, scale, softcap, vocab_size, group)
    t2 = loss_factor(temperature, scale_t2)
    z_MK = _topk_logits(head, ids_MK, group)
    no_tail, coeff_M = z_MK.new_zeros(len(z_MK)), weight_T[rows] * (t2 * gradient_scale)
    kl_M, d_MK, _ = topk_terms_of(
        z_MK, teacher_logp_TK[rows], no_tail, no_tail, no_tail, coeff_M, spec
    )
    kl_T = hidden_TD.new_zeros(len(hidden_TD), dtype=wide(hidden_TD.dtype))
    kl_T[rows] = kl_M * t2
    dx_TD = hidden_TD.new_zeros(hidden_TD.shape if need_dhidden else (0,))
    dhead_VD = head_VD.new_empty(0)
    dbias_V = kl_T.new_empty(0) if bias_V is None else bias_V.new_empty(0)
    if need_dhidden:
        dx_TD[rows] = _dhidden(head_VD, ids_MK, d_MK)
        dx_TD = all_sum(dx_TD, group)
    if need_dhead:
        dhead_VD = _dhead(x_MD, ids_MK, d_MK, len(head_VD), head_VD.dtype)
    if need_dbias:
        ones_M1 = torch.ones_like(x_MD[:, :1])
        dbias_V1 = _dhead(ones_M1, ids_MK, d_MK, len(head_VD), dbias_V.dtype)
        dbias_V = dbias_V1[:, 0].contiguous()
    return weighted_total(kl_T, weight_T), kl_T, dx_TD, dhead_VD, dbias_V


def _topk_logits(head: Head, ids_MK: Tensor, group: str) -> Tensor:
    """[M, K] in fp32 or fp64; without a cap still to be scaled, as in `project`."""
    z_MK = _dots(head.hidden_TD, head.head_VD, ids_MK)
    if head.bias_V is not None and len(head.bias_V):
        z_MK += head.bias_V[ids_MK.clamp(min=0).long()].masked_fill(ids_MK < 0, 0.0)
    z_MK = all_sum(z_MK, group)  # one rank has the logit, the others 0
    if head.softcap:
        z_MK.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
    return z_MK


_op.register_fake(fake_head_loss)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def renormalised_topk_kl(
    hidden_TD: Tensor,
    head_VD: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_temperature: float | None = None,
    shard: VocabShard | None = None,
    frozen_head: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. Differentiable in hidden, head and bias.

    hidden [T, D], head [V, D] and bias [V] of the student; the head may be transposed or a slice,
    it is not copied. ids int [T, K], K >= 2, distinct within a row, -1 for padding; teacher_logp
    fp32 [T, K], natural logs at this temperature up to a constant of its row. Options as in
    `linear_kl`. ValueError on shapes, dtypes, or an option that has no meaning.
    """
    op, side = "renormalised_topk_kl", (hidden_TD, head_VD, bias, logit_scale, softcap)
    options = LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    student, V = checked_head(op, *side, vocab_size, shard)
    student = options.read(op, student)
    x_TD = student.hidden_TD
    check_tail(op, "renorm", options, teacher_temperature)
    check_topk(op, V, x_TD.shape[0], ids_TK, teacher_logp_TK, None, "renorm")
    topk = topk_inputs(ids_TK, teacher_logp_TK, None, "renorm", V, wide(x_TD.dtype))
    total, kl_T, *_ = _op(
        *student,
        *topk[:2],
        *options.checked(op, x_TD),
        V,
        *slice_of(shard),
        *student.needs(frozen_head),
    )
    return options.result(total, kl_T, x_TD)
