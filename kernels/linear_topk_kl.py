"""Divergence of a student, given as hidden states and head, from the K classes kept of a teacher.

S = the ids of a row, p the student, q the teacher, both at `temperature`; the tail is every class outside S.

    ghost    D over K + 1 classes, the last holding the whole tail: 0 <= ghost <= full, = full at K = V
    renorm   D of p and q, each renormalised over S: blind to mass outside S
    drop     sum_S q (log q - log p): raw masses, forward only, can be negative
    sampled  - sum_S w log p, ids drawn from q with weights w = exp(teacher_logp): its gradient is that of the full
             forward KL in expectation (arXiv:2503.16870); the value is a cross-entropy, not a KL

    total = sum_t weight[t] kl[t], with its gradients made in the forward, as in linear_kl.

Refused: reverse and skew `drop`, which fall when the whole support is pushed down, and renorm at K = 1, which is 0.
ids < 0 or >= V, and a teacher_logp of -inf, are padding; a row of padding has kl 0 and no gradient. The ids of a row
must be distinct. A row whose kl is inf or NaN keeps it and contributes a zero gradient.

Shapes: T tokens, K kept ids, D hidden, V vocabulary, C rows of a chunk.
"""
import torch
from torch import Tensor

from ._chunks import (
    backproject,
    check_linear,
    check_softcap,
    chunks,
    gradient_buffers,
    needs_gradients,
    project,
    wide,
    workspace_buffers,
)
from ._divergence import check_mode, divergence_ref
from ._topk_rows import TAILS, topk_rows_
from ._triton import require
from .linear_kl import LinearKL, fake_outputs, row_weights, save_gradients, scale_gradients, weighted_total


def linear_topk_kl_ref(student_hidden_TD: Tensor, student_head_VD: Tensor, ids_TK: Tensor, teacher_logp_TK: Tensor,
                       teacher_tail_T: Tensor | None = None, *, mode: str = "forward", tail: str = "ghost",
                       beta: float = 0.5, temperature: float = 1.0, weight: Tensor | None = None,
                       vocab_size: int | None = None, softcap: float | None = None) -> LinearKL:
    """The definition, with [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    dtype = wide(student_hidden_TD.dtype)
    z_TV = student_hidden_TD.to(dtype) @ student_head_VD[:vocab_size].to(dtype).t()
    a_TV = (softcap * torch.tanh(z_TV / softcap) if softcap else z_TV) / temperature
    live_TK = (ids_TK >= 0) & (ids_TK < a_TV.shape[1]) & (teacher_logp_TK > -torch.inf)
    # Padding points one past the vocabulary, so that one scatter marks the support.
    safe_TK = torch.where(live_TK, ids_TK, a_TV.shape[1]).long()
    kept_TV = torch.zeros(len(a_TV), a_TV.shape[1] + 1, dtype=torch.bool, device=a_TV.device)
    kept_TV = kept_TV.scatter(1, safe_TK, True)[:, :-1]
    padded_TV = torch.cat([a_TV, a_TV.new_full((len(a_TV), 1), -torch.inf)], 1)
    a_TK, logq_TK = padded_TV.gather(1, safe_TK), teacher_logp_TK.to(dtype).masked_fill(~live_TK, -torch.inf)
    if tail == "renorm":
        kl_T = divergence_ref(a_TK.log_softmax(1), logq_TK.log_softmax(1), mode, beta)
    else:
        logp_TK = a_TK - a_TV.logsumexp(1, keepdim=True)
        if tail == "ghost":
            rest_T1 = a_TV.masked_fill(kept_TV, -torch.inf).logsumexp(1, keepdim=True)
            logq_tail_T = teacher_tail_T.to(dtype).masked_fill(kept_TV.all(1), -torch.inf)
            logp_TK = torch.cat([logp_TK, rest_T1 - a_TV.logsumexp(1, keepdim=True)], 1)
            logq_TK = torch.cat([logq_TK, logq_tail_T[:, None]], 1)
        kl_T = divergence_ref(logp_TK, logq_TK, mode, beta)
        if tail == "sampled":
            kl_T = -torch.where(logq_TK > -torch.inf, logq_TK.exp() * logp_TK, 0.0).sum(1)
    kl_T = torch.where(live_TK.any(1), kl_T, 0.0)
    return LinearKL(weighted_total(kl_T, torch.ones_like(kl_T) if weight is None else weight.to(dtype)), kl_T.detach())


@torch.library.custom_op("reflux::linear_topk_kl", mutates_args=())
def _op(student_hidden_TD: Tensor, student_head_VD: Tensor, ids_TK: Tensor, teacher_logp_TK: Tensor,
        teacher_tail_T: Tensor, weight_T: Tensor, mode: str, tail: str, beta: float, temperature: float,
        vocab_size: int, softcap: float, workspace_mb: float, need_dhidden: bool, need_dhead: bool,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], and the gradients of total in the student's hidden and head (empty where not needed)."""
    x_TD, head_VD = student_hidden_TD, student_head_VD[:vocab_size]
    kl_T = x_TD.new_empty(x_TD.shape[0], dtype=wide(x_TD.dtype))
    dx_TD, dhead_VD = gradient_buffers(x_TD, student_head_VD, need_dhidden, need_dhead)
    gradient = need_dhidden or need_dhead
    for c in chunks(x_TD, vocab_size, workspace_buffers(x_TD, 2, 3), workspace_mb):
        z_CV = project(x_TD[c], head_VD, softcap)
        kl_T[c] = topk_rows_(z_CV, ids_TK[c], teacher_logp_TK[c], teacher_tail_T[c], weight_T[c], 1 / temperature, mode,
                             tail, beta, softcap, gradient)
        if gradient:
            dx_CD = backproject(z_CV, x_TD[c], head_VD, need_dhidden, dhead_VD[:vocab_size] if need_dhead else None)
            if need_dhidden:
                dx_TD[c] = dx_CD
    return weighted_total(kl_T, weight_T), kl_T, dx_TD, dhead_VD.to(student_head_VD.dtype)


