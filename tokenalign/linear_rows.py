"""Any row-wise loss of two models given as hidden states and heads: the [T, V] and [T, W] logits
exist chunk by chunk.

    total = sum_t weight[t] loss(student logits[t], teacher[t])

As in kernels.linear_kl the weights are known in the forward, so gradients are made there, one chunk
at a time, and the backward only scales them: 3 student GEMMs and 1 teacher GEMM. The loss is an
ordinary differentiable function of a chunk's logits, so this is the slow, general form:
`kernels.linear_kl`, `linear_topk_kl` and `bucket_kl` are fused where they apply.

T: tokens, D and E: hidden sizes, V and W: vocabularies, C: rows of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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

# [C, V] tensors that a chunk keeps alive: both logits, a map's entries, and what autograd saves
BUFFERS = 10


class Linear(NamedTuple):
    """logits = softcap * tanh(hidden @ head[:vocab_size].T / softcap)."""

    hidden_TD: Tensor
    head_VD: Tensor
    softcap: float | None = None
    vocab_size: int | None = None  # None: all rows of the head


def linear_rows(
    loss: Callable[[Tensor, Any], Tensor],
    student: Linear,
    teacher: Linear | tuple,
    *,
    weight: Tensor | None = None,
    workspace_mb: float = 1200,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], loss [T]), fp32 (fp64 for fp64). total is differentiable in the student's hidden
    and head.

    loss(student_logits_CV, teacher_C) -> [C], from `class_losses` with the options bound, e.g.
    partial(uld, temperature=2.0). teacher: hidden and head, of which loss gets logits [C, W]; or a
    NamedTuple of [T, ...] tensors (kernels' TopK, ClassLogProb), of which it gets the chunk's rows.
    Anything with Linear's four attributes may stand for Linear. weight [T]: constant, None for
    ones. A row whose loss is inf or NaN keeps that value and contributes a zero gradient.
    workspace_mb (MiB) bounds the logits alive at once; logits are fp32. ValueError on shapes and
    dtypes.
    """
    V = check_linear(
        "linear_rows (student)", student.hidden_TD, student.head_VD, student.vocab_size, 1.0
    )
    rows = [len(student.hidden_TD)]
    if hasattr(teacher, "head_VD"):
        widest = max(
            V,
            check_linear(
                "linear_rows (teacher)", teacher.hidden_TD, teacher.head_VD, teacher.vocab_size, 1.0
            ),
        )
        rows.append(len(teacher.hidden_TD))
    else:
        widest = V
        rows += [len(x) for x in teacher]
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


class _Call(NamedTuple):
    loss: Callable[[Tensor, Any], Tensor]
    student: Linear
    teacher: Linear | tuple
    vocab_size: int
    widest: int
    workspace_mb: float

    def teacher_rows(self, c: slice) -> Any:
        teacher = self.teacher
        if not hasattr(teacher, "head_VD"):
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
        for c in chunks(hidden_TD, call.widest, BUFFERS, call.workspace_mb):
            z_CV = project(hidden_TD[c], head_VD[:V], softcap).requires_grad_(
                need_dhidden or need_dhead
            )
            with torch.enable_grad():
                loss_C = call.loss(z_CV, call.teacher_rows(c))
            loss_T[c] = loss_C.detach()
            if z_CV.requires_grad:
                dz_CV = _row_gradients(loss_C, z_CV, weight_T[c])
                if softcap:
                    dz_CV *= 1 - (z_CV.detach() / softcap).square()
                dhidden_CD = backproject(
                    dz_CV,
                    hidden_TD[c],
                    head_VD[:V],
                    need_dhidden,
                    dhead_VD[:V] if need_dhead else None,
                )
                if need_dhidden:
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
    (dz_CV,) = torch.autograd.grad(
        loss_C, z_CV, torch.where(used_C, weight_C.to(loss_C.dtype), 0.0)
    )
    return torch.where(used_C[:, None], dz_CV, 0.0)
