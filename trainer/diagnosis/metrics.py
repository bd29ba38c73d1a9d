"""Tail noise, off-policy instability and the teacher-student gap as numbers (docs/method.md,
"Diagnose"): pure functions of hidden states, log-probabilities and grades.

    tail noise               how much of a token KL, and of its gradient, lies outside the k classes
                             that weigh most
    off-policy instability   what importance weights, positions and prefixes do to the same loss
    teacher-student gap      does the teacher prefer the student's wrong texts to its correct ones?

p is the student, q the teacher. Shapes: T tokens, C rows of a chunk, V vocabulary, or the 257
symbols of a byte position, D student hidden, E teacher hidden, K grid of top-k sizes, N token
types, M frequency bands, n tokens of one text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from reflux.trainer.losses import HeadInputs

Divergence = Literal["forward", "reverse"]  # KL(teacher || student), KL(student || teacher)
DIVERGENCES: tuple[Divergence, ...] = ("forward", "reverse")
K_GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# log p and log q of the same positions, [C, V] at a time, float64
LogProbs = Iterator[tuple[Tensor, Tensor]]
CHUNK_MIB = 256.0  # of one [C, V] block in float64; a dozen of them are alive


@dataclass(frozen=True, eq=False)
class KLProfile:
    """Token KL at every position and how it builds up over the classes, ranked by the distribution
    that weighs the sum. float64, nats.
    """

    k: tuple[int, ...]  # [K], the last one is V
    kl_T: Tensor  # full KL
    raw_TK: Tensor  # A_k: the first k terms of the sum; not a divergence, may be negative
    # D_k: the first k terms and the tail bucket; 0 <= D_k <= kl, non-decreasing in k
    bucket_TK: Tensor
    gradient_tail_TK: Tensor  # sum of |dKL/dz| outside the first k / sum over all; 0 / 0 is 0
    type_TN: Tensor  # full KL by token type
    type_at_10_TN: Tensor  # A_10 by token type
    band_TM: Tensor  # full KL by frequency band
    band_at_10_TM: Tensor  # A_10 by frequency band

    def map(self, function: Callable[[Tensor], Tensor]) -> "KLProfile":
        """The profile with `function` of every tensor."""
        return KLProfile(
            self.k,
            function(self.kl_T),
            function(self.raw_TK),
            function(self.bucket_TK),
            function(self.gradient_tail_TK),
            function(self.type_TN),
            function(self.type_at_10_TN),
            function(self.band_TM),
            function(self.band_at_10_TM),
        )

    def rows(self, rows: np.ndarray) -> "KLProfile":
        """The profile at some of the positions."""
        return self.map(lambda x: x[rows])

    def cpu(self) -> "KLProfile":
        return self.map(Tensor.cpu)


def k_grid(vocab_size: int) -> tuple[int, ...]:
    return (*(k for k in K_GRID if k < vocab_size), vocab_size)


def kl_profile(
    student: HeadInputs,
    teacher: HeadInputs,
    divergence: str,
    type_V: Tensor,
    num_types: int,
    band_V: Tensor | None = None,
    num_bands: int = 0,
) -> KLProfile:
    """`profile_of` two heads of one vocabulary, V ids. The [T, V] logits exist chunk by chunk."""
    V, pairs = _num_ids(student, teacher), _logprobs(student, teacher)
    return profile_of(pairs, V, divergence, type_V, num_types, band_V, num_bands)


def profile_of(
    pairs: LogProbs,
    V: int,
    divergence: str,
    type_V: Tensor,
    num_types: int,
    band_V: Tensor | None = None,
    num_bands: int = 0,
) -> KLProfile:
    """Profile of KL(q || p) (`forward`) or KL(p || q) (`reverse`), in float64.

    pairs: log p and log q, [C, V] of the same positions, chunk by chunk. type_V, band_V: int [V],
    of every class, below num_types and num_bands. ValueError: another divergence.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"kl_profile: divergence is {divergence!r}; want 'forward' or 'reverse'")
    k_K = k_grid(V)
    one_hots = [one_hot(type_V[:V].long(), num_types)]
    if band_V is not None:
        one_hots.append(one_hot(band_V[:V].long(), num_bands))
    group_VG = torch.cat(one_hots, 1).double()  # G = N + M
    chunks = [
        _profile_chunk(logp_CV, logq_CV, divergence, k_K, group_VG) for logp_CV, logq_CV in pairs
    ]
    if not chunks:
        shapes = ((), (len(k_K),), (len(k_K),), (len(k_K),), group_VG.shape[1:], group_VG.shape[1:])
        chunks = [tuple(torch.zeros(0, *shape, dtype=torch.float64) for shape in shapes)]
    kl_T, raw_TK, bucket_TK, tail_TK, all_TG, first_TG = (torch.cat(c) for c in zip(*chunks))
    n = num_types
    groups = all_TG[:, :n], first_TG[:, :n], all_TG[:, n:], first_TG[:, n:]
    return KLProfile(k_K, kl_T, raw_TK, bucket_TK, tail_TK, *groups)


