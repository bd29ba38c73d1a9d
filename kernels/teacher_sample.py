"""A sparse, unbiased sample of a teacher: tokens drawn from it, with their fractions of the draws.

    ids      n independent draws, with replacement, from softmax(x[t]), x as in teacher_topk; each
             id once
    logp     log(times drawn / n), so that E exp(logp) = softmax(x[t]) for every token of the
             vocabulary
    tail     -inf: the drawn tokens stand for all of them

For tail="sampled" of the top-k losses (sparse logit sampling, arXiv:2503.16870): the cross-entropy
against it has the expected gradient of the full forward KL, which the k likeliest tokens have not.
Temperature is that of the draws.

Draws invert the distribution function: in blocks of 128 tokens, then inside the block that was hit,
both summed in fp64. fp32 sums of 150,000 tokens are 6e-8 apart at 1, more than many a token holds.
The uniform numbers are made for all rows at once, so chunks and slices of the vocabulary draw the
same tokens.

Shapes: T tokens, N draws, E teacher hidden, V vocabulary, C rows of a chunk, B blocks of L tokens,
R ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ._chunks import WORKSPACE_MB, Rows, check_rows, check_temperature, chunks, wide
from ._parallel import VocabShard, all_max, all_sum, common_width, process_group, slice_of
from ._select_rows import NO_ID, all_gather, sort_pairs
from .teacher_topk import TopK, TopKSource, checked_source, given_or_projected_ref

BLOCK = 128


def teacher_sample_ref(
    hidden_TE: Tensor,
    head_VE: Tensor | None,
    n: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TopK:
    """The definition, with the whole [T, V] of probabilities and counts in memory."""
    x_TV = given_or_projected_ref(hidden_TE, head_VE, bias, logit_scale, softcap, vocab_size)
    x_TV = x_TV / temperature
    cdf_TV = x_TV.double().softmax(1).cumsum(1)
    uniform_TN = _uniform(x_TV, n, generator) if uniform is None else uniform
    ids_TN = torch.searchsorted(cdf_TV, uniform_TN * cdf_TV[:, -1:], right=True)
    ids_TN = ids_TN.clamp(max=x_TV.shape[1] - 1)
    ones_TN = torch.ones_like(ids_TN, dtype=x_TV.dtype)
    count_TV = torch.zeros_like(x_TV).scatter_add_(1, ids_TN, ones_TN)
    logp_TV, ids_TV = (count_TV / n).log().sort(dim=1, descending=True, stable=True)
    logp_TN, ids_TN = logp_TV[:, :n], ids_TV[:, :n].int()
    return TopK(
        ids_TN.masked_fill(logp_TN == -torch.inf, NO_ID),
        logp_TN,
        torch.full_like(logp_TN[:, 0], -torch.inf),
    )


def _draw(weight_CV: Tensor, uniform_CN: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(columns [C, N] of this slice, is the draw in it?), drawn by the weights of all slices."""
    C, V = weight_CV.shape
    weight_CBL = torch.nn.functional.pad(weight_CV, (0, -V % BLOCK)).view(C, -1, BLOCK)
    ends_CB = weight_CBL.sum(2, dtype=torch.float64).cumsum(1)
    ends_CR = all_gather(ends_CB[:, -1:], group).cumsum(1) if group else ends_CB[:, -1:]
    rank = dist.get_rank(process_group(group)) if group else 0
    start_C1 = ends_CR[:, rank - 1 : rank] if rank else torch.zeros_like(ends_CR[:, :1])
    # below the end, whatever the product rounds to
    at_CN = uniform_CN.clamp(max=1 - 2**-52) * ends_CR[:, -1:]
    mine_CN = (at_CN >= start_C1) & (at_CN < ends_CR[:, rank : rank + 1])
    at_CN = at_CN - start_C1
    block_CN = _first_beyond(ends_CB[:, None], at_CN)
    before_CN = torch.where(block_CN > 0, ends_CB.gather(1, (block_CN - 1).clamp(min=0)), 0.0)
    inside_CNL = (
        weight_CBL[torch.arange(C, device=block_CN.device)[:, None], block_CN].double().cumsum(2)
    )
    return block_CN * BLOCK + _first_beyond(inside_CNL, at_CN - before_CN), mine_CN


def _first_beyond(ends_CNL: Tensor, at_CN: Tensor) -> Tensor:
    """Index of the first end > at; if rounding left none, that of the last positive weight."""
    last_CN = (ends_CNL < ends_CNL[..., -1:]).sum(2)
    if ends_CNL.shape[1] == 1:
        return torch.minimum(torch.searchsorted(ends_CNL[:, 0], at_CN, right=True), last_CN)
    return torch.minimum((ends_CNL <= at_CN[..., None]).sum(2), last_CN)


