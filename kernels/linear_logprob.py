"""Log-probabilities of chosen tokens straight from hidden states: the [T, V] logits exist one chunk at a time.

    logits[t]  = softcap(hidden[t] @ head.T)
    logp[t, k] = logits[t, target[t, k]] / temperature - lse[t]
    lse[t]     = logsumexp(logits[t] / temperature)
    entropy[t] = lse[t] - sum_v softmax(logits[t] / temperature)[v] logits[t, v] / temperature

A target < 0 is ignored: its logp is exactly 0, with zero gradient. A row whose targets are all < 0 is ignored whole:
lse and entropy are 0 too. FLOPs: one head GEMM forward; the backward recomputes each chunk, four in all (three when
the head is frozen); none saves logits.

Shapes: T tokens, K candidates, D hidden, V vocabulary, C rows of a chunk.
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
    project,
    wide,
    workspace_buffers,
)
from ._logprob_rows import logprob_rows, logprob_rows_backward
from ._triton import require

MAX_CANDIDATES = 64  # the kernel compares all pairs of a row's candidates in registers


class LogProb(NamedTuple):
    logp: Tensor  # [T] or [T, K], like target
    lse: Tensor  # [T]
    entropy: Tensor | None  # [T] if asked for


def linear_logprob_ref(hidden_TD: Tensor, head_VD: Tensor, target: Tensor, *, temperature: float = 1.0,
                       vocab_size: int | None = None, softcap: float | None = None) -> LogProb:
    """The definition, with the whole [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    dtype = wide(hidden_TD.dtype)
    logits_TV = hidden_TD.to(dtype) @ head_VD[:vocab_size].to(dtype).t()
    x_TV = (softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV) / temperature
    target_TK = (target[:, None] if target.ndim == 1 else target).long()
    ignored_T = (target_TK < 0).all(1)
    logp_TV = x_TV.log_softmax(-1)
    logp_TK = torch.where(target_TK < 0, 0.0, logp_TV.gather(1, target_TK.clamp(min=0)))
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    return LogProb(logp_TK.reshape(target.shape), torch.where(ignored_T, 0.0, x_TV.logsumexp(1)),
                   torch.where(ignored_T, 0.0, entropy_T))


@torch.library.custom_op("reflux::linear_logprob", mutates_args=())
def _op(hidden_TD: Tensor, head_VD: Tensor, target_TK: Tensor, temperature: float, entropy: bool, vocab_size: int,
        softcap: float, workspace_mb: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [T, K], lse [T], entropy [T] or empty, and for the backward: row max [T], log of the shifted sum [T]."""
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    head_VD = head_VD[:vocab_size]
    logp_TK = hidden_TD.new_empty(target_TK.shape, dtype=dtype)
    top_T, log_s_T, entropy_T = (hidden_TD.new_empty(n, dtype=dtype) for n in (T, T, T if entropy else 0))
    for c in chunks(hidden_TD, vocab_size, workspace_buffers(hidden_TD, 1, 3), workspace_mb):
        logits_CV = project(hidden_TD[c], head_VD, softcap)
        logp_TK[c], top_T[c], log_s_T[c], entropy_C = logprob_rows(logits_CV, target_TK[c], 1 / temperature, entropy)
        if entropy:
            entropy_T[c] = entropy_C
    return logp_TK, top_T + log_s_T, entropy_T, top_T, log_s_T


@torch.library.custom_op("reflux::linear_logprob_backward", mutates_args=())
def _op_backward(g_logp_TK: Tensor, g_lse_T: Tensor, g_entropy_T: Tensor, hidden_TD: Tensor, head_VD: Tensor,
                 target_TK: Tensor, top_T: Tensor, log_s_T: Tensor, entropy_T: Tensor, temperature: float,
                 vocab_size: int, softcap: float, workspace_mb: float, need_dhidden: bool, need_dhead: bool,
                 ) -> tuple[Tensor, Tensor]:
    dhidden_TD, dhead_VD = gradient_buffers(hidden_TD, head_VD, need_dhidden, need_dhead)
    head = head_VD[:vocab_size]
    for c in chunks(hidden_TD, vocab_size, workspace_buffers(hidden_TD, 2, 4), workspace_mb):
        logits_CV = project(hidden_TD[c], head, softcap)
        saved = top_T[c], log_s_T[c], entropy_T[c]
        grads = g_logp_TK[c], g_lse_T[c], g_entropy_T[c]
        dlogits_CV = logprob_rows_backward(logits_CV, target_TK[c], saved, grads, 1 / temperature, softcap, logits_CV)
        dhidden_CD = backproject(dlogits_CV, hidden_TD[c], head, need_dhidden,
                                 dhead_VD[:vocab_size] if need_dhead else None)
        if need_dhidden:
            dhidden_TD[c] = dhidden_CD
    return dhidden_TD, dhead_VD.to(head_VD.dtype)


def _fake(hidden_TD, head_VD, target_TK, temperature, entropy, vocab_size, softcap, workspace_mb):
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    rows = [hidden_TD.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T)]
    return hidden_TD.new_empty(target_TK.shape, dtype=dtype), *rows


def _fake_backward(g_logp_TK, g_lse_T, g_entropy_T, hidden_TD, head_VD, target_TK, top_T, log_s_T, entropy_T,
                   temperature, vocab_size, softcap, workspace_mb, need_dhidden, need_dhead):
    return (hidden_TD.new_empty(hidden_TD.shape if need_dhidden else (0,)),
            head_VD.new_empty(head_VD.shape if need_dhead else (0,)))


def _save(ctx, inputs, output):
    hidden_TD, head_VD, target_TK, temperature, _, *rest = inputs
    _, _, entropy_T, top_T, log_s_T = output
    ctx.save_for_backward(hidden_TD, head_VD, target_TK, top_T, log_s_T, entropy_T)
    ctx.mark_non_differentiable(top_T, log_s_T)
    ctx.options = temperature, *rest


def _grad(ctx, g_logp_TK, g_lse_T, g_entropy_T, _top_T, _log_s_T):
    need_dhidden, need_dhead = ctx.needs_input_grad[:2]
    grads = (g.contiguous() for g in (g_logp_TK, g_lse_T, g_entropy_T))
    dhidden_TD, dhead_VD = _op_backward(*grads, *ctx.saved_tensors, *ctx.options, need_dhidden, need_dhead)
    return dhidden_TD if need_dhidden else None, dhead_VD if need_dhead else None, *[None] * 6


_op.register_fake(_fake)
_op_backward.register_fake(_fake_backward)
_op.register_autograd(_grad, setup_context=_save)


def linear_logprob(hidden_TD: Tensor, head_VD: Tensor, target: Tensor, *, temperature: float = 1.0,
                   entropy: bool = False, frozen_head: bool = False, vocab_size: int | None = None,
                   softcap: float | None = None, workspace_mb: float = 1200) -> LogProb:
    """(logp [T] or [T, K], lse [T], entropy [T] or None), fp32 (fp64 for fp64), in nats.

    hidden [T, D] and head [V, D] share a floating dtype; target is int [T], or [T, K] with K <= 64 candidates per row.
    All outputs are differentiable in hidden and head; dhead accumulates in fp32 and is not made if frozen_head.
    vocab_size < V leaves the padded rows of the head out. workspace_mb (MiB) bounds the logits alive at once.
    ValueError on shapes, dtypes, or an option that has no meaning.
    """
    V = check_linear("linear_logprob", hidden_TD, head_VD, vocab_size, temperature)
    require(target.ndim in (1, 2) and target.shape[0] == hidden_TD.shape[0] and not target.is_floating_point(),
            f"linear_logprob: target is {target.dtype} {list(target.shape)} for {hidden_TD.shape[0]} rows; "
            "want integers [T] or [T, K]")
    target_TK = (target[:, None] if target.ndim == 1 else target).long().contiguous()
    require(1 <= target_TK.shape[1] <= MAX_CANDIDATES,
            f"linear_logprob: {target_TK.shape[1]} candidates a row; want 1 to {MAX_CANDIDATES}. Split them over calls")
    logp_TK, lse_T, entropy_T, _, _ = _op(
        hidden_TD, head_VD.detach() if frozen_head else head_VD, target_TK, temperature, entropy, V,
        check_softcap("linear_logprob", softcap), workspace_mb)
    return LogProb(logp_TK.reshape(target.shape), lse_T, entropy_T if entropy else None)