def _num_ids(student: HeadInputs, teacher: HeadInputs) -> int:
    return min(student.vocab_size, teacher.vocab_size)


def _logprobs(student: HeadInputs, teacher: HeadInputs) -> LogProbs:
    """Log-probabilities of the ids, student's and teacher's, chunk by chunk."""
    V = _num_ids(student, teacher)
    for z_CV, u_CV in zip(chunked_logits(student, V), chunked_logits(teacher, V)):
        yield z_CV.log_softmax(1), u_CV.log_softmax(1)


def in_chunks(logp_TV: Tensor, logq_TV: Tensor) -> LogProbs:
    """The same of whole tensors, in float64."""
    rows = _rows_of_chunk(logp_TV.shape[1])
    for start in range(0, len(logp_TV), rows):
        yield logp_TV[start : start + rows].double(), logq_TV[start : start + rows].double()


def _rows_of_chunk(V: int) -> int:
    return max(1, int(CHUNK_MIB * 2**20 / (8 * V)))


def chunked_logits(out: HeadInputs, V: int) -> Iterator[Tensor]:
    """Logits [C, V] of the first V ids in float64, chunk by chunk."""
    rows = _rows_of_chunk(V)
    for start in range(0, len(out.hidden_TD), rows):
        logits_CV = out.hidden_TD[start : start + rows].double() @ out.head_VD[:V].double().t()
        yield out.softcap * torch.tanh(logits_CV / out.softcap) if out.softcap else logits_CV


def _profile_chunk(
    logp_CV: Tensor, logq_CV: Tensor, divergence: str, k_K: Sequence[int], group_VG: Tensor
) -> tuple[Tensor, ...]:
    """kl [C]; raw, bucket and gradient tail [C, K]; full KL and A_10 by group [C, G]."""
    forward = divergence == "forward"
    weight_CV, other_CV = (logq_CV, logp_CV) if forward else (logp_CV, logq_CV)
    term_CV = torch.where(weight_CV > -torch.inf, weight_CV.exp() * (weight_CV - other_CV), 0.0)
    kl_C = term_CV.sum(1)
    p_CV = logp_CV.exp()
    if forward:
        gradient_CV = p_CV - logq_CV.exp()
    else:
        gradient_CV = torch.where(p_CV > 0, term_CV - p_CV * kl_C[:, None], 0.0)
    order_CV = weight_CV.argsort(dim=1, descending=True, stable=True)
    last_K = torch.tensor(k_K, device=logp_CV.device) - 1
    raw_CK = term_CV.gather(1, order_CV).cumsum(1)[:, last_K]
    tail_CK = _tail_term(weight_CV.gather(1, order_CV), other_CV.gather(1, order_CV), last_K)
    bucket_CK = raw_CK + tail_CK
    bucket_CK[:, -1] = kl_C
    size_CK = gradient_CV.abs().gather(1, order_CV).cumsum(1)[:, last_K]
    whole_C1 = size_CK[:, -1:]
    outside_CK = torch.where(whole_C1 > 0, 1 - size_CK / whole_C1.clamp(min=1e-300), 0.0)
    first_CV = torch.zeros_like(term_CV).scatter(1, order_CV[:, :10], 1.0)
    groups = term_CV @ group_VG, (term_CV * first_CV) @ group_VG
    return kl_C, raw_CK, bucket_CK, outside_CK.clamp(min=0), *groups


def _tail_term(weight_CV: Tensor, other_CV: Tensor, last_K: Tensor) -> Tensor:
    """The tail bucket's term [C, K], W log(W / O) with the masses outside the first k; summed from
    the far end, so that nothing cancels.
    """

    def mass_after(log_CV: Tensor) -> Tensor:
        from_end_CV = log_CV.flip(1).logcumsumexp(1).flip(1)
        none_C1 = torch.full_like(from_end_CV[:, :1], -torch.inf)
        return torch.cat([from_end_CV[:, 1:], none_C1], 1)[:, last_K]

    w_CK, o_CK = mass_after(weight_CV), mass_after(other_CV)
    return torch.where(w_CK > -torch.inf, w_CK.exp() * (w_CK - o_CK), 0.0)


