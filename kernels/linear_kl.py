"""Divergence of a student from a teacher, both given as hidden states and head: [T, V] logits exist chunk by chunk.

    p = softmax(student logits / temperature),  q = softmax(teacher logits / temperature)
    kl[t]  = D(p[t], q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in _divergence.py)
    total  = sum_t weight[t] kl[t]

The weights are known in the forward, so gradients of total are made there, chunk by chunk, and the backward only scales
them: 3 student GEMMs and 1 teacher GEMM, against 4 and 2 when the backward recomputes. Losses are not multiplied by
temperature squared. A row whose kl is inf or NaN keeps that value in kl and contributes a zero gradient.

Shapes: T tokens, D hidden of the student, E hidden of the teacher, V vocabulary, C rows of a chunk.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import (
    backproject,
    check_linear,
    check_softcap,
    chunks,
    gradient_buffers,
    needs_gradients,
    project,
    wide,
    workspace_buffers,
)
from ._divergence import check_mode, divergence_ref
from ._kl_rows import kl_rows
from ._parallel import local_head
from ._triton import require


class LinearKL(NamedTuple):
    total: Tensor  # [], differentiable
    kl: Tensor  # [T], detached


def linear_kl_ref(student_hidden_TD: Tensor, student_head_VD: Tensor, teacher_hidden_TE: Tensor,
                  teacher_head_VE: Tensor, *, mode: str = "forward", beta: float = 0.5, temperature: float = 1.0,
                  weight: Tensor | None = None, vocab_size: int | None = None, student_softcap: float | None = None,
                  teacher_softcap: float | None = None) -> LinearKL:
    """The definition, with both [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    def log_softmax(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
        dtype = wide(hidden.dtype)
        logits_TV = hidden.to(dtype) @ head[:vocab_size].to(dtype).t()
        logits_TV = softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV
        return (logits_TV / temperature).log_softmax(-1)

    logq_TV = log_softmax(teacher_hidden_TE, teacher_head_VE, teacher_softcap).detach()
    kl_T = divergence_ref(log_softmax(student_hidden_TD, student_head_VD, student_softcap), logq_TV, mode, beta)
    return LinearKL(weighted_total(kl_T, torch.ones_like(kl_T) if weight is None else weight.to(kl_T.dtype)),
                    kl_T.detach())


def weighted_total(kl_T: Tensor, weight_T: Tensor) -> Tensor:
    """sum weight * kl, where a weight of 0 leaves its row out even if kl is not finite."""
    return torch.where(weight_T != 0, weight_T * kl_T, 0.0).sum()


@torch.library.custom_op("reflux::linear_kl", mutates_args=())
def _op(student_hidden_TD: Tensor, student_head_VD: Tensor, teacher_hidden_TE: Tensor, teacher_head_VE: Tensor,
        weight_T: Tensor, mode: str, beta: float, temperature: float, vocab_size: int, student_softcap: float,
        teacher_softcap: float, workspace_mb: float, need_dhidden: bool, need_dhead: bool,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], and the gradients of total in the student's hidden and head (empty where not needed)."""
    x_TD, head_VD = student_hidden_TD, student_head_VD[:vocab_size]
    kl_T = x_TD.new_empty(x_TD.shape[0], dtype=wide(x_TD.dtype))
    dx_TD, dhead_VD = gradient_buffers(x_TD, student_head_VD, need_dhidden, need_dhead)
    for c in chunks(x_TD, vocab_size, workspace_buffers(x_TD, 3, 8), workspace_mb):
        z_CV = project(x_TD[c], head_VD, student_softcap)
        u_CV = project(teacher_hidden_TE[c], teacher_head_VE[:vocab_size], teacher_softcap)
        dz_CV = z_CV if need_dhidden or need_dhead else None
        kl_T[c] = kl_rows(z_CV, u_CV, weight_T[c], 1 / temperature, mode, beta, student_softcap, dz_CV)
        if dz_CV is not None:
            dx_CD = backproject(dz_CV, x_TD[c], head_VD, need_dhidden, dhead_VD[:vocab_size] if need_dhead else None)
            if need_dhidden:
                dx_TD[c] = dx_CD
    return weighted_total(kl_T, weight_T), kl_T, dx_TD, dhead_VD.to(student_head_VD.dtype)


def _fake(student_hidden_TD, student_head_VD, teacher_hidden_TE, teacher_head_VE, weight_T, mode, beta, temperature,
          vocab_size, student_softcap, teacher_softcap, workspace_mb, need_dhidden, need_dhead):
    return fake_outputs(student_hidden_TD, student_head_VD, need_dhidden, need_dhead)


def fake_outputs(hidden_TD: Tensor, head_VD: Tensor, need_dhidden: bool, need_dhead: bool) -> tuple[Tensor, ...]:
    dtype = wide(hidden_TD.dtype)
    return (hidden_TD.new_empty((), dtype=dtype), hidden_TD.new_empty(hidden_TD.shape[0], dtype=dtype),
            hidden_TD.new_empty(hidden_TD.shape if need_dhidden else (0,)),
            head_VD.new_empty(head_VD.shape if need_dhead else (0,)))


def save_gradients(ctx, inputs, output) -> None:
    _, kl_T, dhidden_TD, dhead_VD = output
    ctx.save_for_backward(dhidden_TD, dhead_VD)
    ctx.mark_non_differentiable(kl_T, dhidden_TD, dhead_VD)
    ctx.set_materialize_grads(False)  # else autograd makes zero gradients for the saved [T, D] and [V, D] outputs
    ctx.needed, ctx.num_inputs = inputs[-2:], len(inputs)


def scale_gradients(ctx, g_total, *_) -> tuple[Tensor | None, ...]:
    """New tensors, so a retained graph can go backward again. The forward's workspace is free by now: no higher peak."""
    none = [None] * (ctx.num_inputs - 2)
    if g_total is None:
        return None, None, *none
    return *(d * g_total if needed else None for d, needed in zip(ctx.saved_tensors, ctx.needed)), *none


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def row_weights(op: str, weight: Tensor | None, hidden_TD: Tensor) -> Tensor:
    """weight [T] in the dtype of the losses, constant; ones if None."""
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    require(weight is None or weight.shape == (T,),
            f"{op}: weight is {list(getattr(weight, 'shape', []))} for {T} rows; want [T], 0 for an ignored row")
    return hidden_TD.new_ones(T, dtype=dtype) if weight is None else weight.detach().to(dtype).contiguous()


def linear_kl(student_hidden_TD: Tensor, student_head_VD: Tensor, teacher_hidden_TE: Tensor, teacher_head_VE: Tensor, *,
              mode: str = "forward", beta: float = 0.5, temperature: float = 1.0, weight: Tensor | None = None,
              vocab_size: int | None = None, student_softcap: float | None = None,
              teacher_softcap: float | None = None, workspace_mb: float = 1200,
              frozen_student_head: bool = False) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. total is differentiable in the student's hidden and head.

    hidden [T, D] or [T, E] and head [V, D] or [V, E]; D and E may differ, V may not unless vocab_size says that both
    heads are padded beyond it. beta: jsd and skew only, 0 < beta < 1. weight [T]: constant, None for ones.
    The teacher gets no gradient; frozen_student_head skips dhead, which otherwise accumulates in fp32.
    workspace_mb (MiB) bounds the logits alive at once.
    ValueError on shapes, dtypes, or an option that has no meaning.
    """
    check_mode("linear_kl", mode, beta)
    student_head_VD = local_head("linear_kl (student)", student_head_VD, None)
    teacher_head_VE = local_head("linear_kl (teacher)", teacher_head_VE, None)
    V = check_linear("linear_kl (student)", student_hidden_TD, student_head_VD, vocab_size, temperature)
    teacher_V = check_linear("linear_kl (teacher)", teacher_hidden_TE, teacher_head_VE, vocab_size, temperature)
    require(V == teacher_V, f"linear_kl: the student's head has {V} rows and the teacher's {teacher_V}. If both pad one "
            "vocabulary, pass vocab_size; else the tokenizers differ and no token-level KL exists")
    require(teacher_hidden_TE.shape[0] == student_hidden_TD.shape[0],
            f"linear_kl: {student_hidden_TD.shape[0]} student rows and {teacher_hidden_TE.shape[0]} teacher rows; "
            "want one row per token on both sides")
    total, kl_T, _, _ = _op(
        student_hidden_TD, student_head_VD, teacher_hidden_TE.detach(), teacher_head_VE.detach(),
        row_weights("linear_kl", weight, student_hidden_TD), mode, beta, temperature, V,
        check_softcap("linear_kl", student_softcap), check_softcap("linear_kl", teacher_softcap), workspace_mb,
        *needs_gradients(student_hidden_TD, student_head_VD, frozen_student_head))
    return LinearKL(total, kl_T)
