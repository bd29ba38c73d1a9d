"""Divergence between the class probabilities of two models with different vocabularies.

    P_c = sum of softmax(student logits / temperature) over the student's ids of class c,
    Q_c   likewise over the teacher's
    kl[t]  = D(P[t], Q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in
             _divergence.py)
    total  = sum_t weight[t] kl[t]

A vocabulary partition sends every id of either vocabulary to one of N classes: its first byte, its
spelling if both have it and else one class for all such ids, "stop". `class_map` prepares each
side's half of it; tokenalign builds partitions of real tokenizers. What is coarsened alike on both
sides is still a divergence: never negative, 0 with zero gradient at equal class masses, at most
that of any finer partition, token-level KL included. Gradient of forward KL in the scaled logit of
id i of class c: p_i (1 - Q_c / P_c).

A class without ids has probability 0. Where the other side has mass in it, forward KL (no student
id) or reverse KL (no teacher id) is infinite in every row, so such partitions are refused; mixtures
take them. Ids of class -1 are in no softmax.

Gradients of total are made in the forward, chunk by chunk, and the backward only scales them, as in
linear_kl. A row whose kl is inf or NaN keeps that value in kl and contributes a zero gradient.

Shapes: T tokens, D hidden of the student, E hidden of the teacher, V and W their vocabularies, N
classes, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import WORKSPACE_MB, Part, parts, wide
from ._classes import ClassMap, ClassSide, checked_side, class_plan, fake_gradients, gradients_by_id
from ._classes import class_map as class_map
from ._divergence import divergence_ref, largest_gradient
from ._head import Head
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
from ._parallel import VocabShard, common_width, slice_of
from .class_logprob import class_logprob_ref


def bucket_kl_ref(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    student_classes: ClassMap,
    teacher_hidden_TE: Tensor,
    teacher_head_WE: Tensor,
    teacher_classes: ClassMap,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> LinearKL:
    """The definition, with [T, V] and [T, W] in memory. fp32 arithmetic, or fp64 for fp64."""
    logp_TN = class_logprob_ref(
        student_hidden_TD,
        student_head_VD,
        student_classes,
        temperature=temperature,
        softcap=student_softcap,
        bias=student_bias,
        logit_scale=student_logit_scale,
    )
    logq_TN = class_logprob_ref(
        teacher_hidden_TE,
        teacher_head_WE,
        teacher_classes,
        temperature=temperature,
        softcap=teacher_softcap,
        bias=teacher_bias,
        logit_scale=teacher_logit_scale,
    ).detach()
    kl_T = divergence_ref(logp_TN, logq_TN, divergence, beta)
    return loss_ref(kl_T, weight, rows, temperature**2 if scale_t2 else 1.0)


@torch.library.custom_op("reflux::bucket_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    student_logit_scale: float,
    student_softcap: float,
    student_columns: list[Tensor],
    student_vocab_size: int,
    student_group: str,
    teacher_hidden_TE: Tensor,
    teacher_head_WE: Tensor,
    teacher_bias_W: Tensor | None,
    teacher_logit_scale: float,
    teacher_softcap: float,
    teacher_columns: list[Tensor],
    teacher_vocab_size: int,
    teacher_group: str,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], gradients of total in the student's hidden, head and bias or empty."""
    x_TD, N = student_hidden_TD, student_columns[2].shape[0] - 1
    head = x_TD, student_head_VD, student_bias_V, student_logit_scale, student_softcap
    student = ClassSide.of(Head(*head), student_columns)
    head = teacher_hidden_TE, teacher_head_WE, teacher_bias_W, teacher_logit_scale, teacher_softcap
    teacher = ClassSide.of(Head(*head), teacher_columns)
    need, E = (need_dhidden, need_dhead, need_dbias), teacher_hidden_TE.shape[1]
    width = common_width(student_vocab_size, student_group)
    width = max(width, common_width(teacher_vocab_size, teacher_group))
    plan = class_plan(x_TD, width, 8 * N, E, need, workspace_mb, rows_M)
    t2, spec = loss_factor(temperature, scale_t2), KLSpec(divergence, beta, (1.0, 1.0), 0.0, "")
    grads = student.gradients(need, plan, temperature, largest_gradient(divergence) * t2)
    coeff_T = weight_T * (t2 * grads.lift)
    kl_T = x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))

    # a function, so that its blocks are free before the next chunk's are made
    def step(part: Part) -> None:
        c = part.rows
        # the teacher's logits are free before the student's are made
        u_CN, _ = teacher.classes(teacher.head.logits(c), temperature, teacher_group)
        logits_CL = student.head.logits(c)
        z_CN, top_C = student.classes(logits_CL, temperature, student_group)
        dz_CN = torch.empty_like(z_CN) if any(grads.need) else None
        kl_T[c] = kl_rows(z_CN, u_CN, coeff_T[c], spec, dz_CN)
        if dz_CN is not None:
            student.backward(part, logits_CL, (z_CN, top_C), dz_CN, temperature, grads)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    kl_T.mul_(t2)
    inputs = student_head_VD, student_bias_V, student_columns, student_group
    return weighted_total(kl_T, weight_T), kl_T, *gradients_by_id(grads, *inputs)


