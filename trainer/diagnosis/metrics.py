"""The three traps as numbers (docs/method.md, "Diagnose"): pure functions of hidden states,
log-probabilities and grades.

    tail noise               how much of a token KL, and of its gradient, lies outside the k classes
                             that matter most
    off-policy instability   what importance weights, positions and prefixes do to the same loss
    teacher-student gap      does the teacher prefer the student's wrong texts to its right ones?

Shapes: T tokens, C rows of a chunk, V vocabulary, D student hidden, E teacher hidden, K grid of
kept classes, N token types, M frequency bands, n tokens of one text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.tokenalign.class_losses import PartitionIndex
from reflux.tokenalign.linear_class_kl import linear_class_logprob
from reflux.trainer.losses import HeadInputs

K_GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHUNK_MIB = 256.0  # of one [C, V] block in float64; a dozen of them are alive


@dataclass(frozen=True, eq=False)
class KLProfile:
    """Token KL of every state and how it builds up over the classes, ranked by the distribution
    that weighs the sum.
    """

    k: tuple[int, ...]  # [K], the last one is V
    kl_T: Tensor  # full KL, nats
    raw_TK: Tensor  # A_k: the first k terms of the sum; not a divergence, may be negative
    # D_k: the first k terms and one bucket for the rest; 0 <= D_k <= kl, non-decreasing in k
    bucket_TK: Tensor
    gradient_tail_TK: Tensor  # sum of |dKL/dz| outside the first k / sum over all; 0 / 0 is 0
    type_TN: Tensor  # full KL by token type
    type_at_10_TN: Tensor  # A_10 by token type
    band_TM: Tensor  # full KL by frequency band
    band_at_10_TM: Tensor  # A_10 by frequency band

    def rows(self, rows: Any) -> "KLProfile":
        """The profile of some of the states."""
        return KLProfile(self.k, *(x[rows] for name, x in vars(self).items() if name != "k"))


def k_grid(vocab_size: int) -> tuple[int, ...]:
    return (*(k for k in K_GRID if k < vocab_size), vocab_size)


def kl_profile(
    student: HeadInputs,
    teacher: HeadInputs,
    mode: str,
    type_V: Tensor,
    num_types: int,
    band_V: Tensor | None = None,
    num_bands: int = 0,
    partition: PartitionIndex | None = None,
) -> KLProfile:
    """Profile of KL(q || p) (`forward`) or KL(p || q) (`reverse`), p the student, q the teacher, in
    float64.

    Rows of both outputs are the same states; vocabularies are equal, or `partition` takes both to the
    classes that are compared, V of them. The [T, V] logits exist chunk by chunk. type_V, band_V: of
    every class, one of num_types and of num_bands (without: none).
    """
    if mode not in ("forward", "reverse"):
        raise ValueError(f"kl_profile: mode is {mode!r}; want 'forward' or 'reverse'")
    V = _classes(student, teacher, partition)
    ks = k_grid(V)
    kinds = [(type_V, num_types)] + ([] if band_V is None else [(band_V, num_bands)])
    one_hot_VN = torch.cat(
        [torch.nn.functional.one_hot(kind_V[:V].long(), count) for kind_V, count in kinds], 1
    ).double()
    parts = [
        _profile_chunk(logp_CV, logq_CV, mode, ks, one_hot_VN)
        for logp_CV, logq_CV in _logprobs(student, teacher, partition)
    ]
    width = one_hot_VN.shape[1]
    empty = [
        torch.zeros(0, *shape, dtype=torch.float64)
        for shape in ((), (len(ks),), (len(ks),), (len(ks),), (width,), (width,))
    ]
    *curves, all_TN, first_TN = [torch.cat(c) for c in zip(*parts)] if parts else empty
    n = num_types
    return KLProfile(ks, *curves, all_TN[:, :n], first_TN[:, :n], all_TN[:, n:], first_TN[:, n:])


def _classes(student: HeadInputs, teacher: HeadInputs, partition: PartitionIndex | None) -> int:
    return (
        partition.student.num_classes if partition else min(student.vocab_size, teacher.vocab_size)
    )


def _logprobs(
    student: HeadInputs, teacher: HeadInputs, partition: PartitionIndex | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities of the classes, student's and teacher's, chunk by chunk."""
    if partition is None:
        V = _classes(student, teacher, None)
        for z_CV, u_CV in zip(chunked_logits(student, V), chunked_logits(teacher, V)):
            yield z_CV.log_softmax(1), u_CV.log_softmax(1)
        return
    ids = partition.student.num_ids, partition.teacher.num_ids
    rows = _rows_of_chunk(max(ids))
    for start in range(0, len(student.hidden_TD), rows):
        c = slice(start, start + rows)
        yield (
            linear_class_logprob(_in_float64(student, c, ids[0]), partition.student),
            linear_class_logprob(_in_float64(teacher, c, ids[1]), partition.teacher),
        )


