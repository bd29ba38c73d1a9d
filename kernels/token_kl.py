"""Divergence of a student from a teacher, both given as logits.

    p = softmax(student logits / temperature),  q = softmax(teacher logits / temperature)
    kl[t] = D(p[t], q[t]), D one of forward, reverse, jsd, skew_forward, skew_reverse (formulas in
            _divergence.py)
    total = sum_t weight[t] kl[t]

Gradients are made in the forward, where both rows are at hand, and the backward scales them. A
logit of -inf is a banned token: banned on both sides it changes nothing; banned by the student
alone forward KL is inf, by the teacher alone reverse KL. A row whose kl is inf or NaN keeps that
value in kl and contributes a zero gradient. Traffic with gradient: 2 reads of both logits (3 for
jsd and skew) and one write of the student's.

Shapes: T tokens, M chosen rows, V vocabulary.
"""

import torch
from torch import Tensor

from ._chunks import WORKSPACE_MB, chunks, wide
from ._divergence import divergence_ref
from ._kl_rows import KLSpec, kl_rows
from ._loss import (
    InPlaceLoss,
    LinearKL,
    LossOptions,
    check_inplace,
    fake_loss,
    loss_factor,
    loss_ref,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from ._parallel import VocabShard, common_width, local_width, slice_of
from ._triton import check_plain, runs_triton


def token_kl_ref(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
) -> LinearKL:
    """The definition. fp32 arithmetic, or fp64 when given fp64."""
    logp_TV, logq_TV = (
        (x[:, :vocab_size].to(wide(x.dtype)) / temperature).log_softmax(-1)
        for x in (student_logits_TV, teacher_logits_TV.detach())
    )
    kl_T = divergence_ref(logp_TV, logq_TV, divergence, beta)
    return loss_ref(kl_T, weight, rows, temperature**2 if scale_t2 else 1.0)


def _sweep(
    z_TV: Tensor,
    u_TV: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    group: str,
    vocab_start: int,
    *,
    dz_TV: Tensor | None,
) -> Tensor:
    """kl [T]; writes the gradient of sum weight kl into dz, which may be z."""
    V, t2 = local_width(z_TV.shape[1], vocab_size, vocab_start), loss_factor(temperature, scale_t2)
    chosen_T = None
    if rows_M is not None:
        chosen_T = torch.zeros(z_TV.shape[0], dtype=torch.bool, device=z_TV.device)
        chosen_T.index_fill_(0, rows_M, True)
    if dz_TV is not None:
        dz_TV[:, V:] = 0
    z_TV, u_TV, d_TV = z_TV[:, :V], u_TV[:, :V], None if dz_TV is None else dz_TV[:, :V]
    spec = KLSpec(divergence, beta, (1 / temperature, 1 / temperature), 0.0, group)
    if runs_triton(z_TV):
        return kl_rows(z_TV, u_TV, weight_T * t2, spec, d_TV, chosen_T).mul_(t2)
    kl_T = weight_T.new_zeros(z_TV.shape[0])
    for c in chunks(z_TV, common_width(vocab_size, group), 8, WORKSPACE_MB, rows_M):
        z_CV = z_TV[c]  # a view, or a copy of the chosen rows, which then takes the gradient
        d_CV = None if d_TV is None else d_TV[c] if rows_M is None else z_CV
        kl_T[c] = kl_rows(z_CV, u_TV[c], weight_T[c] * t2, spec, d_CV)
        if d_TV is not None and d_CV is z_CV:
            d_TV[c] = d_CV
    if chosen_T is not None and d_TV is not None:
        d_TV.masked_fill_(~chosen_T[:, None], 0.0)
    return kl_T.mul_(t2)


@torch.library.custom_op("reflux::token_kl", mutates_args=())
def _op(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    group: str,
    vocab_start: int,
    need_dlogits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """total [], kl [T], gradient of total in the student's logits or empty."""
    dz_TV = student_logits_TV.new_empty(student_logits_TV.shape if need_dlogits else (0,))
    kl_T = _sweep(
        student_logits_TV,
        teacher_logits_TV,
        weight_T,
        rows_M,
        divergence,
        beta,
        temperature,
        scale_t2,
        vocab_size,
        group,
        vocab_start,
        dz_TV=dz_TV if need_dlogits else None,
    )
    return weighted_total(kl_T, weight_T), kl_T, dz_TV


def _fake(student_logits_TV, *rest):
    dz_TV = student_logits_TV.new_empty(student_logits_TV.shape if rest[-1] else (0,))
    return *fake_loss(student_logits_TV), dz_TV


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def _check_logits(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> int:
    """Returns the size of the whole vocabulary."""
    shapes = [list(x.shape) for x in (student_logits_TV, teacher_logits_TV)]
    if not (student_logits_TV.ndim == teacher_logits_TV.ndim == 2 and shapes[0][0] == shapes[1][0]):
        raise ValueError(
            f"token_kl: student logits are {shapes[0]} and teacher logits {shapes[1]}; want [T, V] "
            "twice. Flatten first: logits.flatten(0, -2)"
        )
    if any(hasattr(x, "full_tensor") for x in (student_logits_TV, teacher_logits_TV)):
        raise ValueError(
            "token_kl: the logits are DTensors; want plain ones. Sharded over the vocabulary: "
            "logits.to_local() on both sides and shard=VocabShard.of(head)"
        )
    if not (
        all(x.stride(-1) == 1 or x.shape[1] <= 1 for x in (student_logits_TV, teacher_logits_TV))
    ):
        raise ValueError(
            "token_kl: the vocabulary axis of both logits must be dense. Try .contiguous()"
        )
    if not (shard is None or (vocab_size is not None and vocab_size > 0)):
        raise ValueError("token_kl: shard needs vocab_size, the size of the whole vocabulary")
    start, V = shard.start if shard else 0, shapes[0][1] if vocab_size is None else vocab_size
    widths = [n if vocab_size is None else local_width(n, vocab_size, start) for _, n in shapes]
    if widths[0] != widths[1]:
        raise ValueError(
            f"token_kl: student logits are {shapes[0]} and teacher logits {shapes[1]}; want one "
            "vocabulary. If both pad it, pass vocab_size; else the tokenizers differ and no "
            "token-level KL exists"
        )
    if not (shard is not None or 0 < V <= shapes[0][1]):
        raise ValueError(
            f"token_kl: vocab_size is {V} for logits of {shapes[0]}; want 1 <= vocab_size <= "
            "columns"
        )
    return V


def token_kl(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    inplace: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. Differentiable in the student's logits.

    logits [T, V] on both sides, dense along V, any floating dtypes. vocab_size: columns beyond it
    are padding, and their number may differ. shard: both logits are this rank's slice of the
    vocabulary, vocab_size counts the whole. inplace: the gradient is written over the student's
    logits, half the memory. They hold no logits afterwards; if autograd still needs them elsewhere,
    it raises in the backward, as it does in a second backward. Not under torch.compile. Other
    options as in `linear_kl`. ValueError on shapes, strides, or an option that has no meaning.
    """
    op, z_TV = "token_kl", student_logits_TV
    check_plain(op, z_TV, teacher_logits_TV)
    V = _check_logits(z_TV, teacher_logits_TV, vocab_size, shard)
    options = LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    losses = options.checked(op, z_TV)
    args = teacher_logits_TV.detach(), *losses, V, *slice_of(shard)
    need_dlogits = torch.is_grad_enabled() and z_TV.requires_grad
    if inplace and need_dlogits:
        check_inplace(op, z_TV)
        total, kl_T = InPlaceLoss.apply(z_TV, _sweep, losses[0], *args)
        return options.result(total, kl_T, z_TV)
    total, kl_T, _ = _op(z_TV, *args, need_dlogits)
    return options.result(total, kl_T, z_TV)
