"""A teacher's log-probabilities of a few tokens, and the exact log-mass of all others: the tail.

    x[t]       = logits[t] / temperature, logits given or those of hidden and head as in linear_kl
    logp[t, k] = x[t, ids[t, k]] - logsumexp(x[t])
    tail[t]    = log sum of softmax(x[t]) outside ids[t];  -inf at K = V

support says who chooses the ids of a row: the teacher (its k largest), the student (the k largest
of the student's logits) or both (union, each id once). Of equal logits the lowest id is taken.
Always sorted by falling logp, equal ones by rising id; a union's unused entries hold id -1 and
logp -inf at the end.

The logits of the ids are replaced by -inf and the logsumexp of what is left is the tail: exact down
to a mass of 1e-38, where log(1 - sum p) is lost at 1e-8. All of it holds at this temperature only.

Shapes: T tokens, K top-k ids, D student hidden, E teacher hidden, V vocabulary, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Rows,
    check_rows,
    check_temperature,
    chunks,
    logits_ref,
    project,
    wide,
)
from ._head import checked_head
from ._parallel import VocabShard, all_sum, common_width, local_width, merge_sums, slice_of
from ._select_rows import NO_ID, largest_of_all, sort_pairs, without_repeats

SUPPORTS = ("teacher", "student", "union")
# float32 log-probabilities say no less of a tail: those of a peaked position sum to 1 or more
LEAST_TAIL = 2**-23


class TopK(NamedTuple):
    ids: Tensor  # int32 [T, K], by falling logp; -1 is padding
    logp: Tensor  # [T, K]; -inf at padding
    tail: Tensor  # [T]


def tail_of_rounded(logp_TK: Tensor) -> Tensor:
    """log(1 - sum over k of p) [T] of rounded log-probabilities, where the logits are not at hand;
    fp32, or fp64 for fp64, summed in fp64. log(LEAST_TAIL) where that is less: a teacher without a
    tail would make reverse KL infinite. At K = V the losses do not read it.
    """
    mass_T = logp_TK.double().exp().sum(1)
    return torch.log1p(-mass_T.clamp(max=1 - LEAST_TAIL)).to(wide(logp_TK.dtype))


def teacher_topk_ref(
    hidden_TE: Tensor,
    head_VE: Tensor | None,
    k: int,
    *,
    support: str = "teacher",
    student_hidden: Tensor | None = None,
    student_head: Tensor | None = None,
    student_bias: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TopK:
    """The definition, with the whole [T, V] sorted in memory. fp32 arithmetic, or fp64 for fp64."""
    x_TV = given_or_projected_ref(hidden_TE, head_VE, bias, logit_scale, softcap, vocab_size)
    x_TV = x_TV / temperature
    chosen_TV = torch.zeros_like(x_TV, dtype=torch.bool)
    if support != "student":
        chosen_TV.scatter_(1, x_TV.sort(dim=1, descending=True, stable=True).indices[:, :k], True)
    if support != "teacher" and student_hidden is not None:
        z_TV = given_or_projected_ref(
            student_hidden, student_head, student_bias, 1.0, None, vocab_size
        )
        chosen_TV.scatter_(1, z_TV.sort(dim=1, descending=True, stable=True).indices[:, :k], True)
    logp_TV = x_TV.log_softmax(1)
    tail_T = logp_TV.masked_fill(chosen_TV, -torch.inf).logsumexp(1)
    width = k if support != "union" else min(2 * k, x_TV.shape[1])
    # by falling logp, then the chosen ones first
    order_TV = logp_TV.masked_fill(~chosen_TV, -torch.inf).sort(
        dim=1, descending=True, stable=True
    )[1]
    chosen_first_TV = (
        chosen_TV.float().gather(1, order_TV).sort(dim=1, descending=True, stable=True)[1]
    )
    ids_TK = order_TV.gather(1, chosen_first_TV[:, :width])
    padding_TK = ~chosen_TV.gather(1, ids_TK)
    return TopK(
        ids_TK.masked_fill(padding_TK, NO_ID).int(),
        logp_TV.gather(1, ids_TK).masked_fill(padding_TK, -torch.inf),
        tail_T,
    )


def given_or_projected_ref(
    x: Tensor,
    head_VE: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
) -> Tensor:
    """logits_ref of hidden states, or the logits that x already is where there is no head."""
    if head_VE is None:
        return x[:, :vocab_size].to(wide(x.dtype))
    return logits_ref(x, head_VE, bias, logit_scale, softcap, vocab_size)


class TopKSource(NamedTuple):
    """Where logits come from: hidden states and a head, or x itself where there is no head."""

    x: Tensor
    head_VE: Tensor | None
    bias_V: Tensor | None
    logit_scale: float
    softcap: float

    def width(self, vocab_size: int, start: int) -> int:
        """How many columns of this rank's slice are real tokens."""
        columns = self.x.shape[1] if self.head_VE is None else len(self.head_VE)
        return local_width(columns, vocab_size, start)

    def logits(self, c: Rows, temperature: float, width: int) -> Tensor:
        """Logits / temperature of a chunk, fp32 or fp64, ours to overwrite; -inf at width 0."""
        dtype, bias_V = wide(self.x.dtype), self.bias_V
        if not width:
            return self.x.new_full((len(self.x[c]), 1), -torch.inf, dtype=dtype)
        if self.head_VE is None:
            return self.x[c][:, :width].to(dtype, copy=True).mul_(1 / temperature)
        bias_V = None if bias_V is None else bias_V[:width]
        logits_CV = project(self.x[c], self.head_VE[:width], self.softcap, bias_V, self.logit_scale)
        return logits_CV.mul_((1.0 if self.softcap else self.logit_scale) / temperature)