def _in_float64(out: HeadInputs, rows: slice, V: int) -> HeadInputs:
    """Some rows, and the first V ids of the head."""
    return out._replace(
        hidden_TD=out.hidden_TD[rows].double(), head_VD=out.head_VD[:V].double(), vocab_size=V
    )


def _rows_of_chunk(V: int) -> int:
    return max(1, int(CHUNK_MIB * 2**20 / (8 * V)))


def chunked_logits(out: HeadInputs, V: int) -> Iterator[Tensor]:
    """Logits [C, V] of the first V ids in float64, chunk by chunk."""
    rows = _rows_of_chunk(V)
    for start in range(0, len(out.hidden_TD), rows):
        logits_CV = out.hidden_TD[start : start + rows].double() @ out.head_VD[:V].double().t()
        yield out.softcap * torch.tanh(logits_CV / out.softcap) if out.softcap else logits_CV


def _profile_chunk(
    logp_CV: Tensor, logq_CV: Tensor, mode: str, ks: Sequence[int], one_hot_VN: Tensor
) -> tuple[Tensor, ...]:
    weight_CV, other_CV = (logq_CV, logp_CV) if mode == "forward" else (logp_CV, logq_CV)
    term_CV = torch.where(weight_CV > -torch.inf, weight_CV.exp() * (weight_CV - other_CV), 0.0)
    kl_C = term_CV.sum(1)
    p_CV = logp_CV.exp()
    d_CV = (
        p_CV - logq_CV.exp()
        if mode == "forward"
        else torch.where(p_CV > 0, term_CV - p_CV * kl_C[:, None], 0.0)
    )
    order_CV = weight_CV.argsort(dim=1, descending=True, stable=True)
    at = torch.tensor(ks, device=logp_CV.device) - 1
    raw_CK = term_CV.gather(1, order_CV).cumsum(1)[:, at]
    bucket_CK = raw_CK + _bucket(weight_CV.gather(1, order_CV), other_CV.gather(1, order_CV), at)
    bucket_CK[:, -1] = kl_C
    size_CK = d_CV.abs().gather(1, order_CV).cumsum(1)[:, at]
    whole_C1 = size_CK[:, -1:]
    tail_CK = torch.where(whole_C1 > 0, 1 - size_CK / whole_C1.clamp(min=1e-300), 0.0).clamp(min=0)
    first_CV = torch.zeros_like(term_CV).scatter(1, order_CV[:, :10], 1.0)
    return kl_C, raw_CK, bucket_CK, tail_CK, term_CV @ one_hot_VN, (term_CV * first_CV) @ one_hot_VN


def _bucket(weight_CV: Tensor, other_CV: Tensor, at: Tensor) -> Tensor:
    """The tail's term, W log(W / O) with the masses outside the first k; from the far end, so that
    nothing cancels.
    """

    def mass_after(log_CV: Tensor) -> Tensor:
        from_end_CV = log_CV.flip(1).logcumsumexp(1).flip(1)
        return torch.cat([from_end_CV[:, 1:], torch.full_like(from_end_CV[:, :1], -torch.inf)], 1)[
            :, at
        ]

    w_CK, o_CK = mass_after(weight_CV), mass_after(other_CV)
    return torch.where(w_CK > -torch.inf, w_CK.exp() * (w_CK - o_CK), 0.0)


