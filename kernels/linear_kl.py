"""Divergence of a student from a teacher, both given as hidden states and head.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), of either side its own;
             no tanh without a softcap
    p = softmax(student logits / temperature),  q = softmax(teacher logits / temperature)
    kl[t]  = D(p[t], q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in
             _divergence.py)
    total  = sum_t weight[t] kl[t]

The [T, V] logits exist chunk by chunk. The weights are known in the forward, so gradients of total
are made there, chunk by chunk, and the backward only scales them: 3 student GEMMs and 1 teacher
GEMM, against 4 and 2 when the backward recomputes. A row whose kl is inf or NaN (the teacher bans a
token that the student of a reverse KL has, say) keeps that value in kl and contributes a zero
gradient.

Options that all divergence ops share:

    beta          0 < beta < 1, jsd and skew only
    weight [T]    constant, None for ones
    rows [M]      int64, distinct: only these are computed, the others have kl 0 and gradient 0
    scale_t2      multiply kl and gradient by temperature squared (Hinton et al., arXiv:1503.02531)
    vocab_size    head rows from there on are padding
    shard         VocabShard(group name, first row) or VocabShard.of(head): heads and biases are
                  this rank's slice of the vocabulary, hidden states are the same on all ranks of
                  the group, and vocab_size counts the whole; kl, total and the gradient in hidden
                  are then the whole vocabulary's
    workspace_mb  MiB, bounds the logits alive at once; workspace_that_fits(device) gives a larger
                  one where memory is free: fewer passes over the head's gradient
    frozen_...    no gradient of head and bias, which otherwise accumulate in fp32

measures=True adds the student's entropy and both models' top-1 of every row (`_measures.py`), from
the same logits.

Under autocast operands are cast as nn.Linear would.

Shapes: T tokens, M chosen rows, D hidden of the student, E hidden of the teacher, V vocabulary, C
rows of a chunk.
"""

from typing import Any

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
from ._chunks import workspace_that_fits as workspace_that_fits
from ._divergence import divergence_ref, largest_gradient
from ._head import Head, HeadGradients, checked_head, fake_gradients
from ._kl_rows import KLSpec, kl_rows
from ._loss import (
    LinearKL,
    LossOptions,
    fake_loss,
    loss_factor,
    loss_ref,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from ._loss import row_weights as row_weights
from ._measures import KLMeasures as KLMeasures
from ._parallel import VocabShard, common_width, local_width, slice_of

BLOCKS = 2, 8  # of logits alive at once beside the gradient: with kernels, with PyTorch alone


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
    measures: bool = False,
) -> LinearKL:
    """The definition, with both [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    student_options = student_bias, student_logit_scale, student_softcap, vocab_size
    teacher_options = teacher_bias, teacher_logit_scale, teacher_softcap, vocab_size
    z_TV = logits_ref(student_hidden_TD, student_head_VD, *student_options)
    u_TV = logits_ref(teacher_hidden_TE, teacher_head_VE, *teacher_options)
    logp_TV, logq_TV = ((x_TV / temperature).log_softmax(-1) for x_TV in (z_TV, u_TV.detach()))
    kl_T = divergence_ref(logp_TV, logq_TV, divergence, beta)
    loss = loss_ref(kl_T, weight, rows, temperature**2 if scale_t2 else 1.0)
    if not measures:
        return loss
    logp_TV = logp_TV.detach()
    entropy_T = -torch.where(logp_TV == -torch.inf, 0.0, logp_TV.exp() * logp_TV).sum(-1)
    found = KLMeasures(entropy_T, logp_TV.argmax(-1), logq_TV.argmax(-1))
    if rows is None:
        return loss._replace(measures=found)
    none, rows = KLMeasures.empty(student_hidden_TD, True), rows.long()
    chosen = [x_T.to(y_T.dtype).index_copy(0, rows, y_T[rows]) for x_T, y_T in zip(none, found)]
    return loss._replace(measures=KLMeasures(*chosen))


@torch.library.custom_op("reflux::linear_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    student_logit_scale: float,
    student_softcap: float,
    teacher_hidden_TE: Tensor,
    teacher_head_VE: Tensor,
    teacher_bias_V: Tensor | None,
    teacher_logit_scale: float,
    teacher_softcap: float,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    measures: bool,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], gradients in the student's hidden, head and bias or empty, `KLMeasures`."""
    x_TD, V = student_hidden_TD, local_width(len(student_head_VD), vocab_size, vocab_start)
    side = x_TD, student_head_VD, student_bias_V, student_logit_scale, student_softcap
    student = Head(*side).cut(V)
    side = teacher_hidden_TE, teacher_head_VE, teacher_bias_V, teacher_logit_scale, teacher_softcap
    teacher = Head(*side).cut(V)
    student_scale, gradient_scale = student.scales(temperature)
    scales = student_scale, teacher.scales(temperature)[0]
    spec = KLSpec(divergence, beta, scales, student_softcap, group)
    t2 = loss_factor(temperature, scale_t2)
    factor, need = t2 * gradient_scale, (need_dhidden, need_dhead, need_dbias)
    width, E = common_width(vocab_size, group), teacher_hidden_TE.shape[1]
    plan = head_plan(x_TD, width, BLOCKS, E, need, workspace_mb, rows_M)
    largest = largest_gradient(divergence) * factor * student_scale
    grads = HeadGradients.zeros(x_TD, student_head_VD, need, V, plan, largest)
    coeff_T = weight_T * (factor * grads.lift)
    kl_T = x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))
    measured = KLMeasures.empty(x_TD, measures)

    # a function, so that its blocks are free before the next chunk's are made
    def step(part: Part) -> None:
        c = part.rows
        z_CV, u_CV = student.logits(c), teacher.logits(c)
        measured.read(c, (z_CV, u_CV), student_scale, group, vocab_start)
        dz_CV = grads.block(part, z_CV)
        to_CV = padded(dz_CV) if any(need) else None
        kl_T[c] = kl_rows(padded(z_CV), padded(u_CV), coeff_T[c], spec, to_CV)
        grads.add(part, dz_CV, student)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    kl_T.mul_(t2)
    gradients = grads.finish(student_head_VD, student_bias_V, group)
    return weighted_total(kl_T, weight_T), kl_T, *gradients, *measured


