"""Distribution losses between two vocabularies, at positions where both models have consumed the
same bytes (`span_starts`).

p: student, q: teacher, both softmaxes at `temperature`; z: student logits. Every loss is one number
per position, in nats (ULD: in probability), differentiable in the student's logits only; sums and
weights are the caller's.

    class_kl   D(Q, P) between class masses P_c = sum_i W_ic p_i, Q_c = sum_t [class(t) = c] q_t
                   first_byte, common, prefix: W is one-hot (vocab_map.ClassMap)   projection: W is
                   sparse (projection.Projection)
               forward KL: dL/dz_i = p_i - sum_c W_ic p_i Q_c / P_c, for a class map p_i (1 - Q_c(i)
               / P_c(i))
    uld        sum_r |sort(p)_r - sort(q)_r|                                  dL/dz_i = p_i (s_i -
               sum_j p_j s_j), s the sign at i's rank
    hybrid     class_kl on `common` + Q_OTHER * uld inside OTHER

A class KL is a KL of coarsened distributions: never negative, 0 with zero gradient at equal masses,
at most the KL of any finer map. The partial KL over matched tokens, sum_C q log(q / p), is not
offered: it can be negative and pushes every unmatched token down by p_i Q_C whatever the teacher
wants.

Where they are biased. The models agree on *bytes* consumed, not on how: each is conditioned on its
own tokens so far. `first_byte` is exact given that, and looks one byte ahead. `common` and
`projection` compare tokens: a teacher with "unhappy" in its vocabulary has taken that mass away
from "un", a student without it has not, so two models of one text distribution are not at zero;
`prefix` undoes that where the longest common prefix is also the student's first token. Multi-digit
tokens of one side alone end in OTHER.

Cost: these take logits of S rows, S small; memory about 8 [S, M] buffers, M entries of the map (V
for a class map). `linear_rows` calls them chunk by chunk on hidden states and heads;
`reflux.kernels.bucket_kl` is the fused form of class_kl with class maps. On CUDA sums over classes
are atomics: two runs agree to rounding only, unless torch.use_deterministic_algorithms(True).

S: positions, V: student ids, W: teacher ids, N: classes, M: entries of a map, K: kept teacher ids.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflux.kernels._divergence import check_divergence, divergence_ref
from reflux.kernels.teacher_topk import TopK

from .projection import Projection
from .vocab_map import OUT, ClassMap


class ClassLogProb(NamedTuple):
    """A teacher by its class masses: what an offline teacher of `first_byte` or `prefix` stores,
    257 numbers instead of W.
    """

    logp_SN: Tensor  # natural logs, computed before any truncation, at the temperature of the loss


class Pool(NamedTuple):
    """One side of a map on a device: class c collects weight * p of its entries. Ids without an
    entry are not in the softmax.
    """

    id_M: Tensor  # int64
    class_M: Tensor  # int64
    log_weight_M: Tensor | None  # None: all weights are one
    num_ids: int  # V or W: logits must have as many columns
    num_classes: int


class Pools(NamedTuple):
    """Both sides of a map on a device."""

    student: Pool
    teacher: Pool
    teacher_class_W: Tensor  # int64; N where a kept teacher id stands for no class of its own
    # int64, the ids of OTHER on both sides; None unless the map is `common`
    other: tuple[Tensor, Tensor] | None
    kind: str  # first_byte, common, prefix or projection


def pools_of(built: ClassMap | Projection, device: torch.device | str = "cpu") -> Pools:
    """The tensors of a class map or a projection; make them once per device."""
    index = lambda x: torch.from_numpy(np.asarray(x, np.int64)).to(device)
    teacher = _one_hot(built.teacher_class, built.num_classes, index)
    own = np.where(built.teacher_class == OUT, built.num_classes, built.teacher_class)
    if isinstance(built, Projection):
        log_weight = torch.from_numpy(np.log(built.weight)).to(device)
        student = Pool(
            index(built.student_id),
            index(built.column),
            log_weight,
            built.student_rows,
            built.num_classes,
        )
        return Pools(student, teacher, index(own), None, "projection")
    student, other = _one_hot(built.student_class, built.num_classes, index), None
    if built.kind == "common":
        own[own == built.silent] = built.num_classes  # OTHER: a kept id of it goes to the rest
        other = tuple(
            index(np.flatnonzero(x == built.silent))
            for x in (built.student_class, built.teacher_class)
        )
    return Pools(student, teacher, index(own), other, built.kind)


def pool_logprob(logits_SV: Tensor, pool: Pool, *, temperature: float = 1.0) -> Tensor:
    """log P [S, N], fp32 (fp64 for fp64): the log of each class's mass under softmax(logits /
    temperature); -inf for no mass.

    Sums are taken in fp64: a class of mass 1e-60 keeps its gradient. Differentiable in the logits,
    once. A logit of -inf is a banned id. ValueError: logits that are not [S, V] of this map,
    temperature <= 0.
    """
    if logits_SV.ndim != 2 or logits_SV.shape[1] != pool.num_ids:
        raise ValueError(
            f"pool_logprob: logits are {list(logits_SV.shape)} for a map of {pool.num_ids} ids; "
            f"want [S, {pool.num_ids}]. Build the map with Vocabulary(rows = the head's rows), or "
            "slice the logits."
        )
    if not temperature > 0:
        raise ValueError(f"pool_logprob: temperature = {temperature}; want > 0.")
    return _PoolLogProb.apply(logits_SV, pool, 1 / temperature)


def class_kl(
    student_logits_SV: Tensor,
    teacher: Tensor | TopK | ClassLogProb,
    pools: Pools,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """D(Q, P) [S] of the class masses; D is one of the divergences of `kernels._divergence` (forward:
    KL(Q || P)).

    teacher: logits [S, W]; or class masses [S, N], stored; or its top-k ids with logp and tail, all
    at this temperature. Top-k keeps `common` exact: the classes are those of the kept ids, and REST
    (the tail, OTHER and all unkept classes) on both sides, so the value rises with k to that of the
    whole vocabulary. (Of a class with several teacher ids, such as a spelling that it has twice,
    the kept ids count.) For `first_byte` and `prefix` a kept list only bounds a class from below:
    ValueError, store ClassLogProb instead. inf where a class has mass on the wrong side alone, as
    in the KL itself.
    """
    check_divergence("class_kl", divergence, beta)
    logp_SN = pool_logprob(student_logits_SV, pools.student, temperature=temperature)
    if isinstance(teacher, TopK):
        return divergence_ref(*_kept_and_rest(logp_SN, teacher, pools), divergence, beta)
    with torch.no_grad():
        logq_SN = (
            teacher.logp_SN
            if isinstance(teacher, ClassLogProb)
            else pool_logprob(teacher, pools.teacher, temperature=temperature)
        )
    if logq_SN.shape != logp_SN.shape:
        raise ValueError(
            f"class_kl: the teacher's class masses are {list(logq_SN.shape)} and the student's "
            f"{list(logp_SN.shape)}; want the same rows and the same map on both sides."
        )
    return divergence_ref(logp_SN, logq_SN.to(logp_SN.dtype), divergence, beta)


def map_topk(teacher: TopK, student_id_W: Tensor) -> TopK:
    """A teacher's kept ids in the student's: ids int32 [S, K] (-1: not common), logp as it was,
    tail with what is not common added.

    student_id_W: `vocab_map.student_id_of`, int [W]. What comes out is exact for common pairs +
    REST, and it is what `kernels.linear_topk_kl(..., tail="bucket")` takes: one student GEMM
    forward, no [S, N]. A second id of one spelling (a byte token beside its piece) and every stop
    id but the first belong to REST on both sides.
    """
    known_SK = (teacher.ids >= 0) & (teacher.ids < len(student_id_W)) & (teacher.logp > -torch.inf)
    ids_SK = student_id_W.to(torch.int32)[torch.where(known_SK, teacher.ids, 0).long()]
    ids_SK = torch.where(known_SK, ids_SK, -1)
    lost_SK = teacher.logp.masked_fill(ids_SK >= 0, -torch.inf)
    tail_S = _logsumexp(torch.cat([lost_SK, teacher.tail[:, None].to(lost_SK.dtype)], 1))
    return TopK(ids_SK, teacher.logp, tail_S)


def uld(student_logits_SV: Tensor, teacher: Tensor | TopK, *, temperature: float = 1.0) -> Tensor:
    """Universal logit distillation (arXiv 2402.12030): L1 distance [S] of the sorted probabilities,
    the shorter side padded with 0.

    teacher: logits [S, W], or its top-k with the tail: then ranks beyond K are one bucket on both
    sides, a lower bound that is exact when K covers both vocabularies (K = 1024 is usual). Between
    0 and 2. Blind to identity: a student that swaps "yes" and "no" loses nothing. A baseline. Cost:
    a sort of [S, V] and of [S, W]. The gradient is zero at ties of p and q; where two logits of the
    student tie, their order is arbitrary.
    """
    prob_SV = (student_logits_SV.to(_wide(student_logits_SV)) / temperature).softmax(1)
    if not isinstance(teacher, TopK):
        with torch.no_grad():
            prob_SW = (teacher.to(prob_SV.dtype) / temperature).softmax(1)
        return _sorted_l1(prob_SV, prob_SW)
    k = min(teacher.ids.shape[1], prob_SV.shape[1])
    top_SK = prob_SV.topk(k, 1).values
    kept_SK = teacher.logp.detach().to(prob_SV.dtype).exp().sort(1, descending=True).values
    rest_S = (prob_SV.sum(1) - top_SK.sum(1)).clamp(min=0) - (
        kept_SK[:, k:].sum(1) + teacher.tail.detach().exp()
    )
    return (top_SK - kept_SK[:, :k]).abs().sum(1) + rest_S.abs()


def hybrid(
    student_logits_SV: Tensor,
    teacher_logits_SW: Tensor,
    pools: Pools,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """class_kl on `common` plus Q_OTHER times `uld` of the two distributions renormalised inside
    OTHER; [S].

    GOLD's idea (matched tokens by KL, the rest by ULD; TRL's GOLDTrainer) with both parts proper:
    each is never negative and 0 at agreement, where the published matched part is a partial KL.
    Q_OTHER is the teacher's, a constant. OTHER holds control ids, too. Cost: class_kl and a sort of
    the uncommon logits of both sides. ValueError: pools of another map than `common`.
    """
    if pools.other is None:
        raise ValueError(
            f"hybrid: pools of {pools.kind!r}; want those of vocab_map.common, the map with an "
            "OTHER."
        )
    with torch.no_grad():
        logq_SN = pool_logprob(teacher_logits_SW, pools.teacher, temperature=temperature)
    matched_S = class_kl(
        student_logits_SV,
        ClassLogProb(logq_SN),
        pools,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
    )
    mine_O, theirs_O = pools.other
    mine_SO, theirs_SO = (
        _inside(student_logits_SV, mine_O, temperature),
        _inside(teacher_logits_SW.detach(), theirs_O, temperature),
    )
    return matched_S + logq_SN[:, -1].exp() * _sorted_l1(mine_SO, theirs_SO.to(mine_SO.dtype))


class _PoolLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_SV, pool, inv_temp):
        mass_SN = _sum_entries(_entries(logits_SV, pool, inv_temp), pool)
        # rows of W sum to one, so this is the softmax's normaliser
        logp_SN = mass_SN - _logsumexp(mass_SN)[:, None]
        ctx.save_for_backward(logits_SV, mass_SN, logp_SN)
        ctx.pool, ctx.inv_temp = pool, inv_temp
        return logp_SN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SN):
        logits_SV, mass_SN, logp_SN = ctx.saved_tensors
        grad_SN = grad_SN - logp_SN.exp() * grad_SN.sum(1, keepdim=True)
        share_SM = _entries(logits_SV, ctx.pool, ctx.inv_temp)
        mass_SN = torch.where(mass_SN == -torch.inf, 0.0, mass_SN)
        # the entry's share of its class
        share_SM = share_SM.sub_(mass_SN.index_select(1, ctx.pool.class_M)).exp_()
        share_SM *= grad_SN.index_select(1, ctx.pool.class_M)
        dlogits_SV = torch.zeros_like(logits_SV, dtype=share_SM.dtype).index_add_(
            1, ctx.pool.id_M, share_SM
        )
        return (dlogits_SV * ctx.inv_temp).to(logits_SV.dtype), None, None


def _entries(logits_SV: Tensor, pool: Pool, inv_temp: float) -> Tensor:
    """[S, M] unnormalised log-mass of every entry."""
    # 5 times faster than [:, id_M] on a CPU
    x_SM = logits_SV.index_select(1, pool.id_M).to(_wide(logits_SV)) * inv_temp
    return x_SM if pool.log_weight_M is None else x_SM.add_(pool.log_weight_M)


def _sum_entries(x_SM: Tensor, pool: Pool) -> Tensor:
    """[S, N] logsumexp of the entries of each class. fp64 in between: its exponents reach 700 nats
    below the row's largest entry, so that no class needs a maximum of its own.
    """
    top_S1 = x_SM.amax(1, keepdim=True)
    top_S1 = torch.where(top_S1 == -torch.inf, 0.0, top_S1)
    sum_SN = x_SM.new_zeros(len(x_SM), pool.num_classes, dtype=torch.float64)
    sum_SN.index_add_(1, pool.class_M, (x_SM - top_S1).double().exp_())
    return sum_SN.log_().to(x_SM.dtype).add_(top_S1)


def _kept_and_rest(logp_SN: Tensor, teacher: TopK, pools: Pools) -> tuple[Tensor, Tensor]:
    """Student and teacher [S, N + 1]: the classes of the kept ids (the others -inf), and REST."""
    if pools.kind in ("first_byte", "prefix"):
        raise ValueError(
            f"class_kl: a top-k teacher only bounds the classes of {pools.kind!r} from below; "
            "store its class masses before truncation (pool_logprob or kernels.bucket_kl) and "
            "pass ClassLogProb, or use `common`."
        )
    num = logp_SN.shape[1]
    known_SK = (
        (teacher.ids >= 0)
        & (teacher.ids < len(pools.teacher_class_W))
        & (teacher.logp > -torch.inf)
    )
    class_SK = pools.teacher_class_W[torch.where(known_SK, teacher.ids, 0).long()].masked_fill(
        ~known_SK, num
    )
    with torch.no_grad():
        # column N collects what has no class of its own, and the tail
        x_SK = torch.cat(
            [
                teacher.logp.masked_fill(~known_SK, -torch.inf),
                teacher.tail[:, None].to(teacher.logp.dtype),
            ],
            1,
        )
        class_SK = torch.cat([class_SK, class_SK.new_full((len(x_SK), 1), num)], 1)
        top_S1 = x_SK.amax(1, keepdim=True)
        top_S1 = torch.where(top_S1 == -torch.inf, 0.0, top_S1)
        sum_SN = x_SK.new_zeros(len(x_SK), num + 1).scatter_add_(1, class_SK, (x_SK - top_S1).exp())
        logq_SN = (sum_SN.log() + top_S1).to(logp_SN.dtype)
        kept_SN = torch.zeros_like(logq_SN, dtype=torch.bool).scatter_(1, class_SK, True)[:, :num]
    rest_S1 = _logsumexp(logp_SN.masked_fill(kept_SN, -torch.inf))[:, None]
    return torch.cat([logp_SN.masked_fill(~kept_SN, -torch.inf), rest_S1], 1), logq_SN


def _sorted_l1(prob_SV: Tensor, prob_SW: Tensor) -> Tensor:
    ranks = max(prob_SV.shape[1], prob_SW.shape[1])
    one, two = (
        torch.nn.functional.pad(x.sort(1, descending=True).values, (0, ranks - x.shape[1]))
        for x in (prob_SV, prob_SW)
    )
    return (one - two).abs().sum(1)


def _inside(logits: Tensor, ids_O: Tensor, temperature: float) -> Tensor:
    """softmax over some ids; uniform where all of them are banned (the weight of the row is 0
    there).
    """
    x_SO = logits[:, ids_O].to(_wide(logits)) / temperature
    return torch.where((x_SO == -torch.inf).all(1, keepdim=True), 0.0, x_SO).softmax(1)


def _one_hot(class_V: np.ndarray, num_classes: int, index: Callable[[np.ndarray], Tensor]) -> Pool:
    ids = np.flatnonzero(class_V != OUT)
    return Pool(index(ids), index(class_V[ids]), None, len(class_V), num_classes)


def _logsumexp(x_SN: Tensor) -> Tensor:
    """Over the last axis; -inf with a zero gradient, not NaN, where all are -inf."""
    top_S1 = x_SN.amax(-1, keepdim=True).detach()
    top_S1 = torch.where(top_S1 == -torch.inf, 0.0, top_S1)
    sum_S = (x_SN - top_S1).exp().sum(-1)
    return torch.where(
        sum_S == 0, -torch.inf, torch.where(sum_S == 0, 1.0, sum_S).log() + top_S1[..., 0]
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
