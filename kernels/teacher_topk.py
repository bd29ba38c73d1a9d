"""The K largest classes of a teacher, with their log-probabilities and the exact log-mass of the rest.

    logp[t, k] = log softmax(logits[t] / temperature)[ids[t, k]]
    tail[t]    = log sum of softmax(logits[t] / temperature) outside ids[t];  -inf at K = V

The kept logits are replaced by -inf and the logsumexp of what is left is the tail: exact down to a mass of 1e-38, where
log(1 - sum p) is lost at 1e-8. All of it holds at this temperature only.

Shapes: T tokens, K kept ids, D hidden, V vocabulary, C rows of a chunk.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import check_linear, check_softcap, chunks, project, wide
from ._triton import require


class TopK(NamedTuple):
    ids: Tensor  # int32 [T, K], by falling logp
    logp: Tensor  # [T, K]
    tail: Tensor  # [T]


def teacher_topk_ref(hidden_TD: Tensor, head_VD: Tensor, k: int, *, temperature: float = 1.0,
                     vocab_size: int | None = None, softcap: float | None = None) -> TopK:
    """The definition, with the whole [T, V] sorted in memory. fp32 arithmetic, or fp64 when given fp64."""
    dtype = wide(hidden_TD.dtype)
    logits_TV = hidden_TD.to(dtype) @ head_VD[:vocab_size].to(dtype).t()
    x_TV = (softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV) / temperature
    logp_TV, ids_TV = x_TV.log_softmax(1).sort(1, descending=True)
    return TopK(ids_TV[:, :k].int(), logp_TV[:, :k], logp_TV[:, k:].logsumexp(1))


@torch.library.custom_op("reflux::teacher_topk", mutates_args=())
def _op(hidden_TD: Tensor, head_VD: Tensor, k: int, temperature: float, vocab_size: int, softcap: float,
        workspace_mb: float) -> tuple[Tensor, Tensor, Tensor]:
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    ids_TK = hidden_TD.new_empty((T, k), dtype=torch.int32)
    logp_TK, tail_T = hidden_TD.new_empty((T, k), dtype=dtype), hidden_TD.new_empty(T, dtype=dtype)
    for c in chunks(hidden_TD, vocab_size, 3, workspace_mb):
        x_CV = project(hidden_TD[c], head_VD[:vocab_size], softcap).mul_(1 / temperature)
        x_CK, ids_CK = x_CV.topk(k, dim=1)
        rest_C = x_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(1)
        lse_C = torch.logaddexp(x_CK.logsumexp(1), rest_C)
        ids_TK[c], logp_TK[c], tail_T[c] = ids_CK, x_CK - lse_C[:, None], rest_C - lse_C
    return ids_TK, logp_TK, tail_T


def _fake(hidden_TD, head_VD, k, temperature, vocab_size, softcap, workspace_mb):
    T, dtype = hidden_TD.shape[0], wide(hidden_TD.dtype)
    return (hidden_TD.new_empty((T, k), dtype=torch.int32), hidden_TD.new_empty((T, k), dtype=dtype),
            hidden_TD.new_empty(T, dtype=dtype))


_op.register_fake(_fake)


def teacher_topk(hidden_TD: Tensor, head_VD: Tensor, k: int, *, temperature: float = 1.0, vocab_size: int | None = None,
                 softcap: float | None = None, workspace_mb: float = 1200) -> TopK:
    """(ids int32 [T, k], logp [T, k], tail [T]), fp32 (fp64 for fp64), in nats; no gradient.

    hidden [T, D] and head [V, D] share a floating dtype. Which of several equal logits at the k-th place is kept is
    not specified. workspace_mb (MiB) bounds the logits alive at once. ValueError on shapes, dtypes, or k outside 1..V.
    """
    V = check_linear("teacher_topk", hidden_TD, head_VD, vocab_size, temperature)
    require(1 <= k <= V, f"teacher_topk: k is {k} of {V} classes; want 1 <= k <= V")
    return TopK(*_op(hidden_TD.detach(), head_VD.detach(), k, temperature, V, check_softcap("teacher_topk", softcap),
                     workspace_mb))