def smallest_k(curve_K: Sequence[float], k: Sequence[int], fraction: float) -> int:
    """The smallest k whose bucket curve holds `fraction` of the full KL (its last entry)."""
    enough = fraction * curve_K[-1] - 1e-12
    return next(size for size, value in zip(k, curve_K) if value >= enough)


def tail_noise_index(
    all_N: np.ndarray, first_N: np.ndarray, frequency_N: np.ndarray, noisy: Sequence[int]
) -> float:
    """lift of the noisy types over the whole vocabulary / their lift in the first ten classes.

    lift = (fraction of the KL that the types carry) / (their frequency as tokens). Above 1: they
    matter more in the tail. NaN where the first ten classes carry nothing of them.
    """

    def lift(x_N: np.ndarray) -> float:
        frequency = max(frequency_N[list(noisy)].sum(), 1e-300)
        return float(x_N[list(noisy)].sum() / x_N.sum() / frequency)

    head = lift(first_N)
    return lift(all_N) / head if head > 0 else float("nan")


def sparsity(kl_T: Sequence[float] | np.ndarray, fraction: float = 0.8) -> float:
    """The smallest fraction of tokens that carries `fraction` of the KL; NaN when there is none."""
    sums_T = np.sort(np.asarray(kl_T, float))[::-1].cumsum()
    if not len(sums_T) or sums_T[-1] <= 0:
        return float("nan")
    return float((np.searchsorted(sums_T, fraction * sums_T[-1]) + 1) / len(sums_T))


def effective_samples(log_weight: Sequence[float]) -> float:
    """ESS / n = (sum w)^2 / (n sum w^2) of importance weights given as logs: 1 when all are equal,
    1 / n when one dominates.
    """
    x = np.asarray(log_weight, float)
    if not len(x) or not np.isfinite(x.max()):
        return float("nan")
    w = np.exp(x - x.max())
    return float(w.sum() ** 2 / (len(x) * (w**2).sum()))


