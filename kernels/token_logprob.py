"""Log-probabilities of chosen tokens from rows of logits, with no [T, V] softmax in memory.

    logp[t, k] = logits[t, target[t, k]] / temperature - lse[t]
    lse[t]     = logsumexp(logits[t] / temperature)
    entropy[t] = lse[t] - sum_v softmax(logits[t] / temperature)[v] logits[t, v] / temperature

A target < 0 or >= V is padding: its logp is exactly 0, with zero gradient. A row of nothing but
padding is ignored whole: lse and entropy are 0 too, and its logits are not read. A logit of -inf is
a banned token: probability 0, gradient 0; as a target its logp is -inf and it gets no gradient.
Traffic: the forward reads T*V logits, the backward reads them again and writes T*V gradients.

Shapes: T tokens, V vocabulary, K candidates.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ._chunks import WORKSPACE_MB, Rows, check_rows, check_temperature, chunks, wide
from ._logprob_rows import (
    LogProb,
    check_target,
    local_target,
    logprob_gradient_,
    logprob_rows,
    upstream,
)
from ._loss import refuse_second_derivative
from ._parallel import VocabShard, common_width, local_width, slice_of
from ._triton import check_plain, runs_triton


def token_logprob_ref(logits_TV: Tensor, target: Tensor, *, temperature: float = 1.0) -> LogProb:
    """The definition. fp32 arithmetic, or fp64 when given fp64."""
    x_TV = logits_TV.to(wide(logits_TV.dtype)) / temperature
    target_TK = (target[:, None] if target.ndim == 1 else target).long()
    padding_TK = (target_TK < 0) | (target_TK >= x_TV.shape[1])
    logp_TV, ignored_T = x_TV.log_softmax(-1), padding_TK.all(1)
    logp_TK = logp_TV.gather(1, target_TK.masked_fill(padding_TK, 0))
    logp_TK = torch.where(logp_TK == -torch.inf, logp_TK.detach(), logp_TK)
    banned_TV = logp_TV == -torch.inf
    entropy_T = (
        -(logp_TV.exp() * logp_TV.masked_fill(banned_TV, 0.0)).masked_fill(banned_TV, 0.0).sum(1)
    )
    return LogProb(
        torch.where(padding_TK, 0.0, logp_TK).reshape(target.shape),
        torch.where(ignored_T, 0.0, x_TV.logsumexp(1)),
        torch.where(ignored_T, 0.0, entropy_T),
    )


def _row_blocks(logits_TV: Tensor, width: int) -> Iterable[Rows]:
    """A kernel takes all rows at once; PyTorch makes copies of its input, so it takes chunks."""
    return [slice(None)] if runs_triton(logits_TV) else chunks(logits_TV, width, 3, WORKSPACE_MB)


@torch.library.custom_op("reflux::token_logprob", mutates_args=())
def _op(
    logits_TV: Tensor,
    target_TK: Tensor,
    temperature: float,
    entropy: bool,
    vocab_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [T, K], lse [T], entropy [T] or empty; row max [T] and log of the shifted sum [T]."""
    out = _fake(logits_TV, target_TK, temperature, entropy, vocab_size, group)
    for c in _row_blocks(logits_TV, common_width(vocab_size, group)):
        part = logprob_rows(logits_TV[c], target_TK[c], 1 / temperature, entropy, group)
        for whole_T, part_C in zip(out, part, strict=True):
            whole_T[c] = part_C
    return out


@torch.library.custom_op("reflux::token_logprob_backward", mutates_args=())
def _op_backward(
    g_logp_TK: Tensor,
    g_all_T: Tensor,
    g_entropy_T: Tensor,
    logits_TV: Tensor,
    target_TK: Tensor,
    top_T: Tensor,
    log_s_T: Tensor,
    entropy_T: Tensor,
    temperature: float,
) -> Tensor:
    dlogits_TV = logits_TV.new_empty(logits_TV.shape)
    for c in _row_blocks(logits_TV, max(1, logits_TV.shape[1])):
        logprob_gradient_(
            logits_TV[c],
            target_TK[c],
            (top_T[c], log_s_T[c], entropy_T[c]),
            (g_logp_TK[c], g_all_T[c], g_entropy_T[c]),
            1 / temperature,
            0.0,
            dlogits_TV[c],
        )
    return dlogits_TV


