"""Log-probabilities of chosen tokens straight from hidden states: the [T, V] logits exist one chunk
at a time.

    logits[t]  = softcap(logit_scale (hidden[t] @ head.T + bias)),  softcap(x) = softcap tanh(x /
               softcap)
    logp[t, k] = logits[t, target[t, k]] / temperature - lse[t]
    lse[t]     = logsumexp(logits[t] / temperature)
    entropy[t] = lse[t] - sum_v softmax(logits[t] / temperature)[v] logits[t, v] / temperature

A target < 0 or >= V is padding: its logp is exactly 0, with zero gradient. A row of nothing but
padding is ignored whole: lse and entropy are 0 too. A banned target (a bias of -inf) has logp -inf
and gets no gradient.

Head GEMMs, of T V D multiply-adds each: 1 forward; backward 3 more, as each chunk is recomputed
(nothing saves logits). One target a row and a head that wants no gradient: 2 in all. The forward
then also makes r = dlogp/dhidden,

    r[t] = (head[target[t]] - sum_v softmax(logits[t] / temperature)[v] head[v]) / temperature       (without
        a soft cap)

and the backward of logp is g[t] r[t]. If the weight of every token is known beforehand,
`linear_nll` needs 3 for all.

Shapes: T tokens, K candidates, D hidden, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import (
    Rows,
    as_autocast,
    backproject,
    check_bias,
    check_linear,
    check_logit_scale,
    check_rows,
    check_softcap,
    chunks,
    fold_scale,
    gradient_block,
    gradient_buffers,
    logits_ref,
    needs_gradient,
    padded,
    project,
    wide,
    workspace_buffers,
)
from ._logprob_rows import (
    LogProb,
    check_target,
    local_target,
    logprob_gradient_,
    logprob_rows,
    upstream,
)
from ._parallel import VocabShard, all_sum, common_width, local_head, local_width
from ._triton import require
from .token_logprob import token_logprob_ref

GRADIENT_BUFFERS = 1.5  # the logits and, for bf16 GEMMs, half as much for their gradient


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
    target_TK: Tensor,
    rows_M: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    entropy: bool,
    vocab_size: int,
    vocab_start: int,
    group: str,
    workspace_mb: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [T, K], lse [T], entropy [T] or empty; for the backward row max [T], log of the shifted
    sum [T], and dlogp/dhidden [T, D] or empty.
    """
    T, dtype, x_TD = hidden_TD.shape[0], wide(hidden_TD.dtype), hidden_TD
    V = local_width(len(head_VD), vocab_size, vocab_start)
    head, bias = head_VD[:V], None if bias_V is None else bias_V[:V]
    scale, d_scale = fold_scale(temperature, logit_scale, softcap)
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    out = [x_TD.new_zeros(n, dtype=dtype) for n in (target_TK.shape, T, T if entropy else 0, T)]
    # rows that nobody chose are ignored ones
    out.append(x_TD.new_full((T,), torch.inf, dtype=dtype))
    direction_TD = x_TD.new_zeros(x_TD.shape if need_direction else (0,))

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        logits_CV = project(x_TD[c], head, softcap, bias, logit_scale)
        part = logprob_rows(padded(logits_CV), target_TK[c], scale, entropy, group)
        for whole_T, part_C in zip(out, part, strict=True):
            if whole_T.numel():
                whole_T[c] = part_C
        if need_direction:
            logp_CK, _, empty, *saved = part
            grads = *upstream(target_TK[c], logp_CK, torch.full_like(logp_CK, d_scale)), empty
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
            direction_TD[c] = backproject(d_CV, x_TD[c], head, True, None)

    buffers = workspace_buffers(x_TD, GRADIENT_BUFFERS if need_direction else 1, 4)
    for c in chunks(x_TD, common_width(vocab_size, group), buffers, workspace_mb, rows_M):
        step(c)
    return *out, all_sum(direction_TD, group if need_direction else "")