def by_decile(
    value_n: Sequence[float] | np.ndarray, start_n: Sequence[int] | np.ndarray, n_bytes: int
) -> np.ndarray:
    """[10] means of a per-token value over tenths of the text's bytes; NaN where a tenth holds no
    token's start.
    """
    tenth_n = np.minimum(10 * np.asarray(start_n, np.int64) // max(n_bytes, 1), 9)
    count = np.bincount(tenth_n, minlength=10)
    return np.divide(
        np.bincount(tenth_n, weights=np.asarray(value_n, float), minlength=10),
        count,
        out=np.full(10, np.nan),
        where=count > 0,
    )


def slope(decile: Sequence[float] | np.ndarray) -> float:
    """Least-squares change from the first to the last tenth; NaN with fewer than two values."""
    y = np.asarray(decile, float)
    x = np.linspace(0, 1, len(y))
    known = np.isfinite(y)
    return float(np.polyfit(x[known], y[known], 1)[0]) if known.sum() > 1 else float("nan")


@dataclass(frozen=True)
class GradedLogProb:
    """One student text: correct or not, and its log-probability under both models, nats."""

    prompt: int
    correct: bool
    teacher_logp: float
    student_logp: float
    n_bytes: int  # of the text, at least 1

    @property
    def teacher_score(self) -> float:
        """a(y) = log p_T(y) / bytes(y)."""
        return self.teacher_logp / self.n_bytes


@dataclass(frozen=True)
class TracePreference:
    """Does the teacher prefer wrong texts? Per prompt that has correct and wrong ones
    (docs/method.md, "Wrong-trace preference").
    """

    # fraction of (wrong, correct) pairs where the teacher scores the wrong one higher per byte;
    # ties count half
    pair: dict[int, float]
    margin: dict[int, float]  # mean of wrong - mean of correct, nats per byte
    # mean over wrong texts of (teacher - student), nats per byte; all prompts with a wrong text
    pull: dict[int, float]
    length_gap: (
        float  # mean bytes of wrong / of correct texts, over usable prompts; NaN without any
    )
    matched_pair: dict[int, float]  # `pair` over pairs whose lengths differ by at most 20 %


def wrong_trace_preference(texts: Sequence[GradedLogProb]) -> TracePreference:
    """Teacher scores a(y) of wrong and correct texts, compared inside each prompt."""
    by_prompt: dict[int, tuple[list[GradedLogProb], list[GradedLogProb]]] = {}
    for t in texts:
        by_prompt.setdefault(t.prompt, ([], []))[t.correct].append(t)
    pull = {
        i: float(np.mean([(t.teacher_logp - t.student_logp) / t.n_bytes for t in wrong]))
        for i, (wrong, _) in by_prompt.items()
        if wrong
    }
    usable = {i: both for i, both in by_prompt.items() if all(both)}
    pair, matched, margin = {}, {}, {}
    for i, (wrong, correct) in usable.items():
        margin[i] = _mean_score(wrong) - _mean_score(correct)
        pair[i] = _mean_preference(product(wrong, correct))
        close = [(w, c) for w, c in product(wrong, correct) if _of_like_length(w, c)]
        if close:
            matched[i] = _mean_preference(close)
    lengths = [[t.n_bytes for both in usable.values() for t in both[k]] for k in (0, 1)]
    gap = float(np.mean(lengths[0]) / np.mean(lengths[1])) if usable else float("nan")
    return TracePreference(pair, margin, pull, gap, matched)


def _mean_score(texts: Sequence[GradedLogProb]) -> float:
    return float(np.mean([t.teacher_score for t in texts]))


def _of_like_length(a: GradedLogProb, b: GradedLogProb) -> bool:
    return max(a.n_bytes, b.n_bytes) <= 1.2 * min(a.n_bytes, b.n_bytes)


def _mean_preference(pairs: Iterable[tuple[GradedLogProb, GradedLogProb]]) -> float:
    return float(np.mean([np.sign(w.teacher_score - c.teacher_score) / 2 + 0.5 for w, c in pairs]))


@dataclass(frozen=True, eq=False)
class TopOverlap:
    """How the top-K sets of two models overlap, per position."""

    overlap_T: Tensor  # fraction of the teacher's top K that is also in the student's
    teachable_T: Tensor  # teacher mass inside the student's top K
    entropy_gap_T: Tensor  # H(teacher) - H(student), nats

    def rows(self, rows: np.ndarray) -> "TopOverlap":
        """At some of the positions."""
        return TopOverlap(self.overlap_T[rows], self.teachable_T[rows], self.entropy_gap_T[rows])

    def cpu(self) -> "TopOverlap":
        return TopOverlap(self.overlap_T.cpu(), self.teachable_T.cpu(), self.entropy_gap_T.cpu())


def top_overlap(student: HeadInputs, teacher: HeadInputs, k: int) -> TopOverlap:
    """`overlap_of` two heads of one vocabulary."""
    return overlap_of(_logprobs(student, teacher), min(k, _num_ids(student, teacher)))


def overlap_of(pairs: LogProbs, k: int) -> TopOverlap:
    """In float64, over the classes that profile_of compares; K = k, at most V."""
    chunks = []
    for logp_CV, logq_CV in pairs:
        student_CK, teacher_CK = logp_CV.topk(k, 1).indices, logq_CV.topk(k, 1).indices
        inside_CV = torch.zeros_like(logp_CV).scatter(1, student_CK, 1.0)
        chunks.append(
            (
                inside_CV.gather(1, teacher_CK).mean(1),
                (inside_CV * logq_CV.exp()).sum(1),
                _entropy(logq_CV) - _entropy(logp_CV),
            )
        )
    if not chunks:
        empty_T = torch.zeros(0, dtype=torch.float64)
        return TopOverlap(empty_T, empty_T, empty_T)
    return TopOverlap(*(torch.cat(c) for c in zip(*chunks)))


def _entropy(logp_CV: Tensor) -> Tensor:
    return -torch.where(logp_CV > -torch.inf, logp_CV.exp() * logp_CV, 0.0).sum(1)


def off_nucleus(out: HeadInputs, target_T: Tensor, top_p: float = 0.999) -> Tensor:
    """`outside_nucleus` of a head, chunk by chunk."""
    outside = [torch.zeros(0, dtype=torch.bool, device=target_T.device)]
    done = 0
    for logits_CV in chunked_logits(out, out.vocab_size):
        target_C = target_T[done : done + len(logits_CV)]
        done += len(logits_CV)
        outside.append(outside_nucleus(logits_CV.softmax(1), target_C, top_p))
    return torch.cat(outside)


def outside_nucleus(p_CV: Tensor, target_C: Tensor, top_p: float = 0.999) -> Tensor:
    """bool [C]: does a sampler with top-p never draw the target? True if the classes before it hold
    top_p already.

    Classes are ranked by probability, equal ones by id; the likeliest is never outside.
    """
    id_V, target_C1 = torch.arange(p_CV.shape[1], device=p_CV.device), target_C[:, None]
    own_C1 = p_CV.gather(1, target_C1)
    before_CV = (p_CV > own_C1) | ((p_CV == own_C1) & (id_V < target_C1))
    return (p_CV * before_CV).sum(1) >= top_p
