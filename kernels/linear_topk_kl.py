"""Divergence of a student, given as hidden states and head, from the K classes kept of a teacher.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), no tanh without a softcap
    kl, total: those of topk_tail_kl for these logits, with the same four tails (bucket, renorm,
        sampled, drop)

[T, V] logits exist chunk by chunk: 3 head GEMMs with gradients, which are made in the forward, as
in linear_kl. renorm does not need the partition function, so for few kept ids it gathers K head
rows a token instead (`renormalised_topk_kl`).

Shapes: T tokens, M chosen rows, K kept ids, D hidden, V vocabulary, C rows of a chunk.
"""

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
from ._divergence import check_divergence
from ._parallel import VocabShard, all_sum, common_width, local_head, local_width
from ._topk_rows import Kind, check_kept, check_temperature, kept_rows, local_ids, topk_rows_
from .linear_kl import (
    LinearKL,
    fake_dbias,
    fake_outputs,
    row_weights,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from .renormalised_topk_kl import gather_is_cheaper, renormalised_topk_kl
from .topk_tail_kl import topk_tail_kl_ref


def linear_topk_kl_ref(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options,
) -> LinearKL:
    """The definition, with [T, V] in memory. fp32 arithmetic, or fp64 when given fp64. options: of
    topk_tail_kl_ref.
    """
    logits_TV = logits_ref(student_hidden_TD, student_head_VD, bias, logit_scale, softcap)
    return topk_tail_kl_ref(logits_TV, ids_TK, teacher_logp_TK, teacher_tail_T, **options)


@torch.library.custom_op("reflux::linear_topk_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    bias_V: Tensor | None,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    tail: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    logit_scale: float,
    softcap: float,
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
    head, bias = student_head_VD[:V], None if bias_V is None else bias_V[:V]
    scale, gradient_scale = fold_scale(temperature, logit_scale, softcap)
    kind, t2 = (
        Kind(divergence, tail, beta, scale, softcap, vocab_size),
        temperature**2 if scale_t2 else 1.0,
    )
    ids_TK, coeff_T = local_ids(ids_TK, vocab_start, V, group), weight_T * (t2 * gradient_scale)
    kl_T = x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))
    dx_TD, dhead_VD = gradient_buffers(x_TD, student_head_VD, need_dhidden, need_dhead)
    dbias_V = kl_T.new_zeros(student_head_VD.shape[0] if need_dbias else 0)

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        z_CV = project(x_TD[c], head, softcap, bias, logit_scale)
        needed = need_dhidden or need_dhead or need_dbias
        dz_CV = gradient_block(z_CV, x_TD) if needed else None
        kl_T[c] = topk_rows_(
            padded(z_CV),
            ids_TK[c],
            teacher_logp_TK[c],
            teacher_tail_T[c],
            coeff_T[c],
            kind,
            padded(dz_CV) if needed else None,
            group,
        )
        if needed:
            dx_CD = backproject(
                dz_CV,
                x_TD[c],
                head,
                need_dhidden,
                dhead_VD[:V] if need_dhead else None,
                dbias_V[:V] if need_dbias else None,
            )
            if need_dhidden:
                dx_TD[c] = dx_CD

    # logits and, for bf16 GEMMs, half as much for the gradient
    with_kernel = 1.5 if on_tensor_cores(x_TD) else 1
    for c in chunks(
        x_TD,
        common_width(vocab_size, group),
        workspace_buffers(x_TD, with_kernel, 3),
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
        dbias_V if bias_V is None else dbias_V.to(bias_V.dtype),
    )


def _fake(student_hidden_TD, student_head_VD, bias_V, *rest):
    *_, need_dhidden, need_dhead, need_dbias = rest
    return (
        *fake_outputs(student_hidden_TD, student_head_VD, need_dhidden, need_dhead),
        fake_dbias(student_hidden_TD, student_head_VD, bias_V, need_dbias),
    )


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def linear_topk_kl(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
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
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_temperature: float | None = None,
    allow_drop: bool = False,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. total is differentiable in the student's
    hidden, head and bias.

    hidden [T, D], head [V, D] and bias [V] of the student. ids int [T, K], distinct within a row,
    -1 for padding, from whichever of the two models chose the support; teacher_logp fp32 [T, K] and
    teacher_tail [T], read by bucket only, are natural logs of the teacher's masses *at this
    temperature*: a tail at temperature 1 does not give the tail at another. Pass
    teacher_temperature, that of the kept rows, to have it compared. beta: jsd and skew only. weight
    [T]: constant, None for ones. rows int64 [M], distinct: only these are computed, the others have
    kl 0 and gradient 0. scale_t2 multiplies kl and gradient by temperature squared. allow_drop:
    tail="drop" is refused without it. shard: head and bias are this rank's slice of the vocabulary,
    hidden states and ids are the same on all ranks of the group, and vocab_size counts the whole.
    frozen_student_head skips the gradient of head and bias, which otherwise accumulates in fp32.
    workspace_mb (MiB) bounds the logits alive at once. Under autocast operands are cast as
    nn.Linear would. ValueError on shapes, dtypes, or an option that has no meaning.
    """
    op = "linear_topk_kl"
    check_divergence(op, divergence, beta)
    head_VD, bias_V = (
        local_head(op, student_head_VD, shard),
        None if bias is None else local_head(f"{op} (bias)", bias, shard),
    )
    x_TD, head_VD, bias_V = as_autocast(student_hidden_TD, head_VD, bias_V)
    V = check_linear(op, x_TD, head_VD, vocab_size, temperature, shard)
    check_bias(op, bias_V, head_VD)
    check_temperature(op, temperature, teacher_temperature)
    check_kept(
        op, V, len(x_TD), ids_TK, teacher_logp_TK, teacher_tail_T, divergence, tail, allow_drop
    )
    if tail == "renorm" and gather_is_cheaper(ids_TK.shape[1], V):
        return renormalised_topk_kl(
            x_TD,
            head_VD,
            ids_TK,
            teacher_logp_TK,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            weight=weight,
            rows=rows,
            scale_t2=scale_t2,
            vocab_size=vocab_size,
            bias=bias_V,
            logit_scale=logit_scale,
            softcap=softcap,
            shard=shard,
            frozen_head=frozen_student_head,
        )
    total, kl_T, *_ = _op(
        x_TD,
        head_VD,
        bias_V,
        *kept_rows(ids_TK, teacher_logp_TK, teacher_tail_T, tail, V, wide(x_TD.dtype)),
        row_weights(op, weight, x_TD),
        check_rows(op, rows, x_TD),
        divergence,
        tail,
        beta,
        temperature,
        scale_t2,
        V,
        check_logit_scale(op, logit_scale),
        check_softcap(op, softcap),
        shard.group if shard else "",
        shard.start if shard else 0,
        workspace_mb,
        needs_gradient(x_TD),
        needs_gradient(head_VD, frozen_student_head),
        needs_gradient(bias_V, frozen_student_head),
    )
    return LinearKL(total, kl_T)
