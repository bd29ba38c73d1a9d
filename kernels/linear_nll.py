"""Weighted negative log-likelihood of chosen tokens from hidden states, gradients in 3 head GEMMs.

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
    WORKSPACE_MB,
    Rows,
    check_rows,
    check_temperature,
    chunks,
    gradient_block,
    padded,
    wide,
    workspace_buffers,
)
from ._head import Head, HeadGradients, checked_head, fake_gradients
from ._logprob_rows import check_target, local_target, logprob_gradient_, logprob_rows, upstream
from ._loss import save_gradients, scale_gradients, unit_of, without_ignored
from ._parallel import VocabShard, common_width, local_width, slice_of
from .linear_logprob import GRADIENT_BUFFERS, linear_logprob_ref


class LinearNLL(NamedTuple):
    total: Tensor  # [], differentiable
    logp: Tensor  # [T] or [T, K], like target; detached


def linear_nll_ref(
    hidden_TD: Tensor, head_VD: Tensor, target: Tensor, *, weight: Tensor | None = None, **options
) -> LinearNLL:
    """The definition, with the options of linear_logprob_ref. fp32 arithmetic, or fp64 for fp64."""
    logp = linear_logprob_ref(hidden_TD, head_VD, target, **options).logp
    weight = torch.ones_like(logp) if weight is None else weight.to(logp.dtype)
    return LinearNLL(_total(logp, weight), logp.detach())


def _total(logp: Tensor, weight: Tensor) -> Tensor:
    weight = weight[:, None] if weight.ndim < logp.ndim else weight
    return -torch.where(weight != 0, weight * logp, 0.0).sum()


@torch.library.custom_op("reflux::linear_nll", mutates_args=())
def _op(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    target_TK: Tensor,
    rows_M: Tensor | None,
    weight_TK: Tensor,
    temperature: float,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], logp [T, K], gradients of total in hidden, head and bias or empty."""
    x_TD, V = hidden_TD, local_width(len(head_VD), vocab_size, vocab_start)
    head = Head(x_TD, head_VD, bias_V, logit_scale, softcap).cut(V)
    grads = HeadGradients.zeros(x_TD, head_VD, (need_dhidden, need_dhead, need_dbias))
    scale, d_scale = head.scales(temperature)
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    logp_TK = torch.zeros_like(weight_TK)

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        logits_CV = head.logits(c)
        logp_CK, _, empty, *saved = logprob_rows(
            padded(logits_CV), target_TK[c], scale, False, group
        )
        logp_TK[c] = logp_CK
        if any(grads.need):
            g_C = *upstream(target_TK[c], logp_CK, weight_TK[c] * -d_scale), empty
            d_CV = gradient_block(logits_CV, x_TD)
            rows = padded(logits_CV), target_TK[c], (*saved, empty), g_C, scale, softcap
            logprob_gradient_(*rows, padded(d_CV))
            grads.add(c, d_CV, head)

    buffers = workspace_buffers(x_TD, GRADIENT_BUFFERS, 4)
    for c in chunks(x_TD, common_width(vocab_size, group), buffers, workspace_mb, rows_M):
        step(c)
    return _total(logp_TK, weight_TK), logp_TK, *grads.finish(head_VD, bias_V, group)


def _fake(hidden_TD, head_VD, bias_V, logit_scale, softcap, target_TK, rows_M, weight_TK, *rest):
    gradients = fake_gradients(hidden_TD, head_VD, bias_V, rest[-3:])
    return weight_TK.new_empty(()), torch.empty_like(weight_TK), *gradients


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def _weights(weight: Tensor | None, target_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, K], constant, in the dtype of the losses."""
    if not (weight is None or weight.shape in (target_TK.shape[:1], target_TK.shape)):
        raise ValueError(
            f"linear_nll: weight is {list(getattr(weight, 'shape', []))} for targets "
            f"{list(target_TK.shape)}; want [T], or [T, K] like target, 0 for what is to be left "
            "out"
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
    workspace_mb: float = WORKSPACE_MB,
) -> LinearNLL:
    """(total [], logp [T] or [T, K]), fp32 (fp64 for fp64), in nats.

    total is differentiable in hidden, head and bias; logp is detached. weight: constant, [T] or
    like target, of any sign; ones if None. total is a sum: divide by your own number of tokens, or
    let weight hold 1 / number. All other arguments are those of linear_logprob.
    """
    op, tensors = "linear_nll", (hidden_TD, head_VD, bias, logit_scale, softcap)
    check_temperature(op, temperature)
    head, V = checked_head(op, *tensors, vocab_size, shard)
    x_TD = head.hidden_TD
    target_TK = check_target(op, target, x_TD.shape[0], V)
    weight_TK = _weights(weight, target_TK, wide(x_TD.dtype))
    used_T = ((weight_TK != 0) & (target_TK >= 0)).any(1)
    head = head._replace(hidden_TD=without_ignored(x_TD, used_T))
    unit = unit_of(weight, x_TD.dtype)
    total, logp_TK, *_ = _op(
        *head,
        target_TK,
        check_rows(op, rows, x_TD),
        weight_TK if unit is None else weight_TK / unit,
        temperature,
        V,
        *slice_of(shard),
        workspace_mb,
        *head.needs(frozen_head),
    )
    return LinearNLL(total if unit is None else total * unit, logp_TK.reshape(target.shape))
