"""Divergence of a student, given as logits, from the top-k of a teacher.

S = the ids of a row, p the student, q the teacher, both at `temperature`; the tail is every class
outside S; P and Q are the masses that teacher and student have in S.

    bucket   D over K + 1 classes, the last of which holds the whole tail: 0 <= bucket <= full D,
             equal at K = V. forward: P renorm + KL(P || Q) of the masses; reverse: Q renorm +
             KL(Q || P)
    renorm   D of p and q, each renormalised over S: blind to mass outside S
    sampled  - sum_S w log p, ids drawn from q with weights w = exp(teacher_logp): its gradient is
             that of the full forward KL in expectation (arXiv:2503.16870); the value is a
             cross-entropy, not a KL
    zero_outside_topk   D of p and q' = q / Q in S, 0 outside, as interfaces that show a top-k alone
             are often read: every mass of the student outside S is wrong there. Infinite for
             reverse, so refused
    drop     sum_S q (log q - log p): raw masses, forward only, only with allow_drop. It can be
             negative, and at p = q its gradient P p - q is not 0

    total = sum_t weight[t] kl[t]

Refused: reverse and skew `drop`, which fall when the whole support is pushed down, and renorm at K
= 1, which is 0. ids < 0 or >= V, and a teacher_logp of -inf, are padding; a row of padding has kl 0
and no gradient. The ids of a row must be distinct (checked with REFLUX_KERNELS_DEBUG=1). A row
whose kl is inf or NaN keeps it and contributes a zero gradient. Traffic with gradient: the logits
are copied, read without the support, then read and overwritten with the gradient.

Shapes: T tokens, K top-k ids, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import WORKSPACE_MB, Rows, chunks, wide
from ._divergence import divergence_ref
from ._loss import (
    InPlaceLoss,
    LinearKL,
    LossOptions,
    check_inplace,
    fake_loss,
    loss_factor,
    loss_ref,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from ._parallel import VocabShard, common_width, local_width, slice_of
from ._topk_inputs import (
    ZERO,
    check_tail,
    check_topk,
    kernel_tail,
    local_ids,
    renormalised,
    topk_inputs,
)
from ._topk_rows import TopKSpec, topk_rows_
from ._triton import check_plain, runs_triton


def topk_tail_kl_ref(
    student_logits_TV: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor | None = None,
    *,
    divergence: str = "forward",
    tail: str = "bucket",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
) -> LinearKL:
    """The definition. fp32 arithmetic, or fp64 when given fp64."""
    dtype = wide(student_logits_TV.dtype)
    a_TV = student_logits_TV[:, :vocab_size].to(dtype) / temperature
    live_TK = (ids_TK >= 0) & (ids_TK < a_TV.shape[1]) & (teacher_logp_TK != -torch.inf)
    # a row of padding has no gradient, even where its tail makes the divergence infinite
    a_TV = torch.where(live_TK.any(1, keepdim=True), a_TV, a_TV.detach())
    # Padding points one past the vocabulary, so that one scatter marks the support.
    safe_TK = torch.where(live_TK, ids_TK, a_TV.shape[1]).long()
    in_topk_TV = torch.zeros(len(a_TV), a_TV.shape[1] + 1, dtype=torch.bool, device=a_TV.device)
    in_topk_TV = in_topk_TV.scatter(1, safe_TK, True)[:, :-1]
    padded_TV = torch.cat([a_TV, a_TV.new_full((len(a_TV), 1), -torch.inf)], 1)
    a_TK, logq_TK = (
        padded_TV.gather(1, safe_TK),
        teacher_logp_TK.to(dtype).masked_fill(~live_TK, -torch.inf),
    )
    if tail == ZERO:
        empty_T = logq_TK.new_full((len(logq_TK),), -torch.inf)
        logq_TK, teacher_tail_T, tail = renormalised(logq_TK), empty_T, "bucket"
    if tail == "renorm":
        kl_T = divergence_ref(a_TK.log_softmax(1), logq_TK.log_softmax(1), divergence, beta)
    else:
        logp_TK = a_TK - a_TV.logsumexp(1, keepdim=True)
        if tail == "bucket" and teacher_tail_T is not None:
            tail_T1 = a_TV.masked_fill(in_topk_TV, -torch.inf).logsumexp(1, keepdim=True)
            logq_tail_T = teacher_tail_T.to(dtype).masked_fill(in_topk_TV.all(1), -torch.inf)
            logp_TK = torch.cat([logp_TK, tail_T1 - a_TV.logsumexp(1, keepdim=True)], 1)
            logq_TK = torch.cat([logq_TK, logq_tail_T[:, None]], 1)
        kl_T = divergence_ref(logp_TK, logq_TK, divergence, beta)
        if tail == "sampled":
            kl_T = -torch.where(logq_TK > -torch.inf, logq_TK.exp() * logp_TK, 0.0).sum(1)
    kl_T = torch.where(live_TK.any(1), kl_T, 0.0)
    return loss_ref(kl_T, weight, rows, temperature**2 if scale_t2 else 1.0)


def _sweep(
    logits_TV: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    tail: str,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    *,
    dz_TV: Tensor | None,
) -> Tensor:
    """kl [T]; writes the gradient of sum weight kl into dz, which may be the logits."""
    V = local_width(logits_TV.shape[1], vocab_size, vocab_start)
    spec = TopKSpec(divergence, tail, beta, 1 / temperature, 0.0, vocab_size, group)
    t2, with_kernel = loss_factor(temperature, scale_t2), runs_triton(logits_TV)
    ids_TK, coeff_T = local_ids(ids_TK, vocab_start, V, group), weight_T * t2
    kl_T = weight_T.new_zeros(len(logits_TV))
    dtype = wide(logits_TV.dtype) if not with_kernel or dz_TV is None else dz_TV.dtype

    # a function, so that its block is free before the next chunk's is made
    def step(c: Rows) -> None:
        teacher = ids_TK[c], teacher_logp_TK[c], teacher_tail_T[c], coeff_T[c]
        if dz_TV is not None and dz_TV.dtype == dtype and rows_M is None:  # work in dz itself
            z_CV = dz_TV[c, :V]
            if dz_TV is not logits_TV:
                z_CV.copy_(logits_TV[c, :V])
            kl_T[c] = topk_rows_(z_CV, *teacher, spec, z_CV)
            return
        z_CV = logits_TV[c, :V].to(dtype, copy=True)
        kl_T[c] = topk_rows_(z_CV, *teacher, spec, None if dz_TV is None else z_CV)
        if dz_TV is not None:
            dz_TV[c, :V] = z_CV.to(dz_TV.dtype)

    width, buffers = common_width(vocab_size, group), 1 if with_kernel else 3
    for c in chunks(logits_TV, width, buffers, workspace_mb, rows_M):
        step(c)
    if dz_TV is not None:
        dz_TV[:, V:] = 0
        if rows_M is not None:
            left_out_T = torch.ones_like(kl_T, dtype=torch.bool).index_fill_(0, rows_M, False)
            dz_TV.masked_fill_(left_out_T[:, None], 0.0)
    return kl_T.mul_(t2)


@torch.library.custom_op("reflux::topk_tail_kl", mutates_args=())
def _op(
    student_logits_TV: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    tail: str,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    need_dlogits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """total [], kl [T], gradient of total in the student's logits or empty (fp32 for fp16)."""
    dz_TV = _gradient(student_logits_TV, need_dlogits)
    kl_T = _sweep(
        student_logits_TV,
        ids_TK,
        teacher_logp_TK,
        teacher_tail_T,
        weight_T,
        rows_M,
        divergence,
        beta,
        temperature,
        scale_t2,
        tail,
        vocab_size,
        group,
        vocab_start,
        workspace_mb,
        dz_TV=dz_TV if need_dlogits else None,
    )
    return weighted_total(kl_T, weight_T), kl_T, dz_TV


