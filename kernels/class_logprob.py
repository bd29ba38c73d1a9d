"""Log-probability of classes of tokens: of the next byte, of a common spelling, of "stop".

    logp[t, c] = log sum of softmax(logits[t] / temperature) over the ids of class c

An id of class -1 is in no class and not in the softmax: rows of a padded head. A class without ids
has logp -inf. With a class of its own for every id this is log_softmax; with N = 257 first bytes it
is what a teacher of another tokenizer needs to store at a position. Gradient of sum g logp in the
scaled logit of id i of class c: p_i / P_c (g_c - P_c sum g).

[T, V] logits exist chunk by chunk, with columns in class order: the head's rows are gathered into
that order once per call.

Shapes: T tokens, V ids, N classes, D hidden, C rows of a chunk, M chosen rows.
"""

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Part,
    check_rows,
    check_temperature,
    logits_ref,
    on_tensor_cores,
    parts,
    unit_above,
    wide,
)
from ._classes import ClassMap, ClassSide, checked_side, class_plan, fake_gradients, gradients_by_id
from ._classes import class_map as class_map
from ._head import Head
from ._loss import refuse_second_derivative
from ._parallel import VocabShard, common_width, slice_of


def class_logprob_ref(
    hidden_TD: Tensor,
    head_VD: Tensor,
    classes: ClassMap,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
) -> Tensor:
    """The definition, with the whole [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    class_V = classes.class_V
    x_TV = logits_ref(hidden_TD, head_VD, bias, logit_scale, softcap, class_V.shape[0])
    logp_TV = (x_TV / temperature).masked_fill(class_V < 0, -torch.inf).log_softmax(1)
    columns = [
        logp_TV[:, class_V == c].logsumexp(1)
        if c not in classes.empty
        else logp_TV.new_full(logp_TV.shape[:1], -torch.inf)
        for c in range(classes.num_classes)
    ]
    logp_TN = torch.stack(columns, 1)
    if rows is None:
        return logp_TN
    chosen_T1 = torch.zeros(len(logp_TN), 1, dtype=torch.bool, device=rows.device)
    chosen_T1.index_fill_(0, rows.long(), True)
    return torch.where(chosen_T1, logp_TN, 0.0)


@torch.library.custom_op("reflux::class_logprob", mutates_args=())
def _op(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    columns: list[Tensor],
    rows_M: Tensor | None,
    vocab_size: int,
    temperature: float,
    group: str,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp [T, N]; for the backward the largest scaled logit and the log-sum relative to it [T]."""
    T, N, dtype = hidden_TD.shape[0], columns[2].shape[0] - 1, wide(hidden_TD.dtype)
    side = ClassSide.of(Head(hidden_TD, head_VD, bias_V, logit_scale, softcap), columns)
    logp_TN, top_T, log_s_T = (
        hidden_TD.new_zeros(shape, dtype=dtype) for shape in ((T, N), (T,), (T,))
    )
    none, columns_V = (False, False, False), common_width(vocab_size, group)
    plan = class_plan(hidden_TD, columns_V, 4 * N, 0, none, workspace_mb, rows_M)
    for c, *_ in parts(plan, hidden_TD, rows_M):
        z_CN, top_T[c] = side.classes(side.head.logits(c), temperature, group)
        log_s_C = z_CN.logsumexp(1)
        logp_TN[c], log_s_T[c] = z_CN.sub_(log_s_C[:, None]), log_s_C
    return logp_TN, top_T, log_s_T