@torch.library.custom_op("reflux::teacher_topk", mutates_args=())
def _op(
    teacher: Tensor,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    student: Tensor | None,
    student_head: Tensor | None,
    student_bias: Tensor | None,
    rows_M: Tensor | None,
    k: int,
    support: str,
    temperature: float,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids int32 [T, K], logp [T, K], tail [T]."""
    T, dtype = teacher.shape[0], wide(teacher.dtype)
    source = TopKSource(teacher, teacher_head, teacher_bias, logit_scale, softcap)
    other = None if student is None else TopKSource(student, student_head, student_bias, 1.0, 0.0)
    width = source.width(vocab_size, vocab_start)
    ids_TK = teacher.new_full((T, 2 * k if support == "union" else k), NO_ID, dtype=torch.int64)
    x_TK = teacher.new_zeros(ids_TK.shape, dtype=dtype)
    top_T = teacher.new_full((T,), -torch.inf, dtype=dtype)
    sum_T = teacher.new_zeros(T, dtype=dtype)

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        x_CV = source.logits(c, temperature, width)
        choosers = [] if support == "student" else [x_CV]
        choosers += [] if other is None else [other.logits(c, 1.0, width)]
        ids_CK = torch.cat(
            [largest_of_all(y_CV, k, vocab_start, width, group) for y_CV in choosers], 1
        )
        ids_TK[c] = without_repeats(ids_CK) if support == "union" else ids_CK
        x_TK[c], top_T[c], sum_T[c] = _lift_(x_CV, ids_TK[c], vocab_start, width)

    columns, buffers = common_width(vocab_size, group), 4 if student is None else 5
    for c in chunks(teacher, columns, buffers, workspace_mb, rows_M):
        step(c)
    x_TK = all_sum(x_TK, group).masked_fill(ids_TK == NO_ID, -torch.inf)
    logp_TK, tail_T = _normalise(x_TK, *merge_sums(top_T, sum_T[None], group))
    logp_TK, ids_TK = sort_pairs(logp_TK, ids_TK)
    left_out_T = ids_TK[:, 0] == NO_ID
    K = min(ids_TK.shape[1], vocab_size)
    return (
        ids_TK[:, :K].int().contiguous(),
        logp_TK[:, :K].masked_fill(left_out_T[:, None], -torch.inf).contiguous(),
        tail_T.masked_fill(left_out_T, 0.0),
    )


def _lift_(x_CV: Tensor, ids_CK: Tensor, start: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values of ids [C, K], 0 where another slice has them; max and sum [C] of all others).

    Overwrites x, this slice's columns. The sum is of e^(x - max).
    """
    mine_CK = (ids_CK >= start) & (ids_CK < start + width)
    column_CK = torch.where(mine_CK, ids_CK - start, 0)
    x_CK = torch.where(mine_CK, x_CV.gather(1, column_CK), 0.0)
    knocked_out_CK = torch.where(mine_CK, -torch.inf, torch.inf).to(x_CV.dtype)
    x_CV.scatter_reduce_(1, column_CK, knocked_out_CK, "amin")
    top_C = x_CV.amax(1)
    finite_C1 = torch.where(top_C == -torch.inf, 0.0, top_C)[:, None]
    return x_CK, top_C, x_CV.sub_(finite_C1).exp_().sum(1)


def _normalise(x_TK: Tensor, top_T: Tensor, sum_1T: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, tail) from the top-k values and the tail's max and sum.

    Relative to the row's maximum, or logits of 1e4 cost 3 digits.
    """
    peak_T = torch.maximum(x_TK.amax(1), top_T)
    tail_T = sum_1T[0].log() + torch.where(top_T == -torch.inf, 0.0, top_T - peak_T)
    x_TK = x_TK - peak_T[:, None]
    lse_T = torch.logaddexp(x_TK.logsumexp(1), tail_T)
    return x_TK - lse_T[:, None], tail_T - lse_T


def _fake(teacher, *inputs):
    k, support, _, vocab_size = inputs[8:12]
    shape = teacher.shape[0], min(2 * k if support == "union" else k, vocab_size)
    dtype = wide(teacher.dtype)
    return (
        teacher.new_empty(shape, dtype=torch.int32),
        teacher.new_empty(shape, dtype=dtype),
        teacher.new_empty(shape[0], dtype=dtype),
    )


_op.register_fake(_fake)


def checked_source(
    op: str,
    hidden: Tensor,
    head: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> tuple[TopKSource, int]:
    """(hidden, head and bias, or logits, without gradients; size of the whole vocabulary)."""
    if head is not None:
        side = hidden, head, bias, logit_scale, softcap
        checked, V = checked_head(op, *side, vocab_size, shard)
        return TopKSource(*checked.detach()), V
    if not (hidden.ndim == 2 and hidden.is_floating_point() and bias is None):
        raise ValueError(
            f"{op}: without a head, logits are {hidden.dtype} {list(hidden.shape)}, bias "
            f"{bias is not None}; want floating [T, V] and no bias: logits have it in them. "
            "Flatten batch and time first: logits.flatten(0, -2)"
        )
    if not (logit_scale == 1 and softcap is None):
        raise ValueError(
            f"{op}: logit_scale {logit_scale} and softcap {softcap} without a head; want neither: "
            "logits have them in them"
        )
    if not (shard is None or vocab_size is not None):
        raise ValueError(f"{op}: a shard without vocab_size; want the whole vocabulary's size")
    V = hidden.shape[1] if vocab_size is None else vocab_size
    if not (V > 0 and (shard is not None or V <= hidden.shape[1])):
        raise ValueError(
            f"{op}: vocab_size is {V} and logits have {hidden.shape[1]} columns; want 1 <= "
            "vocab_size <= columns"
        )
    return TopKSource(hidden.detach(), None, None, 1.0, 0.0), V


def teacher_topk(
    hidden_TE: Tensor,
    head_VE: Tensor | None,
    k: int,
    *,
    support: str = "teacher",
    student_hidden: Tensor | None = None,
    student_head: Tensor | None = None,
    student_bias: Tensor | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> TopK:
    """(ids int32 [T, K], logp [T, K], tail [T]), fp32 (fp64 for fp64), in nats; no gradient.

    K = k, union: min(2 k, V). hidden [T, E] and head [V, E] share a floating dtype; with head None,
    hidden are logits [T, V]. bias [V]. support: "teacher", "student" or "union"; the last two need
    student_hidden [T, D] and student_head [V, D] (or logits and None) and student_bias, if it has
    one; its scale and soft cap would change no order. rows: distinct row numbers int64 [M]; only
    these are computed, the others hold padding and a tail of 0 = log 1. vocab_size < V leaves
    padded columns out. shard: heads, biases and logits are this rank's slice, ids are those of the
    whole vocabulary and vocab_size is its size. workspace_mb (MiB) bounds the logits alive at once.
    ValueError on shapes, dtypes, or k outside 1..V.
    """
    op, cut = "teacher_topk", (vocab_size, shard)
    if support not in SUPPORTS:
        raise ValueError(f"{op}: support is {support!r}; want one of {', '.join(SUPPORTS)}")
    if (student_hidden is None) != (support == "teacher"):
        raise ValueError(
            f"{op}: support={support!r} {'with' if student_hidden is not None else 'without'} "
            "student_hidden; want it for 'student' and 'union' only"
        )
    check_temperature(op, temperature)
    tensors = hidden_TE, head_VE, bias, logit_scale, softcap
    teacher, V = checked_source(op, *tensors, *cut)
    student: tuple[Tensor | None, ...] = (None, None, None)
    if student_hidden is not None:
        tensors = student_hidden, student_head, student_bias, 1.0, None
        other, student_V = checked_source(f"{op} (student)", *tensors, *cut)
        if (student_V, other.x.shape[0]) != (V, teacher.x.shape[0]):
            raise ValueError(
                f"{op}: the student has {len(other.x)} rows of {student_V} classes and the teacher "
                f"{len(teacher.x)} of {V}; want the same. If both heads pad one vocabulary, pass "
                "vocab_size"
            )
        student = other[:3]
    if not (1 <= k <= V):
        raise ValueError(f"{op}: k is {k} of {V} classes; want 1 <= k <= V")
    rows_M = check_rows(op, rows, teacher.x)
    where = *slice_of(shard), workspace_mb
    return TopK(*_op(*teacher, *student, rows_M, k, support, temperature, V, *where))
