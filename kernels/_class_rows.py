"""Row functions of class probabilities: [rows, L] logits in class order to [rows, N] classes.

Columns are sorted by class, so class c owns columns first[c] .. first[c + 1]. Its logit is z_c =
logsumexp of theirs, and softmax over z gives the class probabilities; id i in it receives the
fraction e^(a_i - z_c) of the gradient of z_c. z is kept relative to the row's largest logit: likely
classes then have |z| near 0 and lose no digits to rounding.

Classes of up to LONG ids are summed a block of classes at a time, longer ones by a program each:
one pass over the block in any case. Neither needs atomics. CPU tensors take the PyTorch twin below
each kernel.

Shapes: C rows of a chunk, L columns (ids that have a class), N classes, H long classes.
"""

import torch
from torch import Tensor

from . import _triton
from ._chunks import narrow, padded, wide
from ._divergence import exp_diff
from ._parallel import merge_sums
from ._triton import LAUNCH, launch, narrowed, runs_triton, scalar, tl, triton, triton_dtype

LONG = 128  # ids of a class that gets a program of its own
CLASSES = 128  # classes of one program
# columns of a class that one step reads; most classes of a vocabulary-sized map have one id
STEP = 4


@triton.jit
def class_sums(
    by_class,
    first,
    top,
    sums,
    stride_t,
    N,
    inv_temp,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    LONG: tl.constexpr,
    WIDE: tl.constexpr,
):
    inv_temp = scalar(inv_temp, WIDE)
    t = tl.program_id(0).to(tl.int64)  # T=16k times V=152k overflows int32
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    begin = tl.load(first + c, mask=c < N, other=0)
    end = tl.load(first + c + 1, mask=c < N, other=0)
    short = end - begin <= LONG
    end = tl.where(short, end, begin)
    step = tl.arange(0, STEP)
    m = tl.full((CLASSES,), float("-inf"), WIDE)  # max so far
    s = tl.zeros((CLASSES,), WIDE)  # sum of exp(a - m) so far
    for start in range(0, tl.max(end - begin, 0), STEP):
        at = begin[:, None] + start + step[None, :]
        live = at < end[:, None]
        a = tl.load(by_class + t * stride_t + at, mask=live, other=0.0).to(WIDE) * inv_temp
        a = tl.where(live, a, float("-inf"))
        new = tl.maximum(m, tl.max(a, 1))
        s = s * exp_diff(m, new) + tl.sum(exp_diff(a, new[:, None]), 1)
        m = new
    tl.store(top + t * N + c, m, mask=(c < N) & short)
    tl.store(sums + t * N + c, s, mask=(c < N) & short)


@triton.jit
def long_class_sums(
    by_class, first, long, top, sums, stride_t, N, inv_temp, R: tl.constexpr, WIDE: tl.constexpr
):
    inv_temp = scalar(inv_temp, WIDE)
    t = tl.program_id(0).to(tl.int64)
    c = tl.load(long + tl.program_id(1))
    begin = tl.load(first + c)
    end = tl.load(first + c + 1)
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = tl.full((R,), float("-inf"), WIDE)
    s = tl.zeros((R,), WIDE)
    for start in range(0, end - begin, R * 8):
        at = begin + start + lanes
        a = tl.load(by_class + t * stride_t + at, mask=at < end, other=0.0).to(WIDE) * inv_temp
        a = tl.where(at < end, a, float("-inf"))
        new = tl.maximum(m, tl.max(a, 1))
        s = s * exp_diff(m, new) + tl.sum(exp_diff(a, new[:, None]), 1)
        m = new
    M = tl.max(m, 0)
    tl.store(top + t * N + c, M)
    tl.store(sums + t * N + c, tl.sum(s * exp_diff(m, M), 0))


@triton.jit
def class_backward(
    logits,
    column_class,
    row_top,
    class_logit,
    dclass,
    dlogits,
    stride_t,
    stride_d,
    V,
    N,
    inv_temp,
    grad_scale,
    inv_cap,
    CAPPED: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    # dlogits = e^(a - z_c) dz_c da/dlogits; class_logit holds z relative to row_top
    inv_temp = scalar(inv_temp, WIDE)
    grad_scale = scalar(grad_scale, WIDE)
    inv_cap = scalar(inv_cap, WIDE)
    t = tl.program_id(0).to(tl.int64)
    M = tl.load(row_top + t)
    row = logits + t * stride_t
    out = dlogits + t * stride_d
    lanes = tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for start in range(0, V, R * 8):
        v = start + lanes
        raw = tl.load(row + v, mask=v < V, other=float("-inf")).to(WIDE)
        c = tl.load(column_class + v, mask=v < V, other=0)
        z = tl.load(class_logit + t * N + c, mask=v < V, other=0.0).to(WIDE)
        dz = tl.load(dclass + t * N + c, mask=v < V, other=0.0).to(WIDE)
        d = tl.exp((raw * inv_temp - M) - z) * dz * grad_scale
        if CAPPED:
            d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)
        # where a whole class is banned dz is 0, and the fraction would be 0 / 0
        d = tl.where(dz == 0, 0.0, d)
        tl.store(out + v, narrowed(d, dlogits.dtype.element_ty), mask=v < V)


