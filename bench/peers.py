"""What is used today for the same losses: restated from the definition, or called if installed.

Every peer takes the arguments of our op and returns the same sum; tests/bench/test_bench.py
compares those that run on a CPU. Liger is called through its public functions; what is named
"chunked" is the common pattern of public trainers: split the rows, project, log-softmax, checkpoint
each piece so that the backward recomputes it.

Shapes: T tokens, V vocabulary, D student hidden, E teacher hidden, K top-k ids.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # rows


def _rows(*tensors: Tensor):
    return zip(*(t.split(CHUNK) for t in tensors))


def _kl_of_rows(x, w, xt, wt, beta: float | None) -> Tensor:
    logp, logq = F.linear(x, w).float().log_softmax(-1), F.linear(xt, wt).float().log_softmax(-1)
    if beta is None:  # forward KL
        return F.kl_div(logp, logq, reduction="sum", log_target=True)
    logm = torch.logaddexp(logq + torch.tensor(beta).log(), logp + torch.tensor(1 - beta).log())
    return beta * F.kl_div(logm, logq, reduction="sum", log_target=True) + (1 - beta) * F.kl_div(
        logm, logp, reduction="sum", log_target=True
    )


def chunked_kl(x_TD, w_VD, xt_TE, wt_VE, beta: float | None = None) -> Tensor:
    """Divergence chunk by chunk, checkpointed: TRL's generalised JSD before its own kernels."""
    return sum(
        checkpoint(_kl_of_rows, x, w_VD, xt, wt_VE, beta, use_reentrant=False)
        for x, xt in _rows(x_TD, xt_TE)
    )


def _nll_of_rows(x, w, y) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), y, reduction="sum")


def chunked_nll(x_TD, w_VD, target_T) -> Tensor:
    return sum(
        checkpoint(_nll_of_rows, x, w_VD, y, use_reentrant=False) for x, y in _rows(x_TD, target_T)
    )


def _topk_of_rows(x, w, ids, logq, tail) -> Tensor:
    logp = F.linear(x, w).float().log_softmax(-1)
    logp_k = logp.gather(1, ids.long())
    # how public trainers form the tail
    log_tail = torch.log1p(-logp_k.exp().sum(1).clamp(max=1 - 1e-7))
    return (logq.exp() * (logq - logp_k)).sum() + (tail.exp() * (tail - log_tail)).sum()


def chunked_topk_kl(x_TD, w_VD, ids_TK, logq_TK, tail_T) -> Tensor:
    return sum(
        checkpoint(_topk_of_rows, x, w_VD, *topk, use_reentrant=False)
        for x, *topk in _rows(x_TD, ids_TK, logq_TK, tail_T)
    )


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(fn, dynamic=False)


@cache
def liger() -> dict[str, Callable[..., Tensor]]:
    """Liger's ops by the name of ours, returning sums; empty without liger-kernel."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
        from liger_kernel.transformers import functional as liger_functional
    except ImportError:
        return {}
    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, chunk_size=CHUNK
    )

    # P = T + 1: it drops the last row, as of a sequence
    def selective(logits_PV: Tensor, target_T: Tensor) -> Tensor:
        return fused_selective_log_softmax(logits_PV[None], target_T[None], 1.0).sum()

    return {
        "linear_kl jsd": lambda x, w, xt, wt: (
            liger_functional.liger_fused_linear_jsd(x, w, xt, wt) * len(x)
        ),
        "linear_kl jsd chunked": lambda x, w, xt, wt: (
            chunked(x, w, xt, wt, torch.zeros(len(x), dtype=torch.long, device=x.device)) * len(x)
        ),
        "token_kl": lambda z, u: liger_functional.liger_kl_div(
            z.log_softmax(-1), u.log_softmax(-1), reduction="sum", log_target=True
        ),
        "linear_nll": lambda x, w, y: liger_functional.liger_fused_linear_cross_entropy(
            x, w, y, reduction="sum"
        ),
        "token_logprob": selective,
    }


@cache
def trl() -> dict[str, Callable[..., Tensor]]:
    """TRL's fused ops by the name of ours, returning sums; empty without TRL.

    1.16: cuBLAS on tiles of the vocabulary, Triton statistics, tiles made again in the backward.
    linear_kl takes its beta: 0 is forward KL, between 0 and 1 the generalised JSD.
    """
    try:
        from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        return {}
    return {
        "linear_kl": lambda x, w, xt, wt, beta: ChunkedDivergenceFunction.apply(
            x, w, None, xt, wt, None, beta
        )[0].sum(),
        "linear_logprob": lambda x, w, y: ChunkedLogProbFunction.apply(
            x, w, None, y, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )[0].sum(),
    }


def linear_cross_entropy() -> Callable[..., Tensor] | None:
    """torch's own fused head and cross-entropy with its chunking on, where this torch has it."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, y: F.linear_cross_entropy(x, w, y, reduction="sum", options=options)
