"""Distribution losses between two vocabularies, at positions where both models have read the same
bytes (`span_starts`).

p: student, q: teacher, both softmaxes at `temperature`; z: student logits. Every loss is one number
per position, in nats (ULD: in probability), differentiable in the student's logits only; sums and
weights are the caller's.

    class_kl   D(Q, P) of class masses P_c = sum_i W_ic p_i, Q_c = sum_t [class(t) = c] q_t
                   first_byte, common, prefix: W is one-hot (vocab_map.Partition)
                   projection: W is sparse (projection.Projection)
               forward KL: dL/dz_i = p_i - sum_c W_ic p_i Q_c / P_c
                   for one-hot W that is p_i (1 - Q_c(i) / P_c(i))
    uld        sum_r |sort(p)_r - sort(q)_r|
               dL/dz_i = p_i (s_i - sum_j p_j s_j), s the sign at i's rank
    hybrid     class_kl on `common` + Q_tail * uld inside the tail bucket

A class KL is a KL of coarsened distributions: never negative, 0 with zero gradient at equal masses,
at most the KL of any finer partition. The partial KL over matched tokens, sum_C q log(q / p), is
not offered: it can be negative and pushes every unmatched token down by p_i Q_C whatever the
teacher wants.

Where they are biased. The models agree on the *bytes* read, not on the tokens: each is conditioned
on its own tokens so far, and that one ended tells what does not follow. So only `forward` on the
teacher's texts, with the likelihood of what lies inside spans, leaves a student that is right
alone; on its own texts it learns that what the teacher merges never occurs (docs/tokenalign.md,
"Fixed points"). `first_byte` is exact given the tokens, and looks one byte ahead. `common` and
`projection` compare tokens: a teacher with "unhappy" in its vocabulary has taken that mass away
from "un", a student without it has not, so two models of one text distribution are not at zero;
`prefix` undoes that where the longest common prefix is also the student's first token. Multi-digit
tokens of one side alone end in the tail bucket.

Cost: about 8 [S, M] buffers, M entries of the index (V for a partition), so these take logits of
few rows. `linear_rows` calls them chunk by chunk on hidden states and heads; `linear_class_kl`
takes the fused kernels for partitions. On CUDA sums over classes are atomics: two runs agree to
rounding only, unless torch.use_deterministic_algorithms(True).

S: positions, V: student ids, W: teacher ids, N: classes, M: entries of an index, K: teacher top-k,
O: ids of the tail bucket.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflux.kernels._divergence import check_divergence, divergence_ref
from reflux.kernels.class_logprob import ClassMap, class_map
from reflux.kernels.teacher_topk import TopK

from .projection import Projection
from .vocab_map import OUT, Partition


class ClassLogProb(NamedTuple):
    """A teacher by its class masses, N numbers instead of W: to store an offline teacher."""

    logp_SN: Tensor  # nats, computed before any truncation, at the temperature of the loss


class ClassIndex(NamedTuple):
    """One side of a partition on a device: class c collects weight * p of its entries.

    Ids without an entry are not in the softmax.
    """

    id_M: Tensor  # int64
    class_M: Tensor  # int64
    log_weight_M: Tensor | None  # None: all weights are one
    num_ids: int  # V or W: logits must have as many columns
    num_classes: int
    kernel_classes: ClassMap | None  # the same for reflux.kernels; None where weights are not one


class PartitionIndex(NamedTuple):
    """Both sides of a partition, or of a projection, on a device."""

    student: ClassIndex
    teacher: ClassIndex
    teacher_class_W: Tensor  # int64; N where a teacher id of the top k has no class of its own
    tail_ids: tuple[Tensor, Tensor] | None  # int64, of the tail bucket; None unless `common`
    kind: str  # first_byte, common, prefix or projection


def partition_index(
    built: Partition | Projection, device: torch.device | str = "cpu"
) -> PartitionIndex:
    """The tensors of a partition or a projection; make them once per device."""

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(x, np.int64)).to(device)

    def one_hot(class_V: np.ndarray) -> ClassIndex:
        ids, num = np.flatnonzero(class_V != OUT), built.num_classes
        kernel_classes = class_map(tensor(class_V), num)
        return ClassIndex(
            tensor(ids), tensor(class_V[ids]), None, len(class_V), num, kernel_classes
        )

    teacher = one_hot(built.teacher_class)
    own_W = np.where(built.teacher_class == OUT, built.num_classes, built.teacher_class)
    if isinstance(built, Projection):
        student = ClassIndex(
            tensor(built.student_id),
            tensor(built.column),
            torch.from_numpy(np.log(built.weight)).to(device),
            built.student_rows,
            built.num_classes,
            None,
        )
        return PartitionIndex(student, teacher, tensor(own_W), None, "projection")
    tail_ids = None
    if built.kind == "common":
        tail = built.control_class
        own_W[own_W == tail] = built.num_classes  # no class of its own: counted with the tail
        tail_ids = (
            tensor(np.flatnonzero(built.student_class == tail)),
            tensor(np.flatnonzero(built.teacher_class == tail)),
        )
    student = one_hot(built.student_class)
    return PartitionIndex(student, teacher, tensor(own_W), tail_ids, built.kind)


def class_logprob_of_logits(
    logits_SV: Tensor, index: ClassIndex, *, temperature: float = 1.0
) -> Tensor:
    """log P [S, N], fp32 (fp64 for fp64): the log of each class's mass; -inf for no mass.

    P is of softmax(logits / temperature). Sums are taken in fp64: a class of mass 1e-60 keeps its
    gradient. Differentiable in the logits, once. A logit of -inf is a banned id. ValueError: logits
    that are not [S, V] of this index, temperature <= 0. Of a head: `kernels.class_logprob`.
    """
    if logits_SV.ndim != 2 or logits_SV.shape[1] != index.num_ids:
        raise ValueError(
            f"class_logprob_of_logits: logits are {list(logits_SV.shape)} for a partition of "
            f"{index.num_ids} ids; want [S, {index.num_ids}]. Build it with Vocabulary(rows = the "
            "head's rows), or slice the logits."
        )
    if not temperature > 0:
        raise ValueError(f"class_logprob_of_logits: temperature = {temperature}; want > 0.")
    return _ClassLogProb.apply(logits_SV, index, 1 / temperature)


def class_kl(
    student_logits_SV: Tensor,
    teacher: Tensor | TopK | ClassLogProb,
    partition: PartitionIndex,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """D(Q, P) [S] of the class masses; D of `kernels._divergence` (forward: KL(Q || P)).

    teacher, at this temperature: logits [S, W]; or stored class masses [S, N]; or its top-k ids
    with logp and tail. Top-k keeps `common` exact for the coarser distribution: the classes of the
    top-k ids, and one tail bucket on both sides for the tail and all other classes. The value rises
    with k to that of the whole vocabulary. (Of a class with several teacher ids, such as a spelling
    that it has twice, the ids in the top k count.) For `first_byte` and `prefix` a top-k list only
    bounds a class from below: ValueError, store ClassLogProb instead. inf where a class has mass on
    the wrong side alone, as in the KL itself.
    """
    check_divergence("class_kl", divergence, beta)
    logp_SN = class_logprob_of_logits(student_logits_SV, partition.student, temperature=temperature)
    if isinstance(teacher, TopK):
        logp_SN, logq_SN = _topk_and_tail(logp_SN, teacher, partition)
        return divergence_ref(logp_SN, logq_SN, divergence, beta)
    with torch.no_grad():
        logq_SN = (
            teacher.logp_SN
            if isinstance(teacher, ClassLogProb)
            else class_logprob_of_logits(teacher, partition.teacher, temperature=temperature)
        )
    if logq_SN.shape != logp_SN.shape:
        raise ValueError(
            f"class_kl: the teacher's class masses are {list(logq_SN.shape)} and the student's "
            f"{list(logp_SN.shape)}; want the same rows and the same partition on both sides."
        )
    return divergence_ref(logp_SN, logq_SN.to(logp_SN.dtype), divergence, beta)


def map_topk(teacher: TopK, student_id_W: Tensor) -> TopK:
    """A teacher's top-k ids in the student's: ids int32 [S, K] (-1: not common), logp as it was,
    tail with the mass of what is not common added.

    student_id_W: `vocab_map.student_id_of`, int [W]. The result is exact for common pairs and one
    tail bucket, and it is what `kernels.linear_topk_kl(..., tail="bucket")` takes: one student GEMM
    forward, no [S, N]. A second id of one spelling (a byte token beside its piece) and every stop
    id but the first belong to the tail bucket on both sides.
    """
    known_SK = (teacher.ids >= 0) & (teacher.ids < len(student_id_W)) & (teacher.logp > -torch.inf)
    ids_SK = student_id_W.to(torch.int32)[torch.where(known_SK, teacher.ids, 0).long()]
    ids_SK = torch.where(known_SK, ids_SK, -1)
    lost_SK = teacher.logp.masked_fill(ids_SK >= 0, -torch.inf)
    tail_S = _logsumexp(torch.cat([lost_SK, teacher.tail[:, None].to(lost_SK.dtype)], 1))
    return TopK(ids_SK, teacher.logp, tail_S)


def uld(student_logits_SV: Tensor, teacher: Tensor | TopK, *, temperature: float = 1.0) -> Tensor:
    """Universal logit distillation (arXiv 2402.12030): L1 distance [S] of the sorted probabilities,
    the shorter side padded with 0. Between 0 and 2.

    teacher: logits [S, W], or its top-k with the tail: then ranks beyond K are one bucket on both
    sides, a lower bound that is exact when K covers both vocabularies (K = 1024 is usual). Blind to
    identity: a student that swaps "yes" and "no" loses nothing. A baseline. Cost: a sort of [S, V]
    and of [S, W]. The gradient is zero at ties of p and q; where two logits of the student tie,
    their order is arbitrary.
    """
    prob_SV = (student_logits_SV.to(_wide(student_logits_SV)) / temperature).softmax(1)
    if not isinstance(teacher, TopK):
        with torch.no_grad():
            prob_SW = (teacher.to(prob_SV.dtype) / temperature).softmax(1)
        return _sorted_l1(prob_SV, prob_SW)
    k = min(teacher.ids.shape[1], prob_SV.shape[1])
    top_SK = prob_SV.topk(k, 1).values
    teacher_SK = teacher.logp.detach().to(prob_SV.dtype).exp().sort(1, descending=True).values
    student_tail_S = (prob_SV.sum(1) - top_SK.sum(1)).clamp(min=0)
    teacher_tail_S = teacher_SK[:, k:].sum(1) + teacher.tail.detach().exp()
    return (top_SK - teacher_SK[:, :k]).abs().sum(1) + (student_tail_S - teacher_tail_S).abs()


def hybrid(
    student_logits_SV: Tensor,
    teacher_logits_SW: Tensor,
    partition: PartitionIndex,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """class_kl on `common` plus Q_tail times `uld` of the two distributions renormalised inside the
    tail bucket; [S].

    The idea of GOLD (matched tokens by KL, all others by ULD; TRL's GOLDTrainer) with both parts
    proper: each is never negative and 0 at agreement, where the published matched part is a partial
    KL. Q_tail is the teacher's, a constant. The tail bucket holds control ids, too. Cost: class_kl
    and a sort of the uncommon logits of both sides. ValueError: another partition than `common`.
    """
    if partition.tail_ids is None:
        raise ValueError(
            f"hybrid: a partition of kind {partition.kind!r}; want vocab_map.common, the one with "
            "a tail bucket."
        )
    with torch.no_grad():
        logq_SN = class_logprob_of_logits(
            teacher_logits_SW, partition.teacher, temperature=temperature
        )
    matched_S = class_kl(
        student_logits_SV,
        ClassLogProb(logq_SN),
        partition,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
    )
    student_SO = _inside(student_logits_SV, partition.tail_ids[0], temperature)
    teacher_SO = _inside(teacher_logits_SW.detach(), partition.tail_ids[1], temperature)
    return matched_S + logq_SN[:, -1].exp() * _sorted_l1(
        student_SO, teacher_SO.to(student_SO.dtype)
    )


class _ClassLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_SV, index, inv_temp):
        mass_SN = _sum_entries(_entries(logits_SV, index, inv_temp), index)
        # rows of W sum to one, so this is the softmax's normaliser
        logp_SN = mass_SN - _logsumexp(mass_SN)[:, None]
        ctx.save_for_backward(logits_SV, mass_SN, logp_SN)
        ctx.index, ctx.inv_temp = index, inv_temp
        return logp_SN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SN):
        logits_SV, mass_SN, logp_SN = ctx.saved_tensors
        grad_SN = grad_SN - logp_SN.exp() * grad_SN.sum(1, keepdim=True)
        x_SM = _entries(logits_SV, ctx.index, ctx.inv_temp)
        mass_SN = torch.where(mass_SN == -torch.inf, 0.0, mass_SN)
        # the entry's fraction of its class, times the gradient of the class
        x_SM = x_SM.sub_(mass_SN.index_select(1, ctx.index.class_M)).exp_()
        x_SM *= grad_SN.index_select(1, ctx.index.class_M)
        dlogits_SV = torch.zeros_like(logits_SV, dtype=x_SM.dtype)
        dlogits_SV.index_add_(1, ctx.index.id_M, x_SM)
        return (dlogits_SV * ctx.inv_temp).to(logits_SV.dtype), None, None


def _entries(logits_SV: Tensor, index: ClassIndex, inv_temp: float) -> Tensor:
    """[S, M] unnormalised log-mass of every entry."""
    # 5 times faster than [:, id_M] on a CPU
    x_SM = logits_SV.index_select(1, index.id_M).to(_wide(logits_SV)) * inv_temp
    return x_SM if index.log_weight_M is None else x_SM.add_(index.log_weight_M)


def _sum_entries(x_SM: Tensor, index: ClassIndex) -> Tensor:
    """[S, N] logsumexp of the entries of each class.

    fp64 in between: its exponents reach 700 nats below the row's largest entry, so that no class
    needs a maximum of its own.
    """
    top_S1 = x_SM.amax(1, keepdim=True)
    top_S1 = torch.where(top_S1 == -torch.inf, 0.0, top_S1)
    sum_SN = x_SM.new_zeros(len(x_SM), index.num_classes, dtype=torch.float64)
    sum_SN.index_add_(1, index.class_M, (x_SM - top_S1).double().exp_())
    return sum_SN.log_().to(x_SM.dtype).add_(top_S1)


def _topk_and_tail(
    logp_SN: Tensor, teacher: TopK, partition: PartitionIndex
) -> tuple[Tensor, Tensor]:
    """Student and teacher [S, N + 1]: the classes of top-k ids, others -inf; the tail bucket."""
    if partition.kind in ("first_byte", "prefix"):
        raise ValueError(
            f"class_kl: a top-k teacher only bounds the classes of {partition.kind!r} from below; "
            "store its class masses before truncation (class_logprob_of_logits or "
            "kernels.class_logprob) and pass ClassLogProb, or use `common`."
        )
    num, class_W = logp_SN.shape[1], partition.teacher_class_W
    known_SK = (teacher.ids >= 0) & (teacher.ids < len(class_W)) & (teacher.logp > -torch.inf)
    ids_SK = torch.where(known_SK, teacher.ids, 0).long()
    class_SK = class_W[ids_SK].masked_fill(~known_SK, num)
    with torch.no_grad():
        # column N collects the tail, and what has no class of its own
        logp_SK = teacher.logp.masked_fill(~known_SK, -torch.inf)
        x_SK = torch.cat([logp_SK, teacher.tail[:, None].to(logp_SK.dtype)], 1)
        class_SK = torch.cat([class_SK, class_SK.new_full((len(x_SK), 1), num)], 1)
        top_S1 = x_SK.amax(1, keepdim=True)
        top_S1 = torch.where(top_S1 == -torch.inf, 0.0, top_S1)
        sum_SN = x_SK.new_zeros(len(x_SK), num + 1).scatter_add_(1, class_SK, (x_SK - top_S1).exp())
        logq_SN = (sum_SN.log() + top_S1).to(logp_SN.dtype)
        topk_SN = torch.zeros_like(logq_SN, dtype=torch.bool).scatter_(1, class_SK, True)[:, :num]
    tail_S1 = _logsumexp(logp_SN.masked_fill(topk_SN, -torch.inf))[:, None]
    return torch.cat([logp_SN.masked_fill(~topk_SN, -torch.inf), tail_S1], 1), logq_SN


def _sorted_l1(prob_SV: Tensor, prob_SW: Tensor) -> Tensor:
    ranks = max(prob_SV.shape[1], prob_SW.shape[1])
    one, two = (
        torch.nn.functional.pad(x.sort(1, descending=True).values, (0, ranks - x.shape[1]))
        for x in (prob_SV, prob_SW)
    )
    return (one - two).abs().sum(1)


def _inside(logits: Tensor, ids_O: Tensor, temperature: float) -> Tensor:
    """softmax over some ids [S, O].

    Uniform where all of them are banned; the weight of the row is 0 there.
    """
    x_SO = logits[:, ids_O].to(_wide(logits)) / temperature
    return torch.where((x_SO == -torch.inf).all(1, keepdim=True), 0.0, x_SO).softmax(1)


def _logsumexp(x_SN: Tensor) -> Tensor:
    """Over the last axis; -inf with a zero gradient, not NaN, where all are -inf."""
    top_S1 = x_SN.amax(-1, keepdim=True).detach()
    top_S1 = torch.where(top_S1 == -torch.inf, 0.0, top_S1)
    sum_S = (x_SN - top_S1).exp().sum(-1)
    log_sum_S = torch.where(sum_S == 0, 1.0, sum_S).log() + top_S1[..., 0]
    return torch.where(sum_S == 0, -torch.inf, log_sum_S)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
