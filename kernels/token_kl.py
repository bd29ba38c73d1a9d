"""Divergence of a student from a teacher, both given as logits.

    p = softmax(student logits / temperature),  q = softmax(teacher logits / temperature)
    kl[t] = D(p[t], q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in _divergence.py)
    total = sum_t weight[t] kl[t]

Gradients are made in the forward, where both rows are at hand, and the backward scales them. A logit of -inf is a
banned token: banned on both sides it changes nothing; banned by the student alone forward KL is inf. A row whose kl is
inf or NaN keeps that value in kl and contributes a zero gradient.
Traffic with gradient: 2 reads of both logits (3 for jsd and skew) and one write of the student's.

Shapes: T tokens, V vocabulary.
"""
import torch
from torch import Tensor

from ._chunks import wide
from ._divergence import check_mode, divergence_ref
from ._kl_rows import kl_rows
from ._triton import require
from .linear_kl import LinearKL, row_weights, weighted_total


def token_kl_ref(student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, mode: str = "forward", beta: float = 0.5,
                 temperature: float = 1.0, weight: Tensor | None = None) -> LinearKL:
    """The definition. fp32 arithmetic, or fp64 when given fp64."""
    logp_TV, logq_TV = ((x.to(wide(x.dtype)) / temperature).log_softmax(-1)
                        for x in (student_logits_TV, teacher_logits_TV.detach()))
    kl_T = divergence_ref(logp_TV, logq_TV, mode, beta)
    return LinearKL(weighted_total(kl_T, torch.ones_like(kl_T) if weight is None else weight.to(kl_T.dtype)),
                    kl_T.detach())


@torch.library.custom_op("reflux::token_kl", mutates_args=())
def _op(student_logits_TV: Tensor, teacher_logits_TV: Tensor, weight_T: Tensor, mode: str, beta: float,
        temperature: float, need_dlogits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """total [], kl [T], and the gradient of total in the student's logits (empty where not needed)."""
    dz_TV = student_logits_TV.new_empty(student_logits_TV.shape if need_dlogits else (0,))
    kl_T = kl_rows(student_logits_TV, teacher_logits_TV, weight_T, (1 / temperature, 1 / temperature), mode, beta, 0.0,
                   dz_TV if need_dlogits else None)
    return weighted_total(kl_T, weight_T), kl_T, dz_TV


def _fake(student_logits_TV, teacher_logits_TV, weight_T, mode, beta, temperature, need_dlogits):
    T, dtype = student_logits_TV.shape[0], wide(student_logits_TV.dtype)
    return (student_logits_TV.new_empty((), dtype=dtype), student_logits_TV.new_empty(T, dtype=dtype),
            student_logits_TV.new_empty(student_logits_TV.shape if need_dlogits else (0,)))


def _save(ctx, inputs, output):
    _, kl_T, dz_TV = output
    ctx.save_for_backward(dz_TV)
    ctx.mark_non_differentiable(kl_T, dz_TV)
    ctx.set_materialize_grads(False)
    ctx.needed = inputs[-1]


def _grad(ctx, g_total, *_):
    (dz_TV,) = ctx.saved_tensors
    return dz_TV * g_total if ctx.needed and g_total is not None else None, *[None] * 6


_op.register_fake(_fake)
_op.register_autograd(_grad, setup_context=_save)


def token_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, mode: str = "forward", beta: float = 0.5,
             temperature: float = 1.0, weight: Tensor | None = None) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. total is differentiable in the student's logits only.

    logits [T, V] on both sides, dense along V, any floating dtypes. beta: jsd and skew only, 0 < beta < 1. weight [T]:
    constant, None for ones. ValueError on shapes, strides, or an option that has no meaning.
    """
    check_mode("token_kl", mode, beta)
    require(student_logits_TV.ndim == 2 and student_logits_TV.shape == teacher_logits_TV.shape,
            f"token_kl: student logits are {list(student_logits_TV.shape)} and teacher logits "
            f"{list(teacher_logits_TV.shape)}; want [T, V] twice. Flatten first: logits.flatten(0, -2)")
    require(all(x.stride(-1) == 1 or x.shape[1] == 1 for x in (student_logits_TV, teacher_logits_TV)),
            "token_kl: the vocabulary axis of both logits must be dense. Try .contiguous()")
    require(temperature > 0, f"token_kl: temperature is {temperature}; want > 0. 0 means greedy: take the argmax")
    need_dlogits = torch.is_grad_enabled() and student_logits_TV.requires_grad
    total, kl_T, _ = _op(student_logits_TV, teacher_logits_TV.detach(), row_weights("token_kl", weight, student_logits_TV),
                         mode, beta, temperature, need_dlogits)
    return LinearKL(total, kl_T)
