"""Sums of a per-token quantity over spans of tokens, such as a span's log-probability.

    sums[s] = sum of x[t] over the tokens t with span[t] == s

Tokens with span -1, or beyond the last span, lie outside every span; a span without tokens sums to
0. The backward is a gather: dx[t] = dsums[span[t]]. fp32 accumulation, or fp64 when given fp64, in
an order that depends on the span alone: two runs are bitwise equal, and so are a span's sums in
whatever batch it is packed into.

Shapes: T tokens, S spans.
"""

import torch
from torch import Tensor

from ._chunks import wide
from ._triton import LAUNCH, check_ids, check_plain, launch, runs_triton, tl, triton, triton_dtype

SPANS = 128  # spans of one program
STEP = 4  # tokens of a span that one step reads; most spans are shorter


def span_sum_ref(x_T: Tensor, span_T: Tensor, num_spans: int) -> Tensor:
    """The definition. The last row collects what lies outside."""
    dtype = wide(x_T.dtype)
    sums = torch.zeros(num_spans + 1, dtype=dtype, device=x_T.device)
    return sums.index_add(0, _row_of(span_T, num_spans), x_T.to(dtype))[:num_spans]


def _row_of(span_T: Tensor, num_spans: int) -> Tensor:
    """Spans as rows of [S + 1]: row S is outside."""
    return torch.where((span_T < 0) | (span_T >= num_spans), num_spans, span_T).long()


@triton.jit
def _sum(
    values, order, offset, sums, S, SPANS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr
):
    # Tokens sorted by span; span s owns order[offset[s] : offset[s + 1]].
    s = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    first = tl.load(offset + s, mask=s < S, other=0)
    last = tl.load(offset + s + 1, mask=s < S, other=0)
    step = tl.arange(0, STEP)
    total = tl.zeros((SPANS,), WIDE)
    for start in range(0, tl.max(last - first, 0), STEP):
        at = first[:, None] + start + step[None, :]
        live = at < last[:, None]
        t = tl.load(order + at, mask=live, other=0)
        total += tl.sum(tl.load(values + t, mask=live, other=0.0).to(WIDE), 1)
    tl.store(sums + s, total, mask=s < S)


@torch.library.custom_op("reflux::span_sum", mutates_args=())
def _op(x_T: Tensor, span_T: Tensor, num_spans: int) -> Tensor:
    if not runs_triton(x_T):
        return span_sum_ref(x_T, span_T, num_spans).clone()  # an op may not return a view
    sums_S = x_T.new_empty(num_spans, dtype=wide(x_T.dtype))
    if num_spans == 0:
        return sums_S
    # A stable sort instead of index_add_, whose atomics add in another order every run.
    sorted_T, order_T = torch.sort(span_T, stable=True)
    all_spans_S1 = torch.arange(num_spans + 1, device=x_T.device, dtype=span_T.dtype)
    offset_S1 = torch.searchsorted(sorted_T, all_spans_S1)
    launch(
        _sum,
        (triton.cdiv(num_spans, SPANS),),
        x_T.contiguous(),
        order_T,
        offset_S1,
        sums_S,
        num_spans,
        SPANS=SPANS,
        STEP=STEP,
        WIDE=triton_dtype(sums_S.dtype),
        **LAUNCH,
    )
    return sums_S


def _fake(x_T, span_T, num_spans):
    return x_T.new_empty(num_spans, dtype=wide(x_T.dtype))


def _save(ctx, inputs, output):
    x_T, span_T, ctx.num_spans = inputs
    ctx.save_for_backward(span_T)
    ctx.dtype = x_T.dtype


def _grad(ctx, grad_S):
    (span_T,) = ctx.saved_tensors
    padded = torch.cat([grad_S, grad_S.new_zeros(1)])  # row num_spans: outside
    return padded[_row_of(span_T, ctx.num_spans)].to(ctx.dtype), None, None


_op.register_fake(_fake)
_op.register_autograd(_grad, setup_context=_save)


def span_sum(x_T: Tensor, span_T: Tensor, num_spans: int) -> Tensor:
    """sums fp32 [S] (fp64 for fp64 x) of x [T] over span int [T], -1 outside. Differentiable in x.

    x is any floating dtype. span values need not be sorted; those outside 0 .. num_spans - 1 belong
    to no span. Weigh tokens by multiplying x. Packed sequences: shift row b's spans by the number
    of spans before it and flatten. ValueError on shapes or a span that is not an integer tensor.
    """
    check_plain("span_sum", x_T)
    if not (x_T.ndim == 1 and span_T.shape == x_T.shape):
        raise ValueError(
            f"span_sum: x is {list(x_T.shape)} and span {list(span_T.shape)}; want [T] and [T]. "
            "Flatten a batch, and shift row b's spans by the spans before it"
        )
    if span_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"span_sum: span is {span_T.dtype}; want int32 or int64 span ids. Convert a mask with "
            "span.long()"
        )
    if not (x_T.is_floating_point()):
        raise ValueError(
            f"span_sum: x is {x_T.dtype}; want floats. Count tokens with torch.bincount"
        )
    if not (num_spans >= 0):
        raise ValueError(f"span_sum: num_spans is {num_spans}; want >= 0")
    check_ids("span_sum", span_T, num_spans, distinct=False)
    return _op(x_T, span_T, num_spans)
