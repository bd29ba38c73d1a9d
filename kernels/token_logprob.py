"""Log-probability of one chosen token per row of logits, with no [T, V] softmax in memory.

    logp[t]    = logits[t, target[t]] / temperature - logsumexp(logits[t] / temperature)
    entropy[t] = entropy of softmax(logits[t] / temperature)

Rows with target < 0 are ignored: logp and entropy are exactly 0 and so is their gradient. A logit of -inf is a banned
token: probability 0, gradient 0. Traffic: the forward reads T*V logits, the backward reads them again and writes T*V
gradients.

Shapes: T tokens, V vocabulary.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import wide
from ._logprob_rows import logprob_rows, logprob_rows_backward
from ._triton import require


class TokenLogProb(NamedTuple):
    logp: Tensor  # [T]
    entropy: Tensor | None  # [T] if asked for


def token_logprob_ref(logits_TV: Tensor, target_T: Tensor, *, temperature: float = 1.0) -> TokenLogProb:
    """The definition. fp32 arithmetic, or fp64 when given fp64."""
    logp_TV = (logits_TV.to(wide(logits_TV.dtype)) / temperature).log_softmax(-1)
    logp_T = logp_TV.gather(-1, target_T.long().clamp(min=0)[:, None])[:, 0]
    entropy_T = -torch.where(logp_TV > -torch.inf, logp_TV.exp() * logp_TV, 0.0).sum(-1)
    return TokenLogProb(torch.where(target_T >= 0, logp_T, 0.0), torch.where(target_T >= 0, entropy_T, 0.0))


@torch.library.custom_op("reflux::token_logprob", mutates_args=())
def _op(logits_TV: Tensor, target_T: Tensor, temperature: float, entropy: bool,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp [T], entropy [T] or empty, and what the backward needs: row max [T], log of the shifted sum [T]."""
    logp_T1, top_T, log_s_T, entropy_T = logprob_rows(logits_TV, target_T[:, None], 1 / temperature, entropy)
    return logp_T1[:, 0].clone(), entropy_T, top_T, log_s_T


@torch.library.custom_op("reflux::token_logprob_backward", mutates_args=())
def _op_backward(g_logp_T: Tensor, g_entropy_T: Tensor, logits_TV: Tensor, target_T: Tensor, top_T: Tensor,
                 log_s_T: Tensor, entropy_T: Tensor, temperature: float) -> Tensor:
    grads = g_logp_T[:, None], torch.zeros_like(g_logp_T), g_entropy_T
    return logprob_rows_backward(logits_TV, target_T[:, None], (top_T, log_s_T, entropy_T), grads, 1 / temperature, 0.0,
                                 logits_TV.new_empty(logits_TV.shape)).to(logits_TV.dtype)


def _fake(logits_TV, target_T, temperature, entropy):
    T = logits_TV.shape[0]
    return tuple(logits_TV.new_empty(n, dtype=wide(logits_TV.dtype)) for n in (T, T if entropy else 0, T, T))


def _fake_backward(g_logp_T, g_entropy_T, logits_TV, target_T, top_T, log_s_T, entropy_T, temperature):
    return logits_TV.new_empty(logits_TV.shape)


def _save(ctx, inputs, output):
    logits_TV, target_T, ctx.temperature, _ = inputs
    _, entropy_T, top_T, log_s_T = output
    ctx.save_for_backward(logits_TV, target_T, top_T, log_s_T, entropy_T)
    ctx.mark_non_differentiable(top_T, log_s_T)


def _grad(ctx, g_logp_T, g_entropy_T, _top_T, _log_s_T):
    grads = g_logp_T.contiguous(), g_entropy_T.contiguous()
    return _op_backward(*grads, *ctx.saved_tensors, ctx.temperature), None, None, None


_op.register_fake(_fake)
_op_backward.register_fake(_fake_backward)
_op.register_autograd(_grad, setup_context=_save)


def token_logprob(logits_TV: Tensor, target_T: Tensor, *, temperature: float = 1.0,
                  entropy: bool = False) -> TokenLogProb:
    """(logp [T], entropy [T] or None), fp32 (fp64 for fp64), in nats; differentiable in logits.

    logits [T, V] of any floating dtype, dense along V; target int [T]. ValueError on shapes, strides, temperature <= 0.
    """
    require(logits_TV.ndim == 2 and target_T.shape == logits_TV.shape[:1],
            f"token_logprob: logits is {list(logits_TV.shape)} and target {list(target_T.shape)}; "
            "want [T, V] and [T]. Flatten batch and time first: logits.flatten(0, -2)")
    require(logits_TV.stride(-1) == 1 or logits_TV.shape[1] == 1,
            f"token_logprob: the vocabulary axis must be dense, got strides {logits_TV.stride()}. Try .contiguous()")
    require(temperature > 0, f"token_logprob: temperature is {temperature}; want > 0. 0 means greedy: take the argmax")
    logp_T, entropy_T, _, _ = _op(logits_TV, target_T.long().contiguous(), temperature, entropy)
    return TokenLogProb(logp_T, entropy_T if entropy else None)
