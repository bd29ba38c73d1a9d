"""Divergence of a student from a teacher, both given as hidden states and head: [T, V] logits exist
chunk by chunk.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), on each side its own; no
        tanh without a softcap
    p = softmax(student logits / temperature),  q = softmax(teacher logits / temperature)
    kl[t]  = D(p[t], q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in
           _divergence.py)
    total  = sum_t weight[t] kl[t]

The weights are known in the forward, so gradients of total are made there, chunk by chunk, and the
backward only scales them: 3 student GEMMs and 1 teacher GEMM, against 4 and 2 when the backward
recomputes. Losses are multiplied by temperature squared only if scale_t2 says so. A row whose kl is
inf or NaN (the teacher bans a token that the student of a reverse KL has, say) keeps that value in
kl and contributes a zero gradient.

Shapes: T tokens, M chosen rows, D hidden of the student, E hidden of the teacher, V vocabulary, C
rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Rows,
    as_autocast,
    backproject,
    check_bias,
    check_linear,
    check_logit_scale,
    check_rows,
    check_softcap,
    chunks,
    fold_scale,
    gradient_block,
    gradient_buffers,
    logits_ref,
    needs_gradient,
    on_tensor_cores,
    padded,
    project,
    wide,
    workspace_buffers,
)
from ._divergence import check_divergence, divergence_ref
from ._kl_rows import kl_rows
from ._parallel import VocabShard, all_sum, common_width, local_head, local_width
from ._triton import require


class LinearKL(NamedTuple):
    total: Tensor  # [], differentiable
    kl: Tensor  # [T], detached


def linear_kl_ref(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_head_VE: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> LinearKL:
    """The definition, with both [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    z_TV = logits_ref(
        student_hidden_TD,
        student_head_VD,
        student_bias,
        student_logit_scale,
        student_softcap,
        vocab_size,
    )
    u_TV = logits_ref(
        teacher_hidden_TE,
        teacher_head_VE,
        teacher_bias,
        teacher_logit_scale,
        teacher_softcap,
        vocab_size,
    )
    logp_TV, logq_TV = ((x_TV / temperature).log_softmax(-1) for x_TV in (z_TV, u_TV.detach()))
    kl_T = divergence_ref(logp_TV, logq_TV, divergence, beta) * (
        temperature**2 if scale_t2 else 1.0
    )
    if rows is not None:
        kl_T = torch.zeros_like(kl_T).index_copy(0, rows.long(), kl_T[rows])
    return LinearKL(
        weighted_total(kl_T, torch.ones_like(kl_T) if weight is None else weight.to(kl_T.dtype)),
        kl_T.detach(),
    )


def weighted_total(kl_T: Tensor, weight_T: Tensor) -> Tensor:
    """sum weight * kl, where a weight of 0 leaves its row out even if kl is not finite."""
    return torch.where(weight_T != 0, weight_T * kl_T, 0.0).sum()


class _Side(NamedTuple):
    """One of the two models, cut to the vocabulary in use."""

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    softcap: float

    def logits(self, c: Rows) -> Tensor:
        return project(self.hidden_TD[c], self.head_VD, self.softcap, self.bias_V, self.logit_scale)


@torch.library.custom_op("reflux::linear_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_hidden_TE: Tensor,
    teacher_head_VE: Tensor,
    teacher_bias_V: Tensor | None,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], and the gradients of total in the student's hidden, head and bias (empty
    where not needed).
    """
    x_TD, V = student_hidden_TD, local_width(student_head_VD.shape[0], vocab_size, vocab_start)
    student = _Side(
        x_TD, student_head_VD[:V], _cut(student_bias_V, V), student_logit_scale, student_softcap
    )
    teacher = _Side(
        teacher_hidden_TE,
        teacher_head_VE[:V],
        _cut(teacher_bias_V, V),
        teacher_logit_scale,
        teacher_softcap,
    )
    student_scale, gradient_scale = fold_scale(temperature, student_logit_scale, student_softcap)
    scales = student_scale, fold_scale(temperature, teacher_logit_scale, teacher_softcap)[0]
    t2 = temperature**2 if scale_t2 else 1.0
    coeff_T = weight_T * (t2 * gradient_scale)
    kl_T = x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))
    dx_TD, dhead_VD = gradient_buffers(x_TD, student_head_VD, need_dhidden, need_dhead)
    dbias_V = kl_T.new_zeros(student_head_VD.shape[0] if need_dbias else 0)

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        z_CV, u_CV = student.logits(c), teacher.logits(c)
        needed = need_dhidden or need_dhead or need_dbias
        dz_CV = gradient_block(z_CV, x_TD) if needed else None
        kl_T[c] = kl_rows(
            padded(z_CV),
            padded(u_CV),
            coeff_T[c],
            scales,
            divergence,
            beta,
            student_softcap,
            padded(dz_CV) if needed else None,
            group,
        )
        if needed:
            dx_CD = backproject(
                dz_CV,
                x_TD[c],
                student.head_VD,
                need_dhidden,
                dhead_VD[:V] if need_dhead else None,
                dbias_V[:V] if need_dbias else None,
            )
            if need_dhidden:
                dx_TD[c] = dx_CD

    # both logits and, for bf16 GEMMs, half as much for the gradient
    with_kernel = 2.5 if on_tensor_cores(x_TD) else 2
    for c in chunks(
        x_TD,
        common_width(vocab_size, group),
        workspace_buffers(x_TD, with_kernel, 8),
        workspace_mb,
        rows_M,
    ):
        step(c)
    kl_T.mul_(t2)
    return (
        weighted_total(kl_T, weight_T),
        kl_T,
        all_sum(dx_TD, group) if need_dhidden else dx_TD,
        dhead_VD.to(student_head_VD.dtype),
        dbias_V if student_bias_V is None else dbias_V.to(student_bias_V.dtype),
    )


def _cut(bias_V: Tensor | None, V: int) -> Tensor | None:
    return None if bias_V is None else bias_V[:V]


def _fake(student_hidden_TD, student_head_VD, student_bias_V, *rest):
    *_, need_dhidden, need_dhead, need_dbias = rest
    return (
        *fake_outputs(student_hidden_TD, student_head_VD, need_dhidden, need_dhead),
        fake_dbias(student_hidden_TD, student_head_VD, student_bias_V, need_dbias),
    )


def fake_outputs(
    hidden_TD: Tensor, head_VD: Tensor, need_dhidden: bool, need_dhead: bool
) -> tuple[Tensor, ...]:
    dtype = wide(hidden_TD.dtype)
    return (
        hidden_TD.new_empty((), dtype=dtype),
        hidden_TD.new_empty(hidden_TD.shape[0], dtype=dtype),
        hidden_TD.new_empty(hidden_TD.shape if need_dhidden else (0,)),
        head_VD.new_empty(head_VD.shape if need_dhead else (0,)),
    )


def fake_dbias(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, need_dbias: bool
) -> Tensor:
    dtype = wide(hidden_TD.dtype) if bias_V is None else bias_V.dtype
    return hidden_TD.new_empty(head_VD.shape[0] if need_dbias else 0, dtype=dtype)


def save_gradients(ctx, inputs, output) -> None:
    """For ops that return (total, kl, *gradients): of their first inputs, in this order, whose
    flags come last.
    """
    _, kl_T, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(kl_T, *gradients)
    # else autograd makes zero gradients for the saved [T, D] and [V, D] outputs
    ctx.set_materialize_grads(False)
    ctx.needed, ctx.num_inputs = inputs[-len(gradients) :], len(inputs)


def scale_gradients(ctx, g_total, *_) -> tuple[Tensor | None, ...]:
    """New tensors, so a retained graph can go backward again. The forward's workspace is free by
    now: no higher peak.
    """
    if g_total is None:
        return (None,) * ctx.num_inputs
    scaled = (d * g_total if needed else None for d, needed in zip(ctx.saved_tensors, ctx.needed))
    return *scaled, *[None] * (ctx.num_inputs - len(ctx.needed))


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def row_weights(op: str, weight: Tensor | None, hidden_TD: Tensor) -> Tensor:
    """weight [T] in the dtype of the losses, constant; ones if None."""
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    require(
        weight is None or weight.shape == (T,),
        f"{op}: weight is {list(getattr(weight, 'shape', []))} for {T} rows; want [T], 0 for an "
        "ignored row",
    )
    return (
        hidden_TD.new_ones(T, dtype=dtype)
        if weight is None
        else weight.detach().to(dtype).contiguous()
    )


def _check_sides(
    student_head_VD: Tensor,
    teacher_head_VE: Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    student_rows: int,
    teacher_rows: int,
) -> None:
    V, teacher_V = (
        len(head)
        if vocab_size is None
        else local_width(len(head), vocab_size, shard.start if shard else 0)
        for head in (student_head_VD, teacher_head_VE)
    )
    require(
        V == teacher_V,
        f"linear_kl: the student's head has {V} rows and the teacher's {teacher_V}. If both pad "
        "one vocabulary, pass vocab_size; else the tokenizers differ and no token-level KL "
        "exists. Slices of a vocabulary must be cut at the same rows",
    )
    require(
        student_rows == teacher_rows,
        f"linear_kl: {student_rows} student rows and {teacher_rows} teacher rows; "
        "want one row per token on both sides",
    )


def linear_kl(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_head_VE: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. total is differentiable in the student's
    hidden, head and bias.

    hidden [T, D] or [T, E] and head [V, D] or [V, E]; D and E may differ, V may not unless
    vocab_size says that both heads are padded beyond it. bias [V]. beta: jsd and skew only, 0 <
    beta < 1. weight [T]: constant, None for ones. rows int64 [M], distinct: only these are
    computed, the others have kl 0 and gradient 0. scale_t2 multiplies kl and gradient by
    temperature squared (Hinton et al., arXiv:1503.02531). shard, VocabShard(group name, first row)
    or VocabShard.of(head): both heads and biases are this rank's slice of the vocabulary, hidden
    states are the same on all ranks of the group and vocab_size counts the whole; kl, total and the
    gradient in hidden are then the whole vocabulary's. The teacher gets no gradient;
    frozen_student_head skips that of head and bias, which otherwise accumulate in fp32.
    workspace_mb (MiB) bounds the logits alive at once. Under autocast operands are cast as
    nn.Linear would. ValueError on shapes, dtypes, or an option that has no meaning.
    """
    check_divergence("linear_kl", divergence, beta)
    student_head_VD, teacher_head_VE = (
        local_head("linear_kl", head, shard) for head in (student_head_VD, teacher_head_VE)
    )
    student_bias, teacher_bias = (
        None if b is None else local_head("linear_kl (bias)", b, shard)
        for b in (student_bias, teacher_bias)
    )
    x_TD, head_VD, bias_V = as_autocast(student_hidden_TD, student_head_VD, student_bias)
    y_TE, teacher_VE, teacher_bias_V = as_autocast(teacher_hidden_TE, teacher_head_VE, teacher_bias)
    V = check_linear("linear_kl (student)", x_TD, head_VD, vocab_size, temperature, shard)
    check_linear("linear_kl (teacher)", y_TE, teacher_VE, vocab_size, temperature, shard)
    _check_sides(head_VD, teacher_VE, vocab_size, shard, len(x_TD), len(y_TE))
    (
        check_bias("linear_kl (student)", bias_V, head_VD),
        check_bias("linear_kl (teacher)", teacher_bias_V, teacher_VE),
    )
    total, kl_T, *_ = _op(
        x_TD,
        head_VD,
        bias_V,
        y_TE.detach(),
        teacher_VE.detach(),
        None if teacher_bias_V is None else teacher_bias_V.detach(),
        row_weights("linear_kl", weight, x_TD),
        check_rows("linear_kl", rows, x_TD),
        divergence,
        beta,
        temperature,
        scale_t2,
        V,
        check_logit_scale("linear_kl", student_logit_scale),
        check_logit_scale("linear_kl", teacher_logit_scale),
        check_softcap("linear_kl", student_softcap),
        check_softcap("linear_kl", teacher_softcap),
        shard.group if shard else "",
        shard.start if shard else 0,
        workspace_mb,
        needs_gradient(x_TD),
        needs_gradient(head_VD, frozen_student_head),
        needs_gradient(bias_V, frozen_student_head),
    )
    return LinearKL(total, kl_T)
