"""What every divergence op shares: its options, its total and the gradients made in its forward.

    total = sum_t weight[t] kl[t]

Shapes: T tokens, M chosen rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._chunks import check_rows, check_temperature, unit_above, wide
from ._divergence import check_divergence
from ._head import Head, fake_gradients
from ._measures import KLMeasures


class LinearKL(NamedTuple):
    total: Tensor  # [], differentiable
    kl: Tensor  # [T], detached
    measures: KLMeasures | None = None  # of `linear_kl`, if asked for


@dataclass(frozen=True)
class LossOptions:
    """The options that all divergence ops have in common, as the caller gave them."""

    divergence: str
    beta: float
    temperature: float
    weight: Tensor | None
    rows: Tensor | None
    scale_t2: bool

    def checked(
        self, op: str, x_TD: Tensor
    ) -> tuple[Tensor, Tensor | None, str, float, float, bool]:
        """(weight [T], rows [M], divergence, beta, temperature, scale_t2) as the ops take them."""
        check_divergence(op, self.divergence, self.beta)
        check_temperature(op, self.temperature)
        weight_T, rows_M = row_weights(op, self.weight, x_TD), check_rows(op, self.rows, x_TD)
        unit = unit_of(self.weight, x_TD.dtype, rows_M)
        weight_T = weight_T if unit is None else weight_T / unit
        return weight_T, rows_M, self.divergence, self.beta, self.temperature, self.scale_t2

    def read(self, op: str, side: Head) -> Head:
        """A side without the non-finite rows that weight 0 leaves out; see `without_ignored`."""
        if self.weight is None:
            return side
        weight_T = row_weights(op, self.weight, side.hidden_TD)
        return side._replace(hidden_TD=without_ignored(side.hidden_TD, weight_T != 0))

    def result(self, total: Tensor, kl_T: Tensor, x_TD: Tensor) -> LinearKL:
        """What the op returned for the weights of `checked`, for the caller's own weights."""
        unit = unit_of(self.weight, x_TD.dtype, self.rows)
        return LinearKL(total if unit is None else total * unit, kl_T)


def without_ignored(hidden_TD: Tensor, used_T: Tensor) -> Tensor:
    """hidden with zeros in the rows that are not used and not finite: their logits' gradient is 0,
    but 0 times NaN is NaN and would reach the gradient of the head.
    """
    bad_T = ~used_T & ~hidden_TD.detach().isfinite().all(-1)
    return hidden_TD.masked_fill(bad_T[:, None], 0.0)


def unit_of(
    weight: Tensor | None, dtype: torch.dtype, rows_M: Tensor | None = None
) -> Tensor | None:
    """A power of two [] that the weights are divided by in fp16, or None. rows: only theirs count.

    Gradients are made in the forward. For weights of 1 / number of tokens they would be too small
    for fp16; a loss scale comes only in the backward, as this factor does.
    """
    if weight is None or dtype != torch.float16:
        return None
    weight = weight.detach() if rows_M is None else weight.detach()[rows_M.long()]
    return unit_above(weight.float().abs()) if weight.numel() else None


def loss_factor(temperature: float, scale_t2: bool) -> float:
    """Temperature squared keeps gradients at one size (Hinton et al., arXiv:1503.02531)."""
    return temperature**2 if scale_t2 else 1.0


def loss_ref(
    kl_T: Tensor, weight: Tensor | None, rows: Tensor | None, factor: float = 1.0
) -> LinearKL:
    """The definition of total. kl [T] differentiable."""
    kl_T = kl_T * factor
    if rows is not None:
        kl_T = torch.zeros_like(kl_T).index_copy(0, rows.long(), kl_T[rows])
    weight_T = torch.ones_like(kl_T) if weight is None else weight.to(kl_T.dtype)
    return LinearKL(weighted_total(kl_T, weight_T), kl_T.detach())


def weighted_total(kl_T: Tensor, weight_T: Tensor) -> Tensor:
    """sum weight * kl, where a weight of 0 leaves its row out even if kl is not finite."""
    return torch.where(weight_T != 0, weight_T * kl_T, 0.0).sum()