def class_rows(
    logits_CL: Tensor,
    class_L: Tensor,
    first_N1: Tensor,
    long_H: Tensor,
    inv_temp: float,
    group: str,
) -> tuple[Tensor, Tensor]:
    """(z [C, N] relative to the row's largest scaled logit, that logit [C]).

    -inf for a class without ids. first [N + 1]. Over a group, each rank brings the columns of its
    slice and all get the same result.
    """
    (C, _), N, dtype = logits_CL.shape, first_N1.shape[0] - 1, wide(logits_CL.dtype)
    if runs_triton(logits_CL):
        top_CN, sums_CN = (logits_CL.new_empty(C, N, dtype=dtype) for _ in range(2))
        # an empty grid is no launch
        if C:
            launch(
                class_sums,
                (C, triton.cdiv(N, CLASSES)),
                logits_CL,
                first_N1,
                top_CN,
                sums_CN,
                logits_CL.stride(0),
                N,
                inv_temp,
                CLASSES=CLASSES,
                STEP=STEP,
                LONG=LONG,
                WIDE=triton_dtype(dtype),
                **LAUNCH,
            )
        if C and long_H.shape[0]:
            launch(
                long_class_sums,
                (C, long_H.shape[0]),
                logits_CL,
                first_N1,
                long_H,
                top_CN,
                sums_CN,
                logits_CL.stride(0),
                N,
                inv_temp,
                R=max(1, _triton.BLOCK_V // 8),
                WIDE=triton_dtype(dtype),
                **LAUNCH,
            )
    else:
        top_CN, sums_CN = _class_sums_torch(logits_CL.to(dtype) * inv_temp, class_L, N)
    top_CN, sums_CN = merge_sums(top_CN, sums_CN, group)
    top_C = top_CN.amax(1)
    return (top_CN - top_C[:, None]).add_(sums_CN.log_()), top_C


def _class_sums_torch(a_CL: Tensor, class_L: Tensor, N: int) -> tuple[Tensor, Tensor]:
    class_L = class_L.long()
    class_CL = class_L.expand(a_CL.shape)
    top_CN = a_CL.new_full((a_CL.shape[0], N), -torch.inf).scatter_reduce_(
        1, class_CL, a_CL, "amax"
    )
    e_CL = torch.where(a_CL == -torch.inf, 0.0, a_CL.sub_(top_CN.index_select(1, class_L)).exp_())
    return top_CN, torch.zeros_like(top_CN).scatter_add_(1, class_CL, e_CL)


def class_rows_backward(
    logits_CL: Tensor,
    class_L: Tensor,
    top_C: Tensor,
    z_CN: Tensor,
    dz_CN: Tensor,
    scales: tuple[float, float],
    softcap: float,
    out_CL: Tensor,
) -> Tensor:
    """dlogits [C, L] into out, from top and z of class_rows.

    out may be logits, or a 16-bit block beside them, with rows as `project` lays them. scales: what
    logits are multiplied by, and gradients besides.
    """
    (inv_temp, grad_scale), N = scales, z_CN.shape[1]
    if not runs_triton(logits_CL):
        return _class_rows_backward_torch(
            logits_CL, class_L.long(), top_C, z_CN, dz_CN, scales, softcap, out_CL
        )
    x_CP, d_CP = padded(logits_CL), padded(out_CL)
    (C, P), L = x_CP.shape, class_L.shape[0]
    if C:
        # pad columns are banned: any class will do
        class_P = torch.nn.functional.pad(class_L, (0, P - L))
        launch(
            class_backward,
            (C,),
            x_CP,
            class_P,
            top_C,
            z_CN,
            dz_CN,
            d_CP,
            x_CP.stride(0),
            d_CP.stride(0),
            P,
            N,
            inv_temp,
            inv_temp * grad_scale,
            1 / softcap if softcap else 0.0,
            CAPPED=softcap > 0,
            R=max(1, _triton.BLOCK_V // 8),
            WIDE=triton_dtype(wide(logits_CL.dtype)),
            **LAUNCH,
        )
    return out_CL


def _class_rows_backward_torch(
    logits_CL: Tensor,
    class_L: Tensor,
    top_C: Tensor,
    z_CN: Tensor,
    dz_CN: Tensor,
    scales: tuple[float, float],
    softcap: float,
    out_CL: Tensor,
) -> Tensor:
    dz_CL = dz_CN.index_select(1, class_L)  # 5 times faster than [:, class_L] on a CPU
    d_CL = (
        (logits_CL * scales[0])
        .sub_(top_C[:, None])
        .sub_(z_CN.index_select(1, class_L))
        .exp_()
        .mul_(dz_CL)
        .mul_(scales[0] * scales[1])
    )
    if softcap:
        d_CL.mul_(1 - (logits_CL / softcap).square_())
    return out_CL.copy_(narrow(d_CL.masked_fill_(dz_CL == 0, 0.0), out_CL))