def _fake(student_hidden_TD, student_head_VD, ids_TK, teacher_logp_TK, teacher_tail_T, weight_T, mode, tail, beta,
          temperature, vocab_size, softcap, workspace_mb, need_dhidden, need_dhead):
    return fake_outputs(student_hidden_TD, student_head_VD, need_dhidden, need_dhead)


_op.register_fake(_fake)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def _check_teacher(V: int, T: int, ids_TK: Tensor, teacher_logp_TK: Tensor, teacher_tail_T: Tensor | None, mode: str,
                   tail: str) -> None:
    op, shape = "linear_topk_kl", ids_TK.shape
    require(tail in TAILS, f"{op}: tail is {tail!r}; want one of {', '.join(TAILS)}")
    require(ids_TK.ndim == 2 and shape[0] == T and teacher_logp_TK.shape == shape,
            f"{op}: ids is {list(shape)} and teacher_logp {list(teacher_logp_TK.shape)} for {T} rows; want [T, K] both")
    require(ids_TK.dtype in (torch.int32, torch.int64), f"{op}: ids is {ids_TK.dtype}; want int32 or int64")
    require(teacher_logp_TK.dtype in (torch.float32, torch.float64),
            f"{op}: teacher_logp is {teacher_logp_TK.dtype}; want float32. 16 bits are 0.06 apart at 8 nats, so store "
            "float32; casting here cannot restore them")
    require(1 <= shape[1] <= V, f"{op}: K is {shape[1]} of {V} classes; want 1 <= K <= V. Drop the padding columns")
    require(tail != "renorm" or shape[1] > 1,
            f"{op}: renorm at K = 1 is 0 whatever the student says. Keep more ids, or use tail='ghost'")
    require(tail not in ("drop", "sampled") or mode == "forward",
            f"{op}: tail={tail!r} in mode {mode}; want forward. Elsewhere it falls when the whole support is pushed "
            "down: use tail='ghost'")
    require(tail != "ghost" or teacher_tail_T is not None,
            f"{op}: ghost needs teacher_tail [T], the log of the teacher's mass outside ids at this temperature. "
            "teacher_topk returns it; without it use tail='renorm'")
    require(teacher_tail_T is None or teacher_tail_T.shape == (T,),
            f"{op}: teacher_tail is {list(getattr(teacher_tail_T, 'shape', []))} for {T} rows; want [T]")


def linear_topk_kl(student_hidden_TD: Tensor, student_head_VD: Tensor, ids_TK: Tensor, teacher_logp_TK: Tensor,
                   teacher_tail_T: Tensor | None = None, *, mode: str = "forward", tail: str = "ghost",
                   beta: float = 0.5, temperature: float = 1.0, weight: Tensor | None = None,
                   vocab_size: int | None = None, softcap: float | None = None, workspace_mb: float = 1200,
                   frozen_student_head: bool = False) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. total is differentiable in the student's hidden and head.

    ids int [T, K], distinct within a row; teacher_logp fp32 [T, K] and teacher_tail [T] are natural logs of the
    teacher's masses *at this temperature*: a tail at temperature 1 does not give the tail at another. teacher_tail is
    read by ghost only. beta: jsd and skew only. weight [T]: constant, None for ones. frozen_student_head skips dhead,
    which otherwise accumulates in fp32. workspace_mb (MiB) bounds the logits alive at once. One backward per call.
    ValueError on shapes, dtypes, or an option that has no meaning.
    """
    check_mode("linear_topk_kl", mode, beta)
    V = check_linear("linear_topk_kl", student_hidden_TD, student_head_VD, vocab_size, temperature)
    _check_teacher(V, student_hidden_TD.shape[0], ids_TK, teacher_logp_TK, teacher_tail_T, mode, tail)
    dtype = wide(student_hidden_TD.dtype)
    teacher_tail_T = teacher_logp_TK.new_zeros(len(ids_TK)) if teacher_tail_T is None else teacher_tail_T
    total, kl_T, _, _ = _op(
        student_hidden_TD, student_head_VD, ids_TK.contiguous(), teacher_logp_TK.detach().to(dtype).contiguous(),
        teacher_tail_T.detach().to(dtype).contiguous(), row_weights("linear_topk_kl", weight, student_hidden_TD), mode,
        tail, beta, temperature, V, check_softcap("linear_topk_kl", softcap), workspace_mb,
        *needs_gradients(student_hidden_TD, student_head_VD, frozen_student_head))
    return LinearKL(total, kl_T)
