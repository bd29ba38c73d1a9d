"""Any row-wise loss of two models given as hidden states and heads.

    total = sum_t weight[t] loss(student logits[t], teacher[t])

The [T, V] and [T, W] logits exist chunk by chunk. As in kernels.linear_kl the weights are known in
the forward, so gradients are made there, one chunk at a time, and the backward only scales them: 3
student GEMMs and 1 teacher GEMM. The loss is an ordinary differentiable function of a chunk's
logits, so this is the slow, general form: `kernels.linear_kl`, `linear_topk_kl` and `bucket_kl` are
fused where they apply (`linear_class_kl`).

T: tokens, D and E: hidden sizes, V and W: vocabularies, C: rows of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflux.kernels._chunks import (
    backproject,
    check_linear,
    check_softcap,
    chunks,
    gradient_buffers,
    needs_gradients,
    project,
    wide,
)
from reflux.kernels.linear_kl import LinearKL, row_weights, weighted_total
from reflux.kernels.teacher_topk import TopK

from .class_losses import ClassLogProb

# [C, V] tensors that a chunk keeps alive: both logits, an index's entries, and what autograd saves
BUFFERS = 10


class HeadLike(Protocol):
    """A model's hidden states and output head.

    logits = softcap * tanh(hidden @ head[:vocab_size].T / softcap), without the tanh if softcap is
    None. vocab_size None: all rows of the head.
    """

    @property
    def hidden_TD(self) -> Tensor: ...
    @property
    def head_VD(self) -> Tensor: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def vocab_size(self) -> int | None: ...


class Linear(NamedTuple):
    """The plain `HeadLike`."""

    hidden_TD: Tensor
    head_VD: Tensor
    softcap: float | None = None
    vocab_size: int | None = None


TeacherRows = TopK | ClassLogProb  # tensors [T, ...], known without a head


def linear_rows(
    loss: Callable[[Tensor, Any], Tensor],
    student: HeadLike,
    teacher: HeadLike | TeacherRows,
    *,
    weight: Tensor | None = None,
    workspace_mb: float = 1200,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], loss [T]), fp32 (fp64 for fp64). total is differentiable in the student's hidden
    and head.

    loss(student_logits_CV, teacher_C) -> [C], from `class_losses` with the options bound, e.g.
    partial(uld, temperature=2.0). Of a teacher with a head it gets logits [C, W], of TeacherRows
    the chunk's rows. weight [T]: constant, None for ones. A row whose loss is inf or NaN keeps that
    value and contributes a zero gradient. workspace_mb (MiB) bounds the logits alive at once;
    logits are fp32. ValueError on shapes and dtypes.
    """
    V = _checked("student", student)
    rows = [len(student.hidden_TD)]
    if isinstance(teacher, TeacherRows):
        widest = V
        rows += [len(x) for x in teacher]
    else:
        widest = max(V, _checked("teacher", teacher))
        rows.append(len(teacher.hidden_TD))
    if len(set(rows)) > 1:
        raise ValueError(
            f"linear_rows: {rows[0]} student rows and {rows[1:]} teacher rows; want one teacher "
            "row per student row. Gather both sides at span_starts first."
        )
    total, loss_T = _LinearRows.apply(
        student.hidden_TD,
        student.head_VD,
        _Call(loss, student, teacher, V, widest, workspace_mb),
        row_weights("linear_rows", weight, student.hidden_TD),
        *needs_gradients(student.hidden_TD, student.head_VD, frozen_student_head),
    )
    return LinearKL(total, loss_T)


def _checked(side: str, model: HeadLike) -> int:
    """Rows of the head in use. ValueError as the kernels'."""
    return check_linear(
        f"linear_rows ({side})", model.hidden_TD, model.head_VD, model.vocab_size, 1.0
    )


class _Call(NamedTuple):
    loss: Callable[[Tensor, Any], Tensor]
    student: HeadLike
    teacher: HeadLike | TeacherRows
    vocab_size: int
    widest: int
    workspace_mb: float

    def teacher_rows(self, c: slice) -> Tensor | TeacherRows:
        teacher = self.teacher
        if isinstance(teacher, TeacherRows):
            return type(teacher)(*(x[c] for x in teacher))
        softcap = check_softcap("linear_rows", teacher.softcap)
        return project(
            teacher.hidden_TD[c].detach(), teacher.head_VD.detach()[: teacher.vocab_size], softcap
        )


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, call, weight_T, need_dhidden, need_dhead):
        softcap, V = check_softcap("linear_rows", call.student.softcap), call.vocab_size
        loss_T = hidden_TD.new_empty(len(hidden_TD), dtype=wide(hidden_TD.dtype))
        dhidden_TD, dhead_VD = gradient_buffers(hidden_TD, head_VD, need_dhidden, need_dhead)
        dhead_used_VD = dhead_VD[:V] if need_dhead else None
        for c in chunks(hidden_TD, call.widest, BUFFERS, call.workspace_mb):
            z_CV = project(hidden_TD[c], head_VD[:V], softcap)
            z_CV.requires_grad_(need_dhidden or need_dhead)
            with torch.enable_grad():
                loss_C = call.loss(z_CV, call.teacher_rows(c))
            loss_T[c] = loss_C.detach()
            if not z_CV.requires_grad:
                continue
            dz_CV = _row_gradients(loss_C, z_CV, weight_T[c])
            if softcap:
                dz_CV *= 1 - (z_CV.detach() / softcap).square()
            dhidden_CD = backproject(dz_CV, hidden_TD[c], head_VD[:V], need_dhidden, dhead_used_VD)
            if dhidden_CD is not None:
                dhidden_TD[c] = dhidden_CD
        ctx.save_for_backward(dhidden_TD, dhead_VD.to(head_VD.dtype))
        ctx.needed = need_dhidden, need_dhead
        ctx.mark_non_differentiable(loss_T)
        ctx.set_materialize_grads(False)
        return weighted_total(loss_T, weight_T), loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        if grad_total is None:
            return (None,) * 6
        dhidden_TD, dhead_VD = (
            d * grad_total if needed else None
            for d, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
        )
        return dhidden_TD, dhead_VD, None, None, None, None


def _row_gradients(loss_C: Tensor, z_CV: Tensor, weight_C: Tensor) -> Tensor:
    """d(sum weight * loss)/dz, zero in the rows whose loss is not finite."""
    used_C = loss_C.detach().isfinite() & (weight_C != 0)
    upstream_C = torch.where(used_C, weight_C.to(loss_C.dtype), 0.0)
    (dz_CV,) = torch.autograd.grad(loss_C, z_CV, upstream_C)
    return torch.where(used_C[:, None], dz_CV, 0.0)