def _fake(student_hidden_TD, student_head_VD, student_bias_V, *rest):
    gradients = fake_gradients(student_hidden_TD, student_head_VD, student_bias_V, rest[-3:])
    return *fake_loss(student_hidden_TD), *gradients


def _grad(ctx, g_total, *_):
    grads = scale_gradients(ctx, g_total)
    return tuple([None] * 4 if i in (5, 13) else g for i, g in enumerate(grads))  # the columns


_op.register_fake(_fake)
_op.register_autograd(_grad, setup_context=save_gradients)


def _check_sides(
    student: ClassMap, teacher: ClassMap, divergence: str, student_rows: int, teacher_rows: int
) -> None:
    if student.num_classes != teacher.num_classes:
        raise ValueError(
            f"bucket_kl: {student.num_classes} student classes and {teacher.num_classes} teacher "
            "classes; want one numbering for both: class_map(class_V, N) and class_map(class_W, N)"
        )
    if student_rows != teacher_rows:
        raise ValueError(
            f"bucket_kl: {student_rows} student rows and {teacher_rows} teacher rows; "
            "want one row per position on both sides, those where both have read the same bytes"
        )
    alone: frozenset[int] = frozenset()
    if divergence == "forward":
        alone = student.empty - teacher.empty
    elif divergence == "reverse":
        alone = teacher.empty - student.empty
    owner = "teacher" if divergence == "forward" else "student"
    if alone:
        raise ValueError(
            f"bucket_kl: {divergence} KL is infinite: {len(alone)} classes, such as "
            f"{min(alone, default=0)}, have ids of the {owner} only. Give them one on the other "
            "side, merge them into a class that has some, or set their ids to -1"
        )


def bucket_kl(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    student_classes: ClassMap,
    teacher_hidden_TE: Tensor,
    teacher_head_WE: Tensor,
    teacher_classes: ClassMap,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_shard: VocabShard | None = None,
    teacher_shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. The teacher gets no gradient.

    hidden [T, D] and [T, E], heads [V, D] and [W, E], biases [V] and [W]; row t of both is a
    position where both models have read the same bytes. classes: `class_map` of each vocabulary,
    numbered alike, one class per head row up to the vocab_size of that side. shards: of that side,
    with classes.slice; one may be sliced and the other whole. Options as in `linear_kl`. ValueError
    on shapes, dtypes, a class that makes every row infinite, or options.
    """
    op, options = "bucket_kl", LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    side = student_hidden_TD, student_head_VD, student_bias, student_logit_scale, student_softcap
    cut = student_classes, student_vocab_size, student_shard
    student = checked_side(f"{op} (student)", *side, *cut)
    side = teacher_hidden_TE, teacher_head_WE, teacher_bias, teacher_logit_scale, teacher_softcap
    cut = teacher_classes, teacher_vocab_size, teacher_shard
    teacher = checked_side(f"{op} (teacher)", *side, *cut)
    rows_of = len(student.hidden_TD), len(teacher.hidden_TD)
    _check_sides(student_classes, teacher_classes, divergence, *rows_of)
    student, teacher = options.read(op, student), options.read(op, teacher)
    total, kl_T, *_ = _op(
        *student,
        student_classes.columns,
        student_classes.vocab_size,
        slice_of(student_shard)[0],
        *teacher.detach(),
        teacher_classes.columns,
        teacher_classes.vocab_size,
        slice_of(teacher_shard)[0],
        *options.checked(op, student.hidden_TD),
        workspace_mb,
        *student.needs(frozen_student_head),
    )
    return options.result(total, kl_T, student.hidden_TD)