def _gradient(logits_TV: Tensor, needed: bool) -> Tensor:
    """fp32 for fp16: a loss scale comes only in the backward."""
    dtype = torch.float32 if logits_TV.dtype == torch.float16 else logits_TV.dtype
    return logits_TV.new_empty(logits_TV.shape if needed else (0,), dtype=dtype)


def _fake(student_logits_TV, *rest):
    return *fake_loss(student_logits_TV), _gradient(student_logits_TV, rest[-1])


def _save(ctx, inputs, output):
    save_gradients(ctx, inputs, output)
    ctx.dtype = inputs[0].dtype


def _grad(ctx, g_total, *_):
    d_TV, *none = scale_gradients(ctx, g_total)
    return None if d_TV is None else d_TV.to(ctx.dtype), *none


_op.register_fake(_fake)
_op.register_autograd(_grad, setup_context=_save)


def topk_tail_kl(
    student_logits_TV: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor | None = None,
    *,
    divergence: str = "forward",
    tail: str = "bucket",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    teacher_temperature: float | None = None,
    allow_drop: bool = False,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
    inplace: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. Differentiable in the student's logits.

    logits [T, V], any floating dtype. They are left as they are: with a gradient its buffer is
    where the op works, else workspace_mb bounds copies of them. inplace: the gradient is written
    over the logits, half the memory and 6 T V instead of 10 T V bytes moved for bf16. They hold no
    logits afterwards; if autograd still needs them elsewhere, it raises in the backward, as it does
    in a second backward. Not under torch.compile, not for fp16, whose gradient is kept in fp32
    until a loss scale is known. With shard the gradient is the slice's. Other arguments as in
    `linear_topk_kl`. ValueError on shapes, dtypes, or an option that has no meaning.
    """
    op, z_TV = "topk_tail_kl", student_logits_TV
    check_plain(op, z_TV)
    V = _check_logits(op, z_TV, vocab_size, shard)
    options = LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    check_tail(op, tail, options, teacher_temperature, allow_drop)
    check_topk(op, V, z_TV.shape[0], ids_TK, teacher_logp_TK, teacher_tail_T, tail)
    topk = topk_inputs(ids_TK, teacher_logp_TK, teacher_tail_T, tail, V, wide(z_TV.dtype))
    losses = options.checked(op, z_TV)
    args = *topk, *losses, kernel_tail(tail), V, *slice_of(shard), workspace_mb
    need_dlogits = torch.is_grad_enabled() and z_TV.requires_grad
    if inplace and need_dlogits:
        check_inplace(op, z_TV)
        if z_TV.dtype == torch.float16:
            raise ValueError(f"{op}: inplace=True for float16 logits; want bfloat16 or float32")
        total, kl_T = InPlaceLoss.apply(z_TV, _sweep, losses[0], *args)
        return options.result(total, kl_T, z_TV)
    total, kl_T, _ = _op(z_TV, *args, need_dlogits)
    return options.result(total, kl_T, z_TV)


def _check_logits(op: str, z_TV: Tensor, vocab_size: int | None, shard: VocabShard | None) -> int:
    """Returns the size of the whole vocabulary."""
    if not (z_TV.ndim == 2 and z_TV.is_floating_point()):
        raise ValueError(
            f"{op}: logits are {z_TV.dtype} {list(z_TV.shape)}; want floats [T, V]. Flatten first: "
            "logits.flatten(0, -2)"
        )
    if hasattr(z_TV, "full_tensor"):
        raise ValueError(
            f"{op}: the logits are a DTensor; want this rank's plain slice with "
            "shard=VocabShard(group, start): logits.to_local()"
        )
    if not (z_TV.stride(1) == 1 or z_TV.shape[1] <= 1):
        raise ValueError(f"{op}: the vocabulary axis must be dense. Try .contiguous()")
    if not (shard is None or vocab_size is not None):
        raise ValueError(f"{op}: a shard and no vocab_size; want the size of the whole vocabulary")
    V = z_TV.shape[1] if vocab_size is None else vocab_size
    if not (0 < V and (shard is not None or V <= z_TV.shape[1])):
        raise ValueError(
            f"{op}: vocab_size is {V} and the logits have {z_TV.shape[1]} columns; want 1 <= "
            "vocab_size <= columns"
        )
    return V