def row_weights(op: str, weight: Tensor | None, hidden_TD: Tensor) -> Tensor:
    """weight [T] in the dtype of the losses, constant; ones if None."""
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    if not (weight is None or weight.shape == (T,)):
        raise ValueError(
            f"{op}: weight is {list(getattr(weight, 'shape', []))} for {T} rows; want [T], 0 for "
            "an ignored row"
        )
    if weight is None:
        return hidden_TD.new_ones(T, dtype=dtype)
    return weight.detach().to(dtype).contiguous()


def fake_loss(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes and dtypes of total [] and kl [T]."""
    dtype = wide(hidden_TD.dtype)
    return hidden_TD.new_empty((), dtype=dtype), hidden_TD.new_empty(
        hidden_TD.shape[0], dtype=dtype
    )


def fake_head_loss(hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple:
    """What an op of hidden states and a head returns, whose last arguments are the gradients that
    it makes.
    """
    return *fake_loss(hidden_TD), *fake_gradients(hidden_TD, head_VD, bias_V, rest[-3:])


def save_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    """For ops of (*tensors, ..., *flags) that return (total, kl, *gradients of these tensors)."""
    _, kl_T, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(kl_T, *gradients)
    # else autograd makes zero gradients for the saved [T, D] and [V, D] outputs
    ctx.set_materialize_grads(False)
    ctx.needed, ctx.num_inputs = inputs[-len(gradients) :], len(inputs)
    ctx.leaves = inputs[: len(gradients)]


def scale_gradients(ctx: Any, g_total: Tensor | None, *_: Tensor | None) -> tuple:
    """New tensors, so a retained graph can go backward again; the forward's workspace is free."""
    if g_total is None:
        return (None,) * ctx.num_inputs
    scaled = [d * g_total if needed else None for d, needed in zip(ctx.saved_tensors, ctx.needed)]
    none = [None] * (ctx.num_inputs - len(ctx.needed))
    return *refuse_second_derivative(scaled, ctx.leaves), *none


def refuse_second_derivative(
    gradients: list[Tensor | None], leaves: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """With create_graph, the gradients behind a node that raises when it is differentiated: they
    hold no graph, so that a penalty on them would count as constant. The node leads to the op's
    inputs, `leaves`: autograd walks only where it finds what it is asked for.
    """
    if not torch.is_grad_enabled():
        return gradients
    message = (
        b"the fused losses of reflux.kernels have no second derivative: their gradients are made "
        b"in kernels. Use the op's definition (<op>_ref) where a gradient penalty is needed"
    )
    made = [d.detach().requires_grad_() for d in gradients if d is not None]
    if not made:
        return gradients
    made += [x for x in leaves if x is not None and x.requires_grad]
    behind = torch._C._functions.DelayedError(message, len(made))(*made)
    rest = iter(behind if isinstance(behind, tuple) else (behind,))
    return [None if d is None else next(rest) for d in gradients]


class InPlaceLoss(torch.autograd.Function):
    """A loss whose gradient is written over its logits.

    Eager only: an op that overwrites its differentiable input has no autograd formula in
    torch.library.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, sweep: Callable[..., Tensor], weight_T: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        """sweep(logits, *args, dz_TV=logits) returns kl [T]."""
        dz_TV = logits_TV.detach()
        kl_T = sweep(dz_TV, *args, dz_TV=dz_TV)
        # whoever saved the logits now raises in its backward
        torch.autograd.graph.increment_version(logits_TV)
        ctx.save_for_backward(logits_TV)
        ctx.mark_non_differentiable(kl_T)
        ctx.num_args = len(args) + 2
        return weighted_total(kl_T, weight_T), kl_T

    @staticmethod
    def backward(ctx: Any, g_total: Tensor, _: Tensor | None) -> tuple:
        (dz_TV,) = ctx.saved_tensors  # raises in a second backward: the first has scaled it
        return dz_TV.detach().mul_(g_total), *[None] * ctx.num_args


def check_inplace(op: str, student_logits_TV: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: inplace=True under torch.compile; want eager. Leave it out: a compiled graph "
            "frees the logits by itself"
        )
    if student_logits_TV.is_leaf:
        raise ValueError(
            f"{op}: inplace=True would overwrite a leaf, a parameter as it were, with its "
            "gradient; want logits that a model computed"
        )
    T, V = student_logits_TV.shape
    if not (T <= 1 or student_logits_TV.stride(0) >= V):
        raise ValueError(
            f"{op}: inplace=True on rows that overlap in memory (expanded logits?); want one row "
            "per token"
        )