def _fake(logits_TV, target_TK, temperature, entropy, vocab_size, group):
    T, dtype = logits_TV.shape[0], wide(logits_TV.dtype)
    rows = [logits_TV.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T)]
    return logits_TV.new_empty(target_TK.shape, dtype=dtype), *rows


def _fake_backward(
    g_logp_TK, g_all_T, g_entropy_T, logits_TV, target_TK, top_T, log_s_T, entropy_T, temperature
):
    return logits_TV.new_empty(logits_TV.shape)


def _save(ctx, inputs, output):
    logits_TV, target_TK, ctx.temperature, *_ = inputs
    logp_TK, _, entropy_T, top_T, log_s_T = output
    ctx.save_for_backward(logits_TV, target_TK, logp_TK, top_T, log_s_T, entropy_T)
    ctx.mark_non_differentiable(top_T, log_s_T)


def _grad(ctx, g_logp_TK, g_lse_T, g_entropy_T, _top_T, _log_s_T):
    logits_TV, target_TK, logp_TK, *saved = ctx.saved_tensors
    grads = upstream(target_TK, logp_TK, g_logp_TK, g_lse_T)
    dlogits_TV = _op_backward(
        *grads, g_entropy_T.contiguous(), logits_TV, target_TK, *saved, ctx.temperature
    )
    return *refuse_second_derivative([dlogits_TV], [logits_TV]), *[None] * 5


_op.register_fake(_fake)
_op_backward.register_fake(_fake_backward)
_op.register_autograd(_grad, setup_context=_save)


def token_logprob(
    logits_TV: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    rows: Tensor | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
) -> LogProb:
    """(logp [T] or [T, K], lse [T], entropy [T] or None), fp32 (fp64 for fp64), in nats.

    All are differentiable in logits. logits [T, V] of any floating dtype, dense along V, any stride
    along T; target int [T], or [T, K] with candidates that may repeat. rows: distinct row numbers
    int64 [M]; the others are ignored. vocab_size < V leaves padded columns out, with gradient 0.
    With shard, logits are this rank's columns [T, V_local], targets stay ids of the whole
    vocabulary and vocab_size is its size. ValueError on shapes, strides, temperature <= 0.
    """
    op = "token_logprob"
    check_plain(op, logits_TV)
    if not (
        logits_TV.ndim == 2
        and logits_TV.is_floating_point()
        and target.shape[:1] == logits_TV.shape[:1]
    ):
        raise ValueError(
            f"{op}: logits is {logits_TV.dtype} {list(logits_TV.shape)} and target "
            f"{list(target.shape)}; want [T, V], floating, and [T] or [T, K]. Flatten batch and "
            "time first: logits.flatten(0, -2)"
        )
    if not (logits_TV.stride(-1) == 1 or logits_TV.shape[1] <= 1):
        raise ValueError(
            f"{op}: the vocabulary axis must be dense, got strides {logits_TV.stride()}. Try "
            ".contiguous()"
        )
    check_temperature(op, temperature)
    if not (shard is None or vocab_size is not None):
        raise ValueError(f"{op}: a shard without vocab_size; want the size of the whole vocabulary")
    V, (group, start) = vocab_size or logits_TV.shape[1], slice_of(shard)
    if not (shard is not None or 0 < V <= logits_TV.shape[1]):
        raise ValueError(
            f"{op}: vocab_size is {V} and logits have {logits_TV.shape[1]} columns; want 1 <= "
            "vocab_size <= columns"
        )
    width = local_width(logits_TV.shape[1], V, start)
    target_TK = local_target(
        check_target(op, target, logits_TV.shape[0], V),
        start,
        width,
        check_rows(op, rows, logits_TV),
    )
    if width < logits_TV.shape[1]:
        logits_TV = logits_TV[:, :width]
    logp_TK, lse_T, entropy_T, _, _ = _op(logits_TV, target_TK, temperature, entropy, V, group)
    return LogProb(logp_TK.reshape(target.shape), lse_T, entropy_T if entropy else None)