@torch.library.custom_op("reflux::class_logprob_backward", mutates_args=())
def _op_backward(
    g_TN: Tensor,
    logp_TN: Tensor,
    top_T: Tensor,
    log_s_T: Tensor,
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    columns: list[Tensor],
    rows_M: Tensor | None,
    vocab_size: int,
    temperature: float,
    group: str,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    side = ClassSide.of(Head(hidden_TD, head_VD, bias_V, logit_scale, softcap), columns)
    need, width = (need_dhidden, need_dhead, need_dbias), common_width(vocab_size, group)
    blocks_N = 4 * logp_TN.shape[1]
    plan = class_plan(hidden_TD, width, blocks_N, 0, need, workspace_mb, rows_M)
    unit = _unit(hidden_TD, g_TN, logp_TN, log_s_T, rows_M)
    grads = side.gradients(need, plan, temperature, 1.0, unit)

    def step(part: Part) -> None:
        c = part.rows
        logp_CN = logp_TN[c]
        # an empty class: a constant
        g_CN = torch.where(logp_CN == -torch.inf, 0.0, g_TN[c].to(top_T.dtype))
        dz_CN = torch.addcmul(g_CN, logp_CN.exp(), g_CN.sum(1, keepdim=True), value=-1)
        dz_CN.masked_fill_(~log_s_T[c].isfinite()[:, None], 0.0)  # no distribution at all
        # lift is 1 without a unit
        dz_CN = dz_CN if unit is None else dz_CN.div_(unit).mul_(grads.lift)
        classes = logp_CN + log_s_T[c][:, None], top_T[c]
        side.backward(part, side.head.logits(c), classes, dz_CN, temperature, grads)

    for part in parts(plan, hidden_TD, rows_M):
        step(part)
    return gradients_by_id(grads, head_VD, bias_V, columns, group)


def _unit(
    hidden_TD: Tensor, g_TN: Tensor, logp_TN: Tensor, log_s_T: Tensor, rows_M: Tensor | None
) -> Tensor | None:
    """What fp16 dlogits are divided by: |g_c - P_c sum g| is at most sum |g|, of any size. Classes
    and rows without a gradient are left out, as the gradient leaves them out.
    """
    if not (on_tensor_cores(hidden_TD) and hidden_TD.dtype == torch.float16 and g_TN.numel()):
        return None
    used_T = log_s_T.isfinite()
    if rows_M is not None:
        used_T = used_T & torch.zeros_like(used_T).index_fill(0, rows_M, True)
    sums_T = torch.where(logp_TN == -torch.inf, 0.0, g_TN.float().abs()).sum(1)
    return unit_above(sums_T, used_T)


def _fake(hidden_TD, head_VD, bias_V, logit_scale, softcap, columns, *_):
    T, N, dtype = hidden_TD.shape[0], columns[2].shape[0] - 1, wide(hidden_TD.dtype)
    return tuple(hidden_TD.new_empty(shape, dtype=dtype) for shape in ((T, N), (T,), (T,)))


def _fake_backward(g_TN, logp_TN, top_T, log_s_T, hidden_TD, head_VD, bias_V, *rest):
    return fake_gradients(hidden_TD, head_VD, bias_V, rest[-3:])


def _save(ctx, inputs, output):
    *tensors, logit_scale, softcap, columns, rows_M = inputs[:7]
    ctx.scales, ctx.options = (logit_scale, softcap), inputs[7:]
    ctx.save_for_backward(*output, *tensors, rows_M, *columns)
    ctx.mark_non_differentiable(*output[1:])


def _grad(ctx, g_TN, _top_T, _log_s_T):
    *saved, rows_M = ctx.saved_tensors[:7]
    columns, need = list(ctx.saved_tensors[7:]), ctx.needs_input_grad[:3]
    grads = _op_backward(g_TN, *saved, *ctx.scales, columns, rows_M, *ctx.options, *need)
    wanted = [g if needed else None for g, needed in zip(grads, need)]
    return (
        *refuse_second_derivative(wanted, saved[-3:]),
        *[None] * len(ctx.scales),
        [None] * len(columns),
        *[None] * (1 + len(ctx.options)),
    )


_op.register_fake(_fake)
_op_backward.register_fake(_fake_backward)
_op.register_autograd(_grad, setup_context=_save)


def class_logprob(
    hidden_TD: Tensor,
    head_VD: Tensor,
    classes: ClassMap,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    frozen_head: bool = False,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> Tensor:
    """logp [T, N], fp32 (fp64 for fp64), in nats. Differentiable in hidden, head and bias.

    dhead accumulates in fp32. hidden [T, D] and head [V, D] share a floating dtype; classes of
    `class_map` on the same device; bias [V]. logits = softcap tanh(logit_scale (hidden @ head.T +
    bias) / softcap), without the tanh if softcap is None. rows: distinct row numbers int64 [M];
    only they are computed, the others are 0. frozen_head: no gradient in head and bias. shard:
    head, bias and classes (classes.slice) are this rank's slice of the vocabulary; every rank gets
    all of logp, and N numbers a row travel twice. workspace_mb (MiB) bounds the logits alive at
    once; the head is copied once a call into class order. A row whose logits are all -inf has logp
    NaN and no gradient. ValueError on shapes, dtypes, devices, or an option that has no meaning.
    """
    op = "class_logprob"
    check_temperature(op, temperature)
    if frozen_head:
        head_VD, bias = head_VD.detach(), None if bias is None else bias.detach()
    tensors = hidden_TD, head_VD, bias, logit_scale, softcap
    head = checked_side(op, *tensors, classes, vocab_size, shard)
    logp_TN, _, _ = _op(
        *head,
        classes.columns,
        check_rows(op, rows, head.hidden_TD),
        classes.vocab_size,
        temperature,
        slice_of(shard)[0],
        workspace_mb,
    )
    return logp_TN