@torch.library.custom_op("reflux::linear_logprob_backward", mutates_args=())
def _op_backward(
    g_logp_TK: Tensor,
    g_all_T: Tensor,
    g_entropy_T: Tensor,
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_TK: Tensor,
    rows_M: Tensor | None,
    top_T: Tensor,
    log_s_T: Tensor,
    entropy_T: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    vocab_start: int,
    group: str,
    workspace_mb: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [T, D], dhead [V, D], dbias [V]; empty where not needed."""
    need_dhidden, need_dhead, need_dbias = needed
    x_TD, V = hidden_TD, local_width(len(head_VD), vocab_size, vocab_start)
    head, bias = head_VD[:V], None if bias_V is None else bias_V[:V]
    scale, d_scale = fold_scale(temperature, logit_scale, softcap)
    target_TK = local_target(target_TK, vocab_start, V, rows_M)
    dx_TD, dhead_VD = gradient_buffers(x_TD, head_VD, need_dhidden, need_dhead)
    dbias_V = x_TD.new_zeros(len(head_VD) if need_dbias else 0, dtype=wide(x_TD.dtype))
    grads_T = [g * d_scale for g in (g_logp_TK, g_all_T, g_entropy_T)]

    def step(c: Rows) -> None:
        logits_CV = project(x_TD[c], head, softcap, bias, logit_scale)
        d_CV = gradient_block(logits_CV, x_TD)
        saved = top_T[c], log_s_T[c], entropy_T[c] if entropy_T.numel() else entropy_T
        logprob_gradient_(
            padded(logits_CV),
            target_TK[c],
            saved,
            tuple(g[c] for g in grads_T),
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

    for c in chunks(
        x_TD, max(V, 1), workspace_buffers(x_TD, GRADIENT_BUFFERS, 4), workspace_mb, rows_M
    ):
        step(c)
    return (
        all_sum(dx_TD, group if need_dhidden else ""),
        dhead_VD.to(head_VD.dtype),
        dbias_V if bias_V is None else dbias_V.to(bias_V.dtype),
    )


def _fake(
    hidden_TD,
    head_VD,
    bias_V,
    target_TK,
    rows_M,
    temperature,
    logit_scale,
    softcap,
    entropy,
    vocab_size,
    vocab_start,
    group,
    workspace_mb,
    need_direction,
):
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    rows = [hidden_TD.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T)]
    direction_TD = hidden_TD.new_empty(hidden_TD.shape if need_direction else (0,))
    return hidden_TD.new_empty(target_TK.shape, dtype=dtype), *rows, direction_TD


def _fake_backward(
    g_logp_TK,
    g_all_T,
    g_entropy_T,
    hidden_TD,
    head_VD,
    bias_V,
    target_TK,
    rows_M,
    top_T,
    log_s_T,
    entropy_T,
    temperature,
    logit_scale,
    softcap,
    vocab_size,
    vocab_start,
    group,
    workspace_mb,
    needed,
):
    need_dhidden, need_dhead, need_dbias = needed
    dbias_V = (head_VD if bias_V is None else bias_V).new_empty(len(head_VD) if need_dbias else 0)
    return (
        hidden_TD.new_empty(hidden_TD.shape if need_dhidden else (0,)),
        head_VD.new_empty(head_VD.shape if need_dhead else (0,)),
        dbias_V,
    )


def _save(ctx, inputs, output):
    (
        *tensors,
        temperature,
        logit_scale,
        softcap,
        _,
        vocab_size,
        vocab_start,
        group,
        workspace_mb,
        _,
    ) = inputs
    logp_TK, _, entropy_T, top_T, log_s_T, direction_TD = output
    ctx.save_for_backward(*tensors, logp_TK, top_T, log_s_T, entropy_T, direction_TD)
    ctx.mark_non_differentiable(top_T, log_s_T, direction_TD)
    ctx.set_materialize_grads(False)
    ctx.options = temperature, logit_scale, softcap, vocab_size, vocab_start, group, workspace_mb


def _grad(ctx, g_logp_TK, g_lse_T, g_entropy_T, *_):
    x_TD, head_VD, bias_V, target_TK, rows_M, logp_TK, top_T, log_s_T, entropy_T, direction_TD = (
        ctx.saved_tensors
    )
    needed, none = list(ctx.needs_input_grad[:3]), [None] * 11
    if direction_TD.numel() and g_lse_T is None and g_entropy_T is None:
        return (
            None if g_logp_TK is None else (direction_TD * g_logp_TK).to(x_TD.dtype),
            None,
            None,
            *none,
        )
    grads = upstream(
        target_TK, logp_TK, torch.zeros_like(logp_TK) if g_logp_TK is None else g_logp_TK, g_lse_T
    )
    g_entropy_T = (
        g_entropy_T.contiguous()
        if entropy_T.numel() and g_entropy_T is not None
        else torch.zeros_like(top_T)
    )
    dx_TD, dhead_VD, dbias_V = _op_backward(
        *grads,
        g_entropy_T,
        x_TD,
        head_VD,
        bias_V,
        target_TK,
        rows_M,
        top_T,
        log_s_T,
        entropy_T,
        *ctx.options,
        needed,
    )
    return *(d if need else None for d, need in zip((dx_TD, dhead_VD, dbias_V), needed)), *none


_op.register_fake(_fake)
_op_backward.register_fake(_fake_backward)
_op.register_autograd(_grad, setup_context=_save)


def check_inputs(
    op: str,
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> tuple[tuple[Tensor | None, ...], int]:
    """((hidden, head, bias, target [T, K], rows), vocabulary size): cast as autocast would, and fit
    for the ops.
    """
    head_VD, bias_V = (None if x is None else local_head(op, x, shard) for x in (head_VD, bias_V))
    hidden_TD, head_VD, bias_V = as_autocast(hidden_TD, head_VD, bias_V)
    V = check_linear(op, hidden_TD, head_VD, vocab_size, 1.0, shard)
    target_TK = check_target(op, target, len(hidden_TD), V)
    return (
        hidden_TD,
        head_VD,
        check_bias(op, bias_V, head_VD),
        target_TK,
        check_rows(op, rows, hidden_TD),
    ), V


def check_scales(
    op: str, temperature: float, logit_scale: float, softcap: float | None
) -> tuple[float, float, float]:
    """(temperature, logit_scale, softcap or 0)."""
    require(
        temperature > 0,
        f"{op}: temperature is {temperature}; want > 0. 0 means greedy: take the argmax",
    )
    return temperature, check_logit_scale(op, logit_scale), check_softcap(op, softcap)


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
    workspace_mb: float = 1200,
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
    scales = check_scales("linear_logprob", temperature, logit_scale, softcap)
    if frozen_head:
        head_VD, bias = head_VD.detach(), None if bias is None else bias.detach()
    tensors, V = check_inputs(
        "linear_logprob", hidden_TD, head_VD, bias, target, rows, vocab_size, shard
    )
    learns = [needs_gradient(x) for x in tensors[:3]]
    logp_TK, lse_T, entropy_T, *_ = _op(
        *tensors,
        *scales,
        entropy,
        V,
        shard.start if shard else 0,
        shard.group if shard else "",
        workspace_mb,
        learns == [True, False, False] and tensors[3].shape[1] == 1 and not entropy,
    )
    return LogProb(logp_TK.reshape(target.shape), lse_T, entropy_T if entropy else None)