@torch.library.custom_op("reflux::teacher_sample", mutates_args=())
def _op(
    teacher: Tensor,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    uniform_TN: Tensor,
    rows_M: Tensor | None,
    temperature: float,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
) -> tuple[Tensor, Tensor]:
    """ids int32 [T, K] and logp [T, K], K = min(N, V)."""
    source = TopKSource(teacher, teacher_head, teacher_bias, logit_scale, softcap)
    width = source.width(vocab_size, vocab_start)
    ids_TN = torch.full_like(uniform_TN, NO_ID, dtype=torch.int64)

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        x_CV = source.logits(c, temperature, width)
        top_C1 = all_max(x_CV.amax(1, keepdim=True), group)
        column_CN, mine_CN = _draw(x_CV.sub_(top_C1).exp_(), uniform_TN[c], group)
        ids_TN[c] = all_sum(torch.where(mine_CN, column_CN + vocab_start, 0), group)

    V, N = common_width(vocab_size, group), uniform_TN.shape[1]
    # hit blocks: fp32, fp64, their sums
    for c in chunks(teacher, V, 3 + 6 * BLOCK * N / V, workspace_mb, rows_M):
        step(c)
    logp_TN, ids_TN = _merge_repeats(ids_TN, wide(teacher.dtype))
    K = min(N, vocab_size)
    return ids_TN[:, :K].int().contiguous(), logp_TN[:, :K].contiguous()


def _merge_repeats(ids_TN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log of the fraction of each id, ids), each once, in the order of `sort_pairs`."""
    ids_TN = ids_TN.sort(1).values
    new_TN = torch.ones_like(ids_TN)
    new_TN[:, 1:] = ids_TN[:, 1:] != ids_TN[:, :-1]
    run_TN = new_TN.cumsum(1) - 1
    ones_TN = torch.ones_like(ids_TN, dtype=dtype)
    count_TN = torch.zeros_like(ones_TN).scatter_add_(1, run_TN, ones_TN)
    once_TN = torch.full_like(ids_TN, NO_ID).scatter_(1, run_TN, ids_TN)
    logp_TN = (count_TN / ids_TN.shape[1]).log().masked_fill_(once_TN == NO_ID, -torch.inf)
    return sort_pairs(logp_TN, once_TN)


def _uniform(x_TD: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(len(x_TD), n, dtype=torch.float64, device=x_TD.device, generator=generator)


def _fake(teacher, *inputs):
    uniform_TN, _, _, vocab_size = inputs[4:8]
    shape, dtype = (len(teacher), min(uniform_TN.shape[1], vocab_size)), wide(teacher.dtype)
    return teacher.new_empty(shape, dtype=torch.int32), teacher.new_empty(shape, dtype=dtype)


_op.register_fake(_fake)


def teacher_sample(
    hidden_TE: Tensor,
    head_VE: Tensor | None,
    n: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> TopK:
    """(ids int32 [T, min(n, V)], logp like ids, tail [T] of -inf), fp32 (fp64 for fp64), in nats.

    No gradient. hidden [T, E] and head [V, E] share a floating dtype; with head None, hidden are
    logits [T, V]. Sorted by falling logp, equal ones by rising id; unused entries hold id -1 and
    logp -inf. generator: on the device of hidden; with shard, all ranks need the same state.
    uniform: fp64 [T, n] in [0, 1) in its place, e.g. of counters: no draw depends on how rows are
    batched. rows, bias, vocab_size, shard and the rest as in teacher_topk; left-out rows are all
    padding. ValueError on shapes, dtypes, or n < 1.
    """
    op, tensors = "teacher_sample", (hidden_TE, head_VE, bias, logit_scale, softcap)
    check_temperature(op, temperature)
    teacher, V = checked_source(op, *tensors, vocab_size, shard)
    if not (n >= 1):
        raise ValueError(
            f"{op}: n is {n}; want at least 1 draw a row, 12 to 64 as in arXiv:2503.16870"
        )
    if uniform is None:
        uniform = _uniform(teacher.x, n, generator)
    elif (uniform.dtype, tuple(uniform.shape)) != (torch.float64, (len(teacher.x), n)):
        raise ValueError(
            f"{op}: uniform is {uniform.dtype} {list(uniform.shape)}; want torch.float64 "
            f"{[len(teacher.x), n]}, numbers in [0, 1)"
        )
    ids_TN, logp_TN = _op(
        *teacher,
        uniform,
        check_rows(op, rows, teacher.x),
        temperature,
        V,
        *slice_of(shard),
        workspace_mb,
    )
    return TopK(ids_TN, logp_TN, logp_TN.new_full((len(logp_TN),), -torch.inf))