def _fake(student_hidden_TD, student_head_VD, student_bias_V, *rest):
    gradients = fake_gradients(student_hidden_TD, student_head_VD, student_bias_V, rest[-3:])
    loss = fake_loss(student_hidden_TD)
    return *loss, *gradients, *KLMeasures.empty(student_hidden_TD, rest[-4])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_gradients(ctx, inputs, output[:5])
    ctx.mark_non_differentiable(*output[1:])


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=_save)


def _check_sides(
    student: Head, teacher: Head, vocab_size: int | None, shard: VocabShard | None
) -> None:
    V, teacher_V = (
        len(head) if vocab_size is None else local_width(len(head), vocab_size, slice_of(shard)[1])
        for head in (student.head_VD, teacher.head_VD)
    )
    if V != teacher_V:
        raise ValueError(
            f"linear_kl: the student's head has {V} rows and the teacher's {teacher_V}. If both "
            "pad one vocabulary, pass vocab_size; else the tokenizers differ and no token-level "
            "KL exists. Slices of a vocabulary must be cut at the same rows"
        )
    rows = student.hidden_TD.shape[0], teacher.hidden_TD.shape[0]
    if rows[0] != rows[1]:
        raise ValueError(
            f"linear_kl: {rows[0]} student rows and {rows[1]} teacher rows; want one row per token "
            "on both sides"
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
    measures: bool = False,
) -> LinearKL:
    """(total [], kl [T], measures or None), fp32 (fp64 for fp64), in nats. The teacher gets no
    gradient.

    total is differentiable in the student's hidden, head and bias. hidden [T, D] or [T, E] and head
    [V, D] or [V, E]; D and E may differ, V may not unless vocab_size says that both heads are
    padded beyond it. bias [V]. The options are those at the head of this file. ValueError on
    shapes, dtypes, or an option that has no meaning.
    """
    op, cut = "linear_kl", (vocab_size, shard)
    side = student_hidden_TD, student_head_VD, student_bias, student_logit_scale, student_softcap
    student, V = checked_head(f"{op} (student)", *side, *cut)
    side = teacher_hidden_TE, teacher_head_VE, teacher_bias, teacher_logit_scale, teacher_softcap
    teacher, _ = checked_head(f"{op} (teacher)", *side, *cut)
    _check_sides(student, teacher, vocab_size, shard)
    options = LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    student, teacher = options.read(op, student), options.read(op, teacher)
    total, kl_T, _, _, _, *measured = _op(
        *student,
        *teacher.detach(),
        *options.checked(op, student.hidden_TD),
        V,
        *slice_of(shard),
        workspace_mb,
        measures,
        *student.needs(frozen_student_head),
    )
    loss = options.result(total, kl_T, student.hidden_TD)
    return loss._replace(measures=KLMeasures(*measured)) if measures else loss
