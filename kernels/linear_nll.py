"""Weighted negative log-likelihood of chosen tokens from hidden states, gradients in 3 head GEMMs.

    logp[t, k] as in linear_logprob
    total      = - sum_t sum_k weight[t, k] logp[t, k]

and with label_smoothing e and z_loss c, for one target a row, lse[t] = log sum_v e^a[t, v], a the
logits as the softmax sees them:

    total      = sum_t weight[t] ((1 - e) (-logp[t]) + e (lse[t] - mean_v a[t, v]) + c lse[t]^2)

that is e of the target spread evenly over the vocabulary (Szegedy et al., arXiv:1512.00567) and
PaLM's pull of the normaliser to 1 (arXiv:2204.02311). mean_v a is the hidden state times the mean
row of the head, so that neither costs a pass over the logits.

The weights are known in the forward (a loss mask, a reward, 1 / number of tokens), so gradients of
total are made there, chunk by chunk, and the backward only scales them; an op boundary at logp
costs 4 GEMMs. Supervised fine-tuning, sequence distillation, REINFORCE with fixed rewards.

A target < 0 or >= V is padding and a weight of 0 leaves its token out, whatever it is. A banned
target (a bias of -inf) makes total infinite, as its weight says, and gets no gradient.

Shapes: T tokens, K candidates, D hidden, V vocabulary, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Part,
    Rows,
    check_rows,
    check_temperature,
    logits_ref,
    padded,
    parts,
    wide,
)
from ._head import Head, HeadGradients, checked_head, fake_gradients
from ._logprob_rows import (
    PADDING,
    check_target,
    local_target,
    logprob_gradient_,
    upstream,
)
from ._logprob_tiles import chunk_statistics, statistics_plan
from ._loss import save_gradients, scale_gradients, unit_of, without_ignored
from ._parallel import VocabShard, all_sum, common_width, local_width, slice_of
from .linear_logprob import LOGIT_BLOCKS, linear_logprob_ref


class LinearNLL(NamedTuple):
    total: Tensor  # [], differentiable
    logp: Tensor  # [T] or [T, K], like target; detached


def linear_nll_ref(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    **options,
) -> LinearNLL:
    """The definition, with the options of linear_logprob_ref. fp32 arithmetic, or fp64 for fp64."""
    result = linear_logprob_ref(hidden_TD, head_VD, target, temperature=temperature, **options)
    logp = result.logp
    weight = torch.ones_like(logp) if weight is None else weight.to(logp.dtype)
    total = (1 - label_smoothing) * _total(logp, weight)
    if label_smoothing or z_loss:
        side = options.get("bias"), options.get("logit_scale", 1.0), options.get("softcap")
        cut = options.get("vocab_size")
        a_TV = logits_ref(hidden_TD, head_VD, *side, cut) / temperature
        lse_T = a_TV.logsumexp(-1)
        more_T = label_smoothing * (lse_T - a_TV.mean(-1)) + z_loss * lse_T.square()
        used_T = (target >= 0) & (target < a_TV.shape[1]) & (weight != 0)
        total = total + torch.where(used_T, weight * more_T, 0.0).sum()
    return LinearNLL(total, logp.detach())


def _total(logp: Tensor, weight: Tensor) -> Tensor:
    weight = weight[:, None] if weight.ndim < logp.ndim else weight
    return -torch.where(weight != 0, weight * logp, 0.0).sum()


class Even(NamedTuple):
    """What an evenly spread share of the target needs: mean_v a = scale (x . row + bias)."""

    head: Head
    weight_T: Tensor  # of the share, 0 where a row is not used
    scale: float
    row_D: Tensor  # sum of this slice's head rows / size of the whole vocabulary
    bias: Tensor  # [], likewise
    part: float  # 1 / size of the whole vocabulary
    group: str

    @classmethod
    def of(cls, head: Head, weight_T: Tensor, scale: float, V: int, group: str) -> "Even":
        dtype, none = weight_T.dtype, weight_T.new_zeros(())
        row_D = head.head_VD.sum(0, dtype=dtype) / V
        bias = none if head.bias_V is None else head.bias_V.sum(dtype=dtype) / V
        return cls(head, weight_T, scale, row_D, bias, 1 / V, group)

    def mean(self, c: Rows) -> Tensor:
        mean_C = self.head.hidden_TD[c].to(self.row_D.dtype) @ self.row_D + self.bias
        return all_sum(self.scale * mean_C, self.group)

    def add_gradients(self, c: Rows, grads: HeadGradients) -> None:
        if grads.need[0]:
            d_C1 = (self.weight_T[c] * -self.scale)[:, None]
            grads.dhidden_TD[c] += (d_C1 * self.row_D).to(grads.dhidden_TD.dtype)

    def add_head_gradient(self, grads: HeadGradients) -> None:
        """Every row of the head gets the same: one pass over its gradient."""
        V, d_T = len(self.head.head_VD), self.weight_T * (-self.scale * self.part)
        if grads.need[1]:
            grads.dhead_VD[:V] += d_T @ self.head.hidden_TD.to(d_T.dtype)
        if grads.need[2]:
            grads.dbias_V[:V] += d_T.sum()


def _of_normaliser(
    c: Rows, lse_C: Tensor, w_C: Tensor, z_loss: float, even: Even | None
) -> tuple[Tensor, Tensor]:
    """The terms that hold lse, weighted, and their derivative in it, both [C]."""
    more_C, g_C = w_C * z_loss * lse_C.square(), 2 * z_loss * w_C * lse_C
    if even is not None:
        more_C += even.weight_T[c] * (lse_C - even.mean(c))
        g_C += even.weight_T[c]
    return torch.where(w_C != 0, more_C, 0.0), g_C


def _largest(K: int, z_loss: float) -> float:
    """A bound of |dlogits| at weight 1: all candidates of a row may be one token, and its
    normaliser is rarely above 500.
    """
    return 2.0 * K + 1000 * z_loss


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
    label_smoothing: float,
    z_loss: float,
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
    need, width = (need_dhidden, need_dhead, need_dbias), common_width(vocab_size, group)
    scale, d_scale = head.scales(temperature)
    fused, plan = statistics_plan(x_TD, width, LOGIT_BLOCKS, need, workspace_mb, rows_M)
    largest = scale * d_scale * _largest(weight_TK.shape[1], z_loss)
    grads = HeadGradients.zeros(x_TD, head_VD, need, V, plan, largest)
    d_scale *= grads.lift
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    logp_TK = torch.zeros_like(weight_TK)
    used_TK = torch.where(target_TK == PADDING, 0.0, weight_TK)
    share_T = used_TK[:, 0] * label_smoothing
    even = Even.of(head, share_T, scale, vocab_size, group) if label_smoothing else None
    more_T = torch.zeros_like(weight_TK[:, 0])

    # a function, so that its blocks are free before the next chunk's are made
    def step(part: Part) -> None:
        c = part.rows
        of_chunk = target_TK[c], temperature, False, group
        logits_CV, logp_CK, lse_C, empty, *saved = chunk_statistics(fused, head, c, *of_chunk)
        logp_TK[c] = logp_CK
        more_T[c], g_lse_C = _of_normaliser(c, lse_C, used_TK[c, 0], z_loss, even)
        if any(need):
            g_CK = weight_TK[c] * (label_smoothing - 1) * d_scale
            grads_C = *upstream(target_TK[c], logp_CK, g_CK, g_lse_C * d_scale), empty
            d_CV = grads.block(part, logits_CV)
            rows = padded(logits_CV), target_TK[c], (*saved, empty), grads_C, scale, softcap
            logprob_gradient_(*rows, padded(d_CV))
            grads.add(part, d_CV, head)
            if even is not None and part.group is not None:
                even.add_gradients(part.group, grads)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    if even is not None:
        even.add_head_gradient(grads)
    total = (1 - label_smoothing) * _total(logp_TK, weight_TK) + more_T.sum()
    return total, logp_TK, *grads.finish(head_VD, bias_V, group)


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


def _check_regularisers(
    label_smoothing: float, z_loss: float, softcap: float | None, target: Tensor
) -> None:
    if not (0 <= label_smoothing < 1 and 0 <= z_loss < float("inf")):
        raise ValueError(
            f"linear_nll: label_smoothing {label_smoothing} and z_loss {z_loss}; want 0 <= "
            "label_smoothing < 1 and z_loss >= 0, 1e-4 as it were"
        )
    if label_smoothing and softcap is not None:
        raise ValueError(
            f"linear_nll: label_smoothing {label_smoothing} with softcap {softcap}; want one of "
            "them: the mean of capped logits is no product with the head's mean row"
        )
    if (label_smoothing or z_loss) and target.ndim != 1:
        raise ValueError(
            f"linear_nll: label_smoothing or z_loss for targets {list(target.shape)}; want one "
            "target a row, [T]"
        )


def linear_nll(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
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
    let weight hold 1 / number. label_smoothing (0 <= e < 1, without a soft cap) and z_loss (>= 0)
    want one target a row; logp stays the target's. A head or bias with a banned token (-inf) has
    no even share: total is inf. All other arguments are those of linear_logprob.
    """
    op, tensors = "linear_nll", (hidden_TD, head_VD, bias, logit_scale, softcap)
    check_temperature(op, temperature)
    head, V = checked_head(op, *tensors, vocab_size, shard)
    x_TD = head.hidden_TD
    target_TK = check_target(op, target, x_TD.shape[0], V)
    _check_regularisers(label_smoothing, z_loss, softcap, target)
    weight_TK = _weights(weight, target_TK, wide(x_TD.dtype))
    used_T = ((weight_TK != 0) & (target_TK >= 0)).any(1)
    head = head._replace(hidden_TD=without_ignored(x_TD, used_T))
    rows_M = check_rows(op, rows, x_TD)
    used_TK = None if weight is None else torch.where(target_TK >= 0, weight_TK, 0.0)
    unit = unit_of(used_TK, x_TD.dtype, rows_M)
    total, logp_TK, *_ = _op(
        *head,
        target_TK,
        rows_M,
        weight_TK if unit is None else weight_TK / unit,
        temperature,
        label_smoothing,
        z_loss,
        V,
        *slice_of(shard),
        workspace_mb,
        *head.needs(frozen_head),
    )
    return LinearNLL(total if unit is None else total * unit, logp_TK.reshape(target.shape))
