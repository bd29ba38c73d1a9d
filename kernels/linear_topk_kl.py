"""Divergence of a student, given as hidden states and head, from the top-k of a teacher.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), no tanh without a softcap
    kl, total: those of topk_tail_kl for these logits, with the same tails (bucket, renorm,
        sampled, zero_outside_topk, drop)

[T, V] logits exist chunk by chunk: 3 head GEMMs with gradients, which are made in the forward, as
in linear_kl. renorm does not need the partition function, so for few ids it gathers K head rows a
token instead (`renormalised_topk_kl`).

The teacher's top-k holds at one temperature: logp and tail at temperature 1 do not give the tail at
another. Pass teacher_temperature, that of the top-k, to have it compared.

Shapes: T tokens, M chosen rows, K top-k ids, D hidden, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Part,
    head_plan,
    logits_ref,
    padded,
    parts,
    wide,
)
from ._divergence import largest_gradient
from ._head import Head, HeadGradients, checked_head
from ._loss import (
    LinearKL,
    LossOptions,
    fake_head_loss,
    loss_factor,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from ._parallel import VocabShard, common_width, local_width, slice_of
from ._topk_inputs import check_tail, check_topk, kernel_tail, local_ids, topk_inputs
from ._topk_rows import TopKSpec, topk_rows_
from .renormalised_topk_kl import gather_is_cheaper, renormalised_topk_kl
from .topk_tail_kl import topk_tail_kl_ref

BLOCKS = 1, 3  # of logits alive at once beside the gradient: with kernels, with PyTorch alone


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
    """The definition, with [T, V] in memory. fp32 arithmetic, or fp64 for fp64.

    options: those of topk_tail_kl_ref.
    """
    logits_TV = logits_ref(student_hidden_TD, student_head_VD, bias, logit_scale, softcap)
    return topk_tail_kl_ref(logits_TV, ids_TK, teacher_logp_TK, teacher_tail_T, **options)


@torch.library.custom_op("reflux::linear_topk_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
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
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], gradients of total in the student's hidden, head and bias or empty."""
    x_TD, V = student_hidden_TD, local_width(len(student_head_VD), vocab_size, vocab_start)
    student = Head(x_TD, student_head_VD, bias_V, logit_scale, softcap).cut(V)
    scale, gradient_scale = student.scales(temperature)
    spec = TopKSpec(divergence, tail, beta, scale, softcap, vocab_size, group)
    t2 = loss_factor(temperature, scale_t2)
    factor, need = t2 * gradient_scale, (need_dhidden, need_dhead, need_dbias)
    width = common_width(vocab_size, group)
    plan = head_plan(x_TD, width, BLOCKS, 0, need, workspace_mb, rows_M)
    largest = largest_gradient(divergence) * factor * scale
    grads = HeadGradients.zeros(x_TD, student_head_VD, need, V, plan, largest)
    ids_TK, coeff_T = local_ids(ids_TK, vocab_start, V, group), weight_T * (factor * grads.lift)
    kl_T = x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))

    # a function, so that its blocks are free before the next chunk's are made
    def step(part: Part) -> None:
        c = part.rows
        z_CV = student.logits(c)
        teacher = ids_TK[c], teacher_logp_TK[c], teacher_tail_T[c]
        if not any(need):
            kl_T[c] = topk_rows_(padded(z_CV), *teacher, coeff_T[c], spec, None)
            return
        dz_CV = grads.block(part, z_CV)
        kl_T[c] = topk_rows_(padded(z_CV), *teacher, coeff_T[c], spec, padded(dz_CV))
        grads.add(part, dz_CV, student)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    kl_T.mul_(t2)
    return weighted_total(kl_T, weight_T), kl_T, *grads.finish(student_head_VD, bias_V, group)


_op.register_fake(fake_head_loss)
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
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. Differentiable in hidden, head and bias.
    hidden [T, D], head [V, D], bias [V]. ids int [T, K], distinct within a row, -1 for padding;
    teacher_logp fp32 [T, K] and teacher_tail [T], read by bucket only: logs of the teacher's masses
    at this temperature. Options as in `linear_kl`. ValueError on shapes, dtypes and options.
    """
    op, side = "linear_topk_kl", (student_hidden_TD, student_head_VD, bias, logit_scale, softcap)
    options = LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    head, V = checked_head(op, *side, vocab_size, shard)
    student = options.read(op, head)
    x_TD = student.hidden_TD
    check_tail(op, tail, options, teacher_temperature, allow_drop)
    check_topk(op, V, x_TD.shape[0], ids_TK, teacher_logp_TK, teacher_tail_T, tail)
    if tail == "renorm" and gather_is_cheaper(ids_TK.shape[1], V):
        return renormalised_topk_kl(
            *student[:2],
            ids_TK,
            teacher_logp_TK,
            bias=student.bias_V,
            logit_scale=logit_scale,
            softcap=softcap,
            vocab_size=vocab_size,
            shard=shard,
            frozen_head=frozen_student_head,
            **vars(options),
        )
    total, kl_T, *_ = _op(
        *student,
        *topk_inputs(ids_TK, teacher_logp_TK, teacher_tail_T, tail, V, wide(x_TD.dtype)),
        *options.checked(op, x_TD),
        kernel_tail(tail),
        V,
        *slice_of(shard),
        workspace_mb,
        *student.needs(frozen_student_head),
    )
    return options.result(total, kl_T, x_TD)
