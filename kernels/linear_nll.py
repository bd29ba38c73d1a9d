"""Weighted negative log-likelihood of chosen tokens straight from hidden states, with its gradients
in 3 head GEMMs.

    logp[t, k] as in linear_logprob
    total      = - sum_t sum_k weight[t, k] logp[t, k]

The weights are known in the forward (a loss mask, a reward, 1 / number of tokens), so gradients of
total are made there, chunk by chunk, and the backward only scales them; an op boundary at logp
costs 4 GEMMs. Supervised fine-tuning, sequence distillation, REINFORCE with fixed rewards. There is
no further term in total: no z-loss, no smoothing.

A target < 0 or >= V is padding and a weight of 0 leaves its token out, whatever it is. A banned
target (a bias of -inf) makes total infinite, as its weight says, and gets no gradient.

Shapes: T tokens, K candidates, D hidden, V vocabulary, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import (
    Rows,
    backproject,
    chunks,
    fold_scale,
    gradient_block,
    gradient_buffers,
    needs_gradient,
    padded,
    project,
    wide,
    workspace_buffers,
)
from ._logprob_rows import local_target, logprob_gradient_, logprob_rows, upstream
from ._parallel import VocabShard, all_sum, common_width, local_width
from ._triton import require
from .linear_kl import fake_dbias, save_gradients, scale_gradients
from .linear_logprob import GRADIENT_BUFFERS, check_inputs, check_scales, linear_logprob_ref


class LinearNLL(NamedTuple):
    total: Tensor  # [], differentiable
    logp: Tensor  # [T] or [T, K], like target; detached


def linear_nll_ref(
    hidden_TD: Tensor, head_VD: Tensor, target: Tensor, *, weight: Tensor | None = None, **options
) -> LinearNLL:
    """The definition. Options are those of linear_logprob_ref. fp32 arithmetic, or fp64 when given
    fp64.
    """
    logp = linear_logprob_ref(hidden_TD, head_VD, target, **options).logp
    return LinearNLL(
        _total(logp, torch.ones_like(logp) if weight is None else weight.to(logp.dtype)),
        logp.detach(),
    )


def _total(logp: Tensor, weight: Tensor) -> Tensor:
    weight = weight[:, None] if weight.ndim < logp.ndim else weight
    return -torch.where(weight != 0, weight * logp, 0.0).sum()


@torch.library.custom_op("reflux::linear_nll", mutates_args=())
def _op(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_TK: Tensor,
    rows_M: Tensor | None,
    weight_TK: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    vocab_start: int,
    group: str,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], logp [T, K], and the gradients of total in hidden, head and bias (empty where not
    needed).
    """
    x_TD, V = hidden_TD, local_width(len(head_VD), vocab_size, vocab_start)
    head, bias = head_VD[:V], None if bias_V is None else bias_V[:V]
    scale, d_scale = fold_scale(temperature, logit_scale, softcap)
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    logp_TK = torch.zeros_like(weight_TK)
    dx_TD, dhead_VD = gradient_buffers(x_TD, head_VD, need_dhidden, need_dhead)
    dbias_V = weight_TK.new_zeros(len(head_VD) if need_dbias else 0)
    needed = need_dhidden or need_dhead or need_dbias

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        logits_CV = project(x_TD[c], head, softcap, bias, logit_scale)
        logp_CK, _, empty, *saved = logprob_rows(
            padded(logits_CV), target_TK[c], scale, False, group
        )
        logp_TK[c] = logp_CK
        if needed:
            grads = *upstream(target_TK[c], logp_CK, weight_TK[c] * -d_scale), empty
            d_CV = gradient_block(logits_CV, x_TD)
            logprob_gradient_(
                padded(logits_CV),
                target_TK[c],
                (*saved, empty),
                grads,
                scale,
                softcap,
                padded(d_CV),
            )
            dx_CD = backproject(
                d_CV,
                x_TD[c],
                head,
                need_dhidden,
                dhead_VD[:V] if need_dhead else None,
                dbias_V[:V] if need_dbias else None,
            )
            if need_dhidden:
                dx_TD[c] = dx_CD

    buffers = workspace_buffers(x_TD, GRADIENT_BUFFERS, 4)
    for c in chunks(x_TD, common_width(vocab_size, group), buffers, workspace_mb, rows_M):
        step(c)
    return (
        _total(logp_TK, weight_TK),
        logp_TK,
        all_sum(dx_TD, group if need_dhidden else ""),
        dhead_VD.to(head_VD.dtype),
        dbias_V if bias_V is None else dbias_V.to(bias_V.dtype),
    )


def _fake(hidden_TD, head_VD, bias_V, target_TK, rows_M, weight_TK, *options):
    *_, need_dhidden, need_dhead, need_dbias = options
    return (
        weight_TK.new_empty(()),
        torch.empty_like(weight_TK),
        hidden_TD.new_empty(hidden_TD.shape if need_dhidden else (0,)),
        head_VD.new_empty(head_VD.shape if need_dhead else (0,)),
        fake_dbias(hidden_TD, head_VD, bias_V, need_dbias),
    )


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def _weights(weight: Tensor | None, target_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, K], constant, in the dtype of the losses."""
    require(
        weight is None or weight.shape in (target_TK.shape[:1], target_TK.shape),
        f"linear_nll: weight is {list(getattr(weight, 'shape', []))} for targets "
        f"{list(target_TK.shape)}; "
        "want [T], or [T, K] like target, 0 for what is to be left out",
    )
    if weight is None:
        return torch.ones_like(target_TK, dtype=dtype)
    weight = weight.detach().to(dtype)
    return (weight[:, None] if weight.ndim == 1 else weight).expand(target_TK.shape).contiguous()


def linear_nll(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    frozen_head: bool = False,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_mb: float = 1200,
) -> LinearNLL:
    """(total [], logp [T] or [T, K]), fp32 (fp64 for fp64), in nats. total is differentiable in
    hidden, head and bias.

    weight: constant, [T] or like target, of any sign; ones if None. total is a sum: divide by your
    own number of tokens, or let weight hold 1 / number. logp is detached. All other arguments are
    those of linear_logprob.
    """
    scales = check_scales("linear_nll", temperature, logit_scale, softcap)
    tensors, V = check_inputs(
        "linear_nll", hidden_TD, head_VD, bias, target, rows, vocab_size, shard
    )
    weight_TK = _weights(weight, tensors[3], wide(tensors[0].dtype))
    needed = [
        needs_gradient(x, frozen)
        for x, frozen in zip(tensors[:3], (False, frozen_head, frozen_head))
    ]
    total, logp_TK, *_ = _op(
        *tensors,
        weight_TK,
        *scales,
        V,
        shard.start if shard else 0,
        shard.group if shard else "",
        workspace_mb,
        *needed,
    )
    return LinearNLL(total, logp_TK.reshape(target.shape))
