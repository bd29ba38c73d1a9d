"""Divergence between the class probabilities of a student and a teacher with different
vocabularies.

    P_c = sum of softmax(student logits / temperature) over the student's ids of class c,  Q_c
        likewise over the teacher's
    kl[t]  = D(P[t], Q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in
           _divergence.py)
    total  = sum_t weight[t] kl[t]

A class map sends every id of either vocabulary to one of N classes: its first byte, its spelling if
both have it and OTHER if not, "stop" (`class_map`; tokenalign builds them). What is coarsened alike
on both sides is still a divergence: never negative, 0 with zero gradient at equal class masses, at
most that of any finer map, token-level KL included. Gradient of forward KL in the scaled logit of
id i of class c: p_i (1 - Q_c / P_c).

A class without ids has probability 0. Where the other side has mass in it, forward KL (no student
id) or reverse KL (no teacher id) is infinite in every row, so such maps are refused; mixtures take
them. Ids of class -1 are in no softmax.

Gradients of total are made in the forward, chunk by chunk, and the backward only scales them, as in
linear_kl. A row whose kl is inf or NaN keeps that value in kl and contributes a zero gradient.

Shapes: T tokens, D hidden of the student, E hidden of the teacher, V and W their vocabularies, N
classes, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import (
    Rows,
    check_logit_scale,
    check_rows,
    check_softcap,
    chunks,
    needs_gradient,
    wide,
)
from ._classes import ClassMap, Gradients, Side, checked_side, fake_gradients, row_floats
from ._classes import class_map as class_map
from ._divergence import check_divergence, divergence_ref
from ._kl_rows import kl_rows
from ._parallel import VocabShard, common_width
from ._triton import require
from .class_logprob import class_logprob_ref
from .linear_kl import LinearKL, row_weights, save_gradients, scale_gradients, weighted_total


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
    """The definition, with [T, V] and [T, W] in memory. fp32 arithmetic, or fp64 when given
    fp64.
    """
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
    kl_T = divergence_ref(logp_TN, logq_TN, divergence, beta) * (
        temperature**2 if scale_t2 else 1.0
    )
    if rows is not None:
        kl_T = torch.zeros_like(kl_T).index_copy(0, rows.long(), kl_T[rows])
    return LinearKL(
        weighted_total(kl_T, torch.ones_like(kl_T) if weight is None else weight.to(kl_T.dtype)),
        kl_T.detach(),
    )


@torch.library.custom_op("reflux::bucket_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    student_columns: list[Tensor],
    teacher_hidden_TE: Tensor,
    teacher_head_WE: Tensor,
    teacher_bias_W: Tensor | None,
    teacher_columns: list[Tensor],
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    student_vocab_size: int,
    teacher_vocab_size: int,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    student_group: str,
    teacher_group: str,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], and the gradients of total in the student's hidden, head and bias (empty
    where not needed).
    """
    x_TD, N = student_hidden_TD, student_columns[2].shape[0] - 1
    student = Side.of(
        x_TD, student_head_VD, student_bias_V, student_columns, student_logit_scale, student_softcap
    )
    teacher = Side.of(
        teacher_hidden_TE,
        teacher_head_WE,
        teacher_bias_W,
        teacher_columns,
        teacher_logit_scale,
        teacher_softcap,
    )
    grads = Gradients.of(student, (need_dhidden, need_dhead, need_dbias))
    t2 = temperature**2 if scale_t2 else 1.0
    coeff_T, kl_T = weight_T * t2, x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        # the teacher's logits are free by now
        u_CN, _ = teacher.classes(teacher.logits(c), temperature, teacher_group)
        logits_CL = student.logits(c)
        z_CN, top_C = student.classes(logits_CL, temperature, student_group)
        dz_CN = torch.empty_like(z_CN) if any(grads.need) else None
        kl_T[c] = kl_rows(z_CN, u_CN, coeff_T[c], (1.0, 1.0), divergence, beta, 0.0, dz_CN)
        if dz_CN is not None:
            student.backward(c, logits_CL, (z_CN, top_C), dz_CN, temperature, grads)

    widths = (
        common_width(student_vocab_size, student_group),
        common_width(teacher_vocab_size, teacher_group),
    )
    for c in chunks(x_TD, row_floats(x_TD, max(widths), 2 * N), 1, workspace_mb, rows_M):
        step(c)
    kl_T.mul_(t2)
    return (
        weighted_total(kl_T, weight_T),
        kl_T,
        *grads.finish(student_head_VD, student_bias_V, student_columns, student_group),
    )