def keeps(curve_K: Sequence[float], k: Sequence[int], share: float) -> int:
    """The smallest k whose bucket curve holds `share` of the full KL (its last entry)."""
    return next(kept for kept, value in zip(k, curve_K) if value >= share * curve_K[-1] - 1e-12)


def tail_noise_index(
    all_N: np.ndarray, first_N: np.ndarray, frequency_N: np.ndarray, noisy: Sequence[int]
) -> float:
    """lift of the noisy types over the whole vocabulary / their lift in the first ten classes.

    lift = (share of the KL that the types carry) / (their frequency as tokens). Above 1: they
    matter more in the tail. NaN where the first ten classes carry nothing of them.
    """

    def lift(x_N: np.ndarray) -> float:
        return float(
            x_N[list(noisy)].sum() / x_N.sum() / max(frequency_N[list(noisy)].sum(), 1e-300)
        )

    head = lift(first_N)
    return lift(all_N) / head if head > 0 else float("nan")


def sparsity(kl_T: Sequence[float], share: float = 0.8) -> float:
    """The smallest fraction of tokens that carries `share` of the KL; NaN when there is none."""
    ranked = np.sort(np.asarray(kl_T, float))[::-1].cumsum()
    return (
        float((np.searchsorted(ranked, share * ranked[-1]) + 1) / len(ranked))
        if len(ranked) and ranked[-1] > 0
        else float("nan")
    )


def effective_samples(log_weight: Sequence[float]) -> float:
    """ESS / n = (sum w)^2 / (n sum w^2) of importance weights given as logs: 1 when all are equal,
    1/n when one rules.
    """
    x = np.asarray(log_weight, float)
    if not len(x) or not np.isfinite(x.max()):
        return float("nan")
    w = np.exp(x - x.max())
    return float(w.sum() ** 2 / (len(x) * (w**2).sum()))


