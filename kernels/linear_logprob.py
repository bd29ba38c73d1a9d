"""Log-probabilities of chosen tokens from hidden states: the [T, V] logits exist chunk by chunk.

    logits[t]  = softcap tanh(logit_scale (hidden[t] @ head.T + bias) / softcap), no tanh without a
                 softcap
    logp[t, k] = logits[t, target[t, k]] / temperature - lse[t]
    lse[t]     = logsumexp(logits[t] / temperature)
    entropy[t] = lse[t] - sum_v softmax(logits[t] / temperature)[v] logits[t, v] / temperature

A target < 0 or >= V is padding: its logp is exactly 0, with zero gradient. A row of nothing but
padding is ignored whole: lse and entropy are 0 too. A banned target (a bias of -inf) has logp -inf
and gets no gradient.

Head GEMMs, of T V D multiply-adds each: 1 forward; backward 3 more, as each chunk is recomputed
(nothing saves logits). One target a row and a head that wants no gradient: 2 in all. The forward
then also makes r = dlogp/dhidden, which without a soft cap is

    r[t] = (head[target[t]] - sum_v softmax(logits[t] / temperature)[v] head[v]) / temperature

and the backward of logp is g[t] r[t]. If the weight of every token is known beforehand,
`linear_nll` needs 3 for all.

Shapes: T tokens, K candidates, D hidden, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Part,
    check_rows,
    check_temperature,
    head_plan,
    logits_ref,
    on_tensor_cores,
    padded,
    parts,
    unit_above,
    wide,
)
from ._head import Head, HeadGradients, checked_head, fake_gradients
from ._logprob_rows import (
    LogProb,
    check_target,
    local_target,
    logprob_gradient_,
    upstream,
)
from ._logprob_tiles import chunk_statistics, statistics_plan
from ._loss import refuse_second_derivative, without_ignored
from ._parallel import VocabShard, common_width, local_width, slice_of
from .token_logprob import token_logprob_ref

LOGIT_BLOCKS = 1, 4  # alive at once beside the gradient: with kernels, with PyTorch alone


def linear_logprob_ref(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> LogProb:
    """The definition, with the whole [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    return token_logprob_ref(
        logits_ref(hidden_TD, head_VD, bias, logit_scale, softcap, vocab_size),
        target,
        temperature=temperature,
    )


@torch.library.custom_op("reflux::linear_logprob", mutates_args=())
def _op(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    target_TK: Tensor,
    rows_M: Tensor | None,
    temperature: float,
    entropy: bool,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    need_dlogp: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [T, K], lse [T], entropy [T] or empty; then what the backward needs.

    Row max [T], log of the shifted sum [T], and dlogp/dhidden [T, D] or empty.
    """
    T, dtype, x_TD = hidden_TD.shape[0], wide(hidden_TD.dtype), hidden_TD
    V = local_width(len(head_VD), vocab_size, vocab_start)
    head = Head(x_TD, head_VD, bias_V, logit_scale, softcap).cut(V)
    scale, d_scale = head.scales(temperature)
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    out = [x_TD.new_zeros(n, dtype=dtype) for n in (target_TK.shape, T, T if entropy else 0, T)]
    # rows that nobody chose are ignored ones
    out.append(x_TD.new_full((T,), torch.inf, dtype=dtype))
    need, width = (need_dlogp, False, False), common_width(vocab_size, group)
    fused, plan = statistics_plan(x_TD, width, LOGIT_BLOCKS, need, workspace_mb, rows_M)
    dlogp = HeadGradients.zeros(x_TD, head_VD, need, V, plan, 2 * scale * d_scale)

    # a function, so that its blocks are free before the next chunk's are made
    def step(part: Part) -> None:
        c = part.rows
        of_chunk = target_TK[c], temperature, entropy, group
        logits_CV, *found = chunk_statistics(fused, head, c, *of_chunk)
        for whole_T, found_C in zip(out, found, strict=True):
            if whole_T.numel():
                whole_T[c] = found_C
        if need_dlogp:
            logp_CK, _, empty, *saved = found
            g_CK = torch.full_like(logp_CK, d_scale * dlogp.lift)
            grads = *upstream(target_TK[c], logp_CK, g_CK), empty
            d_CV = dlogp.block(part, logits_CV)
            rows = padded(logits_CV), target_TK[c], (*saved, empty), grads, scale, softcap
            logprob_gradient_(*rows, padded(d_CV))
            dlogp.add(part, d_CV, head)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    logp_TK, lse_T, entropy_T, top_T, log_s_T = out
    return logp_TK, lse_T, entropy_T, top_T, log_s_T, dlogp.summed_dhidden(group)


@torch.library.custom_op("reflux::linear_logprob_backward", mutates_args=())
def _op_backward(
    g_logp_TK: Tensor,
    g_all_T: Tensor,
    g_entropy_T: Tensor,
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    target_TK: Tensor,
    rows_M: Tensor | None,
    top_T: Tensor,
    log_s_T: Tensor,
    entropy_T: Tensor,
    temperature: float,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [T, D], dhead [V, D], dbias [V]; empty where not needed."""
    need = needed[0], needed[1], needed[2]
    x_TD, V = hidden_TD, local_width(len(head_VD), vocab_size, vocab_start)
    head = Head(x_TD, head_VD, bias_V, logit_scale, softcap).cut(V)
    scale, d_scale = head.scales(temperature)
    plan = head_plan(x_TD, max(V, 1), LOGIT_BLOCKS, 0, need, workspace_mb, rows_M)
    unit = _unit(x_TD, d_scale, log_s_T, g_logp_TK, g_all_T, g_entropy_T)
    grads = HeadGradients.zeros(x_TD, head_VD, need, V, plan, scale, unit)
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    upstream_T = [g * (d_scale * grads.lift) for g in (g_logp_TK, g_all_T, g_entropy_T)]
    upstream_T = upstream_T if unit is None else [g / unit for g in upstream_T]

    def step(part: Part) -> None:
        c = part.rows
        logits_CV = head.logits(c)
        d_CV = grads.block(part, logits_CV)
        saved = top_T[c], log_s_T[c], entropy_T[c] if entropy_T.numel() else entropy_T
        g_C = tuple(g[c] for g in upstream_T)
        rows = padded(logits_CV), target_TK[c], saved, g_C, scale, softcap
        logprob_gradient_(*rows, padded(d_CV))
        grads.add(part, d_CV, head)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    return grads.finish(head_VD, bias_V, group)


def _unit(
    x_TD: Tensor,
    d_scale: float,
    log_s_T: Tensor,
    g_logp_TK: Tensor,
    g_all_T: Tensor,
    g_entropy_T: Tensor,
) -> Tensor | None:
    """What fp16 dlogits are divided by, so that none exceeds 1 / temperature: the gradients of a
    caller have any size. p (log p + entropy) stays below 16. log_s is infinite in ignored rows.
    """
    if not (on_tensor_cores(x_TD) and x_TD.dtype == torch.float16 and len(x_TD)):
        return None
    sums_T = g_logp_TK.abs().sum(1) + g_all_T.abs() + 16 * g_entropy_T.abs()
    return unit_above(sums_T * d_scale, log_s_T.isfinite())


def _fake(hidden_TD, head_VD, bias_V, logit_scale, softcap, target_TK, *options):
    entropy, need_dlogp = options[2], options[-1]
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    rows = [hidden_TD.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T)]
    dlogp_TD = hidden_TD.new_empty(hidden_TD.shape if need_dlogp else (0,))
    return hidden_TD.new_empty(target_TK.shape, dtype=dtype), *rows, dlogp_TD


def _fake_backward(g_logp_TK, g_all_T, g_entropy_T, hidden_TD, head_VD, bias_V, *options):
    return fake_gradients(hidden_TD, head_VD, bias_V, options[-1])


def _save(ctx, inputs, output):
    *head, logit_scale, softcap, target_TK, rows_M, temperature, _ = inputs[:9]
    logp_TK, _, entropy_T, top_T, log_s_T, dlogp_TD = output
    ctx.save_for_backward(*head, target_TK, rows_M, logp_TK, top_T, log_s_T, entropy_T, dlogp_TD)
    ctx.mark_non_differentiable(top_T, log_s_T, dlogp_TD)
    ctx.set_materialize_grads(False)
    ctx.scales, ctx.options = (logit_scale, softcap), (temperature, *inputs[9:-1])


def _grad(ctx, g_logp_TK, g_lse_T, g_entropy_T, *_):
    *head, target_TK, rows_M, logp_TK, top_T, log_s_T, entropy_T, dlogp_TD = ctx.saved_tensors
    needed, none = list(ctx.needs_input_grad[:3]), [None] * 11
    if dlogp_TD.numel() and g_lse_T is None and g_entropy_T is None:
        dx_TD = None if g_logp_TK is None else (dlogp_TD * g_logp_TK).to(head[0].dtype)
        return *refuse_second_derivative([dx_TD, None, None], head), *none
    if g_logp_TK is None:
        g_logp_TK = torch.zeros_like(logp_TK)
    if entropy_T.numel() and g_entropy_T is not None:
        g_entropy_T = g_entropy_T.contiguous()
    else:
        g_entropy_T = torch.zeros_like(top_T)
    gradients = _op_backward(
        *upstream(target_TK, logp_TK, g_logp_TK, g_lse_T),
        g_entropy_T,
        *head,
        *ctx.scales,
        target_TK,
        rows_M,
        top_T,
        log_s_T,
        entropy_T,
        *ctx.options,
        needed,
    )
    wanted = [d if need else None for d, need in zip(gradients, needed)]
    return *refuse_second_derivative(wanted, head), *none


_op.register_fake(_fake)
_op_backward.register_fake(_fake_backward)
_op.register_autograd(_grad, setup_context=_save)


def linear_logprob(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    frozen_head: bool = False,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> LogProb:
    """(logp [T] or [T, K], lse [T], entropy [T] or None), fp32 (fp64 for fp64), in nats.

    hidden [T, D], head [V, D] share a floating dtype (under autocast they are cast to it); bias
    [V]; target is int [T], or [T, K] with candidates that may repeat. All outputs are
    differentiable in hidden, head and bias; their gradients accumulate in fp32. frozen_head: none
    for head and bias. rows: distinct row numbers int64 [M]; only these are computed, the others are
    ignored. vocab_size < V leaves the padded rows of the head out. shard: head and bias are this
    rank's slice, targets stay ids of the whole vocabulary, vocab_size is its size, and every rank
    of the group calls with the same hidden and targets. workspace_mb (MiB) bounds the logits alive
    at once. ValueError on shapes, dtypes, or an option that has no meaning.
    """
    op = "linear_logprob"
    check_temperature(op, temperature)
    if frozen_head:
        head_VD, bias = head_VD.detach(), None if bias is None else bias.detach()
    tensors = hidden_TD, head_VD, bias, logit_scale, softcap
    head, V = checked_head(op, *tensors, vocab_size, shard)
    target_TK = check_target(op, target, head.hidden_TD.shape[0], V)
    x_TD = without_ignored(head.hidden_TD, (target_TK >= 0).any(1))
    head = head._replace(hidden_TD=x_TD)
    need = head.needs(False)
    logp_TK, lse_T, entropy_T, *_ = _op(
        *head,
        target_TK,
        check_rows(op, rows, x_TD),
        temperature,
        entropy,
        V,
        *slice_of(shard),
        workspace_mb,
        need == (True, False, False) and target_TK.shape[1] == 1 and not entropy,
    )
    return LogProb(logp_TK.reshape(target.shape), lse_T, entropy_T if entropy else None)