def _fake(student_hidden_TD, student_head_VD, student_bias_V, *rest):
    total = student_hidden_TD.new_empty((), dtype=wide(student_hidden_TD.dtype))
    return (
        total,
        total.new_empty(student_hidden_TD.shape[0]),
        *fake_gradients(student_hidden_TD, student_head_VD, student_bias_V, rest[-3:]),
    )


def _grad(ctx, g_total, *_):
    grads = scale_gradients(ctx, g_total)
    return tuple([None] * 4 if i in (3, 7) else g for i, g in enumerate(grads))  # the column lists


_op.register_fake(_fake)
_op.register_autograd(_grad, setup_context=save_gradients)


def _check_sides(
    student: ClassMap, teacher: ClassMap, divergence: str, student_rows: int, teacher_rows: int
) -> None:
    require(
        student.num_classes == teacher.num_classes,
        f"bucket_kl: {student.num_classes} student classes and {teacher.num_classes} teacher "
        "classes; want one numbering "
        "for both: class_map(class_V, N) and class_map(class_W, N)",
    )
    require(
        student_rows == teacher_rows,
        f"bucket_kl: {student_rows} student rows and {teacher_rows} teacher rows; "
        "want one row per position on both sides, those where both have read the same bytes",
    )
    alone = {
        "forward": student.empty - teacher.empty,
        "reverse": teacher.empty - student.empty,
    }.get(divergence, ())
    require(
        not alone,
        f"bucket_kl: {divergence} KL is infinite: {len(alone)} classes, such as {min(alone, default=0)}, "
        f"have ids of the {'teacher' if divergence == 'forward' else 'student'} only. Give them one on "
        "the other side, merge them into a class that has some, or set their ids to -1",
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
    workspace_mb: float = 1200,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. total is differentiable in the student's
    hidden, head and bias.

    hidden [T, D] and [T, E], heads [V, D] and [W, E], biases [V] and [W]; row t of both is a
    position where both models have read the same bytes. classes: `class_map` of each vocabulary,
    numbered alike; they have one class per head row, up to the vocab_size of that side. beta: jsd
    and skew only. weight [T]: constant, None for ones. rows int64 [M], distinct: only these are
    computed, the others have kl 0 and gradient 0. scale_t2 multiplies kl and gradient by
    temperature squared. shards: that side's head, bias and classes (`classes.slice`) are this
    rank's slice of its vocabulary, and hidden states are the same on all ranks; one side may be
    sliced and the other whole. N numbers a row travel twice for each. The teacher gets no gradient;
    frozen_student_head skips that of head and bias, which otherwise accumulate in fp32.
    workspace_mb (MiB) bounds the logits alive at once; each head is copied once a call into class
    order. ValueError on shapes, dtypes, a class that makes every row infinite, or an option that
    has no meaning.
    """
    check_divergence("bucket_kl", divergence, beta)
    x_TD, head_VD, bias_V = checked_side(
        "bucket_kl (student)",
        student_hidden_TD,
        student_head_VD,
        student_classes,
        student_bias,
        student_vocab_size,
        temperature,
        student_shard,
    )
    y_TE, head_WE, bias_W = checked_side(
        "bucket_kl (teacher)",
        teacher_hidden_TE,
        teacher_head_WE,
        teacher_classes,
        teacher_bias,
        teacher_vocab_size,
        temperature,
        teacher_shard,
    )
    _check_sides(student_classes, teacher_classes, divergence, len(x_TD), len(y_TE))
    total, kl_T, *_ = _op(
        x_TD,
        head_VD,
        bias_V,
        student_classes.columns,
        y_TE.detach(),
        head_WE.detach(),
        None if bias_W is None else bias_W.detach(),
        teacher_classes.columns,
        row_weights("bucket_kl", weight, x_TD),
        check_rows("bucket_kl", rows, x_TD),
        divergence,
        beta,
        temperature,
        scale_t2,
        student_classes.vocab_size,
        teacher_classes.vocab_size,
        check_logit_scale("bucket_kl", student_logit_scale),
        check_logit_scale("bucket_kl", teacher_logit_scale),
        check_softcap("bucket_kl", student_softcap),
        check_softcap("bucket_kl", teacher_softcap),
        student_shard.group if student_shard else "",
        teacher_shard.group if teacher_shard else "",
        workspace_mb,
        needs_gradient(x_TD),
        needs_gradient(head_VD, frozen_student_head),
        needs_gradient(bias_V, frozen_student_head),
    )
    return LinearKL(total, kl_T)