def by_decile(value_n: Sequence[float], start_n: Sequence[int], n_bytes: int) -> np.ndarray:
    """[10] means of a per-token value over tenths of the text's bytes; NaN where a tenth holds no
    token's start.
    """
    tenth = np.minimum(10 * np.asarray(start_n, np.int64) // max(n_bytes, 1), 9)
    count = np.bincount(tenth, minlength=10)
    return np.divide(
        np.bincount(tenth, weights=np.asarray(value_n, float), minlength=10),
        count,
        out=np.full(10, np.nan),
        where=count > 0,
    )


def slope(decile: Sequence[float]) -> float:
    """Least-squares change from the first to the last tenth; NaN with fewer than two values."""
    y = np.asarray(decile, float)
    x = np.linspace(0, 1, len(y))
    known = np.isfinite(y)
    return float(np.polyfit(x[known], y[known], 1)[0]) if known.sum() > 1 else float("nan")


@dataclass(frozen=True)
class Graded:
    """One student text: right or wrong, and what both models give it. nats; `n_bytes` of the text,
    at least 1.
    """

    prompt: int
    right: bool
    teacher_logp: float
    student_logp: float
    n_bytes: int


@dataclass(frozen=True)
class Preference:
    """Does the teacher prefer wrong texts? Per prompt that has right and wrong ones
    (docs/method.md, "Wrong-trace preference").
    """

    # share of (wrong, right) pairs where the teacher scores the wrong one higher per byte; ties
    # half
    pair: dict[int, float]
    margin: dict[int, float]  # mean of wrong - mean of right, nats per byte
    # mean over wrong texts of (teacher - student), nats per byte; all prompts with a wrong text
    pull: dict[int, float]
    length_gap: float  # mean bytes of wrong / of right texts, over usable prompts; NaN without any
    matched_pair: dict[int, float]  # `pair` over pairs whose lengths differ by at most 20 %


def wrong_trace_preference(texts: Sequence[Graded]) -> Preference:
    """a(y) = log p_T(y) / bytes(y), compared inside each prompt."""
    by_prompt: dict[int, tuple[list[Graded], list[Graded]]] = {}
    for t in texts:
        by_prompt.setdefault(t.prompt, ([], []))[t.right].append(t)
    pull = {
        i: float(np.mean([(t.teacher_logp - t.student_logp) / t.n_bytes for t in wrong]))
        for i, (wrong, _) in by_prompt.items()
        if wrong
    }
    usable = {i: both for i, both in by_prompt.items() if all(both)}
    score = lambda t: t.teacher_logp / t.n_bytes
    pair, matched, margin = {}, {}, {}
    for i, (wrong, right) in usable.items():
        margin[i] = float(np.mean([score(t) for t in wrong]) - np.mean([score(t) for t in right]))
        pair[i] = _mean_preference(product(wrong, right), score)
        close = [
            (w, r)
            for w, r in product(wrong, right)
            if max(w.n_bytes, r.n_bytes) <= 1.2 * min(w.n_bytes, r.n_bytes)
        ]
        if close:
            matched[i] = _mean_preference(close, score)
    lengths = (
        [np.mean([t.n_bytes for both in usable.values() for t in both[k]]) for k in (0, 1)]
        if usable
        else [np.nan, 1.0]
    )
    return Preference(pair, margin, pull, float(lengths[0] / lengths[1]), matched)


def _mean_preference(pairs, score) -> float:
    return float(np.mean([np.sign(score(w) - score(r)) / 2 + 0.5 for w, r in pairs]))


@dataclass(frozen=True, eq=False)
class Overlap:
    """How two models' most likely classes meet, per state."""

    overlap_T: Tensor  # share of the teacher's top K that is also in the student's
    teachable_T: Tensor  # teacher mass inside the student's top K
    entropy_gap_T: Tensor  # H(teacher) - H(student), nats


def top_overlap(
    student: HeadInputs, teacher: HeadInputs, k: int, partition: PartitionIndex | None = None
) -> Overlap:
    k, rows = min(k, _classes(student, teacher, partition)), []
    for logp_CV, logq_CV in _logprobs(student, teacher, partition):
        own_CK, theirs_CK = logp_CV.topk(k, 1).indices, logq_CV.topk(k, 1).indices
        inside_CV = torch.zeros_like(logp_CV).scatter(1, own_CK, 1.0)
        entropy = lambda x: -torch.where(x > -torch.inf, x.exp() * x, 0.0).sum(1)
        rows.append(
            (
                inside_CV.gather(1, theirs_CK).mean(1),
                (inside_CV * logq_CV.exp()).sum(1),
                entropy(logq_CV) - entropy(logp_CV),
            )
        )
    if not rows:
        return Overlap(*(torch.zeros(0, dtype=torch.float64) for _ in range(3)))
    return Overlap(*(torch.cat(c) for c in zip(*rows)))


def off_nucleus(out: HeadInputs, target_T: Tensor, top_p: float = 0.999) -> Tensor:
    """bool [T]: does a sampler with top-p never draw the target? True if the classes before it hold
    top_p already.

    Classes are ranked by probability, equal ones by id; the likeliest is never outside. In float64,
    chunk by chunk.
    """
    id_V, found = (
        torch.arange(out.vocab_size, device=target_T.device),
        [torch.zeros(0, dtype=torch.bool, device=target_T.device)],
    )
    done = 0
    for logits_CV in chunked_logits(out, out.vocab_size):
        p_CV, target_C1 = logits_CV.softmax(1), target_T[done : done + len(logits_CV), None]
        done += len(logits_CV)
        own_C1 = p_CV.gather(1, target_C1)
        before_CV = (p_CV > own_C1) | ((p_CV == own_C1) & (id_V < target_C1))
        found.append((p_CV * before_CV).sum(1) >= top_p)
    return torch.cat(found)
