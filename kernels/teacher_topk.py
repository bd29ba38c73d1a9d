"""A teacher's log-probabilities of a few classes, and the exact log-mass of the rest.

    x[t]       = logits[t] / temperature, logits given or softcap(logit_scale (hidden[t] @ head.T +
               bias))
    logp[t, k] = x[t, ids[t, k]] - logsumexp(x[t])
    tail[t]    = log sum of softmax(x[t]) outside ids[t];  -inf at K = V

support says who chooses the ids of a row: the teacher (its k largest), the student (the k largest
of the student's logits) or both (union, each id once). Of equal logits the lowest id is taken.
Always sorted by falling logp, equal ones by rising id; a union's free places hold id -1 and logp
-inf at the end.

Kept logits are replaced by -inf and the logsumexp of what is left is the tail: exact down to a mass
of 1e-38, where log(1 - sum p) is lost at 1e-8. All of it holds at this temperature only.

Shapes: T tokens, K kept ids, D student hidden, E teacher hidden, V vocabulary, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import (
    Rows,
    as_autocast,
    check_bias,
    check_linear,
    check_logit_scale,
    check_rows,
    check_softcap,
    chunks,
    logits_ref,
    project,
    wide,
)
from ._parallel import VocabShard, all_sum, common_width, local_head, local_width, merge_sums
from ._select_rows import NO_ID, largest_of_all, sort_pairs, without_repeats
from ._triton import require

SUPPORTS = ("teacher", "student", "union")


class TopK(NamedTuple):
    ids: Tensor  # int32 [T, K], by falling logp; -1 is padding
    logp: Tensor  # [T, K]; -inf at padding
    tail: Tensor  # [T]


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
    """The definition, with the whole [T, V] sorted in memory. fp32 arithmetic, or fp64 when given
    fp64.
    """
    x_TV = (
        given_or_projected_ref(hidden_TE, head_VE, bias, logit_scale, softcap, vocab_size)
        / temperature
    )
    chosen_TV = torch.zeros_like(x_TV, dtype=torch.bool)
    if support != "student":
        chosen_TV.scatter_(1, x_TV.sort(dim=1, descending=True, stable=True).indices[:, :k], True)
    if support != "teacher":
        z_TV = given_or_projected_ref(
            student_hidden, student_head, student_bias, 1.0, None, vocab_size
        )
        chosen_TV.scatter_(1, z_TV.sort(dim=1, descending=True, stable=True).indices[:, :k], True)
    logp_TV = x_TV.log_softmax(1)
    tail_T = logp_TV.masked_fill(chosen_TV, -torch.inf).logsumexp(1)
    width = k if support != "union" else min(2 * k, x_TV.shape[1])
    order_TV = (
        logp_TV.masked_fill(~chosen_TV, -torch.inf)
        .sort(dim=1, descending=True, stable=True)
        .indices
    )
    ids_TK = (
        chosen_TV.float()
        .gather(1, order_TV)
        .sort(dim=1, descending=True, stable=True)
        .indices[:, :width]
    )
    ids_TK = order_TV.gather(1, ids_TK)
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


class Source(NamedTuple):
    """Where logits come from: hidden states and a head (this rank's slice of it), or given, without
    a head.
    """

    x: Tensor
    head_VE: Tensor | None
    bias_V: Tensor | None
    logit_scale: float
    softcap: float
    width: int  # columns in use

    def logits(self, c: Rows, temperature: float) -> Tensor:
        """Logits / temperature of a chunk, fp32 or fp64, ours to overwrite; one column of -inf if
        the slice has none.
        """
        if not self.width:
            return self.x.new_full((len(self.x[c]), 1), -torch.inf, dtype=wide(self.x.dtype))
        if self.head_VE is None:
            return (
                self.x[c][:, : self.width].to(wide(self.x.dtype), copy=True).mul_(1 / temperature)
            )
        bias_V = None if self.bias_V is None else self.bias_V[: self.width]
        logits_CV = project(
            self.x[c], self.head_VE[: self.width], self.softcap, bias_V, self.logit_scale
        )
        return logits_CV.mul_((1.0 if self.softcap else self.logit_scale) / temperature)


@torch.library.custom_op("reflux::teacher_topk", mutates_args=())
def _op(
    teacher: Tensor,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    student: Tensor | None,
    student_head: Tensor | None,
    student_bias: Tensor | None,
    rows_M: Tensor | None,
    k: int,
    support: str,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    vocab_start: int,
    group: str,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    T, dtype = len(teacher), wide(teacher.dtype)
    columns = teacher.shape[1] if teacher_head is None else len(teacher_head)
    width = local_width(columns, vocab_size, vocab_start)
    source = Source(teacher, teacher_head, teacher_bias, logit_scale, softcap, width)
    other = (
        None if student is None else Source(student, student_head, student_bias, 1.0, 0.0, width)
    )
    ids_TK = teacher.new_full((T, 2 * k if support == "union" else k), NO_ID, dtype=torch.int64)
    x_TK = teacher.new_zeros(ids_TK.shape, dtype=dtype)
    top_T, sum_T = (
        teacher.new_full((T,), -torch.inf, dtype=dtype),
        teacher.new_zeros(T, dtype=dtype),
    )

    # a function, so that its blocks are free before the next chunk's are made
    def step(c: Rows) -> None:
        x_CV = source.logits(c, temperature)
        choosers = {"teacher": [x_CV], "student": [], "union": [x_CV]}[support] + (
            [other.logits(c, 1.0)] if other else []
        )
        ids_CK = torch.cat(
            [largest_of_all(y_CV, k, vocab_start, width, group) for y_CV in choosers], 1
        )
        ids_CK = without_repeats(ids_CK) if support == "union" else ids_CK
        mine_CK = (ids_CK >= vocab_start) & (ids_CK < vocab_start + width)
        at_CK = torch.where(mine_CK, ids_CK - vocab_start, 0)
        ids_TK[c], x_TK[c] = ids_CK, torch.where(mine_CK, x_CV.gather(1, at_CK), 0.0)
        x_CV.scatter_reduce_(
            1, at_CK, torch.where(mine_CK, -torch.inf, torch.inf).to(dtype), "amin"
        )
        top_C = x_CV.amax(1)
        top_T[c], sum_T[c] = (
            top_C,
            x_CV.sub_(torch.where(top_C == -torch.inf, 0.0, top_C)[:, None]).exp_().sum(1),
        )

    for c in chunks(
        teacher, common_width(vocab_size, group), 4 if student is None else 5, workspace_mb, rows_M
    ):
        step(c)
    logp_TK, tail_T = _normalise(
        all_sum(x_TK, group).masked_fill(ids_TK == NO_ID, -torch.inf),
        *merge_sums(top_T, sum_T[None], group),
    )
    logp_TK, ids_TK = sort_pairs(logp_TK, ids_TK)
    left_out_T = ids_TK[:, 0] == NO_ID
    keep = min(ids_TK.shape[1], vocab_size)
    return (
        ids_TK[:, :keep].int().contiguous(),
        logp_TK[:, :keep].masked_fill(left_out_T[:, None], -torch.inf).contiguous(),
        tail_T.masked_fill(left_out_T, 0.0),
    )


def _normalise(x_TK: Tensor, top_T: Tensor, sum_1T: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, tail) from the kept values and the rest's max and sum. Relative to the row's maximum,
    or 1e4 costs 3 digits.
    """
    peak_T = torch.maximum(x_TK.amax(1), top_T)
    rest_T = sum_1T[0].log() + torch.where(top_T == -torch.inf, 0.0, top_T - peak_T)
    x_TK = x_TK - peak_T[:, None]
    lse_T = torch.logaddexp(x_TK.logsumexp(1), rest_T)
    return x_TK - lse_T[:, None], rest_T - lse_T


def _fake(
    teacher,
    teacher_head,
    teacher_bias,
    student,
    student_head,
    student_bias,
    rows_M,
    k,
    support,
    temperature,
    logit_scale,
    softcap,
    vocab_size,
    *rest,
):
    shape, dtype = (
        (len(teacher), min(2 * k if support == "union" else k, vocab_size)),
        wide(teacher.dtype),
    )
    return (
        teacher.new_empty(shape, dtype=torch.int32),
        teacher.new_empty(shape, dtype=dtype),
        teacher.new_empty(shape[0], dtype=dtype),
    )


_op.register_fake(_fake)


def check_source(
    op: str,
    hidden: Tensor,
    head: Tensor | None,
    bias: Tensor | None,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> tuple[tuple[Tensor | None, ...], int]:
    """((hidden, head, bias) or (logits, None, None) without gradients, vocabulary size)."""
    if head is None:
        require(
            hidden.ndim == 2 and hidden.is_floating_point() and bias is None,
            f"{op}: without a head, logits are {hidden.dtype} {list(hidden.shape)}, bias "
            f"{bias is not None}; want floating [T, V] and no bias: logits have it in them. "
            "Flatten batch and time first: logits.flatten(0, -2)",
        )
        require(
            shard is None or vocab_size is not None,
            f"{op}: a shard without vocab_size; want the whole vocabulary's size",
        )
        V = hidden.shape[1] if vocab_size is None else vocab_size
        require(
            V > 0 and (shard is not None or V <= hidden.shape[1]),
            f"{op}: vocab_size is {V} and logits have {hidden.shape[1]} columns; want 1 <= "
            "vocab_size <= columns",
        )
        return (hidden.detach(), None, None), V
    head, bias = (None if x is None else local_head(op, x, shard) for x in (head, bias))
    hidden, head, bias = as_autocast(hidden, head, bias)
    V = check_linear(op, hidden, head, vocab_size, 1.0, shard)
    check_bias(op, bias, head)
    return (hidden.detach(), head.detach(), None if bias is None else bias.detach()), V


def check_teacher(
    op: str,
    head: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[float, float, float]:
    """(temperature, logit_scale, softcap or 0)."""
    require(
        temperature > 0,
        f"{op}: temperature is {temperature}; want > 0. 0 means greedy: take the argmax",
    )
    require(
        head is not None or (logit_scale == 1 and softcap is None),
        f"{op}: logit_scale {logit_scale} and softcap {softcap} without a head; want neither: "
        "logits have them in them",
    )
    return temperature, check_logit_scale(op, logit_scale), check_softcap(op, softcap)


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
    workspace_mb: float = 1200,
) -> TopK:
    """(ids int32 [T, K], logp [T, K], tail [T]), fp32 (fp64 for fp64), in nats; no gradient. K = k,
    union: min(2 k, V).

    hidden [T, E] and head [V, E] share a floating dtype; with head None, hidden are logits [T, V].
    bias [V]. support: "teacher", "student" or "union"; the last two need student_hidden [T, D] and
    student_head [V, D] (or logits and None) and student_bias, if it has one; its scale and soft cap
    would change no order. rows: distinct row numbers int64 [M]; only these are computed, the others
    hold padding and a tail of 0 = log 1. vocab_size < V leaves padded classes out. shard: heads,
    biases and logits are this rank's slice, ids are those of the whole vocabulary and vocab_size is
    its size. workspace_mb (MiB) bounds the logits alive at once. ValueError on shapes, dtypes, or k
    outside 1..V.
    """
    op = "teacher_topk"
    require(support in SUPPORTS, f"{op}: support is {support!r}; want one of {', '.join(SUPPORTS)}")
    require(
        (student_hidden is None) == (support == "teacher"),
        f"{op}: support={support!r} {'with' if student_hidden is not None else 'without'} "
        "student_hidden; want it for "
        "'student' and 'union' only",
    )
    scales = check_teacher(op, head_VE, temperature, logit_scale, softcap)
    teacher, V = check_source(op, hidden_TE, head_VE, bias, vocab_size, shard)
    student = (None, None, None)
    if student_hidden is not None:
        student, student_V = check_source(
            f"{op} (student)", student_hidden, student_head, student_bias, vocab_size, shard
        )
        require(
            student_V == V and len(student[0]) == len(teacher[0]),
            f"{op}: the student has {len(student[0])} rows of {student_V} classes and the "
            f"teacher {len(teacher[0])} of {V}; "
            "want the same. If both heads pad one vocabulary, pass vocab_size",
        )
    require(1 <= k <= V, f"{op}: k is {k} of {V} classes; want 1 <= k <= V")
    return TopK(
        *_op(
            *teacher,
            *student,
            check_rows(op, rows, teacher[0]),
            k,
            support,
            *scales,
            V,
            shard.start if shard else 0,
            shard.group if shard else "",
            workspace_mb,
        )
    )
