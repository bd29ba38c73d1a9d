"""Token stats of a teacher-student pair -> one Diagnosis: numbers with intervals (docs/method.md,
"Diagnose").

Every interval is a 95 % percentile interval of a bootstrap over prompts. The divergence (forward:
teacher || student) and the source of the prefix are two axes; neither implies the other.

Shapes: K grid of top-k sizes, N token types, M frequency bands, n tokens of one text.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import add

import numpy as np

from reflux.trainer.runs.stats import Estimate, bootstrap, bootstrap_ratio

from .measure import SampledBy, TokenStats, per_prompt
from .metrics import (
    DIVERGENCES,
    Divergence,
    GradedLogProb,
    by_decile,
    effective_samples,
    slope,
    smallest_k,
    sparsity,
    tail_noise_index,
    wrong_trace_preference,
)
from .results import (
    BandKL,
    BothModels,
    CrossTokenizer,
    Diagnosis,
    LogRatio,
    MeanKL,
    OffPolicy,
    SequenceKL,
    SolvedByTeacher,
    Tail,
    TeacherStudentGap,
    TextCount,
    TypeKL,
    WrongTrace,
)
from .symptoms import text_symptoms
from .token_classes import BANDS, TYPES

Value = Callable[[TokenStats], float]
Sources = Mapping[SampledBy, Sequence[TokenStats]]

NOISY = [TYPES.index("function"), TYPES.index("punctuation")]
NEARLY_ALL = 0.99  # of the positions: the sum over them is the KL of whole texts
PREFIXES = (16, 64, 256)  # tokens, of importance weights
SOURCES: tuple[SampledBy, ...] = ("dataset", "teacher", "student")
# whose texts make a divergence a sequence KL
SEQUENCE_SOURCE: dict[Divergence, SampledBy] = {"forward": "teacher", "reverse": "student"}


def diagnose_token_stats(
    stats: Sequence[TokenStats],
    *,
    kl_fraction: float = 0.95,
    unaligned: Sequence[TokenStats] = (),
) -> Diagnosis:
    """All numbers that follow from token stats alone. kl_fraction: of the KL, for Tail.top_k.

    unaligned: texts that two tokenizers leave nothing to compare of; their symptoms count.
    ValueError where there are no other texts.
    """
    if not stats:
        raise ValueError(
            f"diagnose: none of {len(unaligned)} texts can be compared between the two "
            "tokenizers; want texts that both can spell, and models that spell them much as "
            "their tokenizers do (or raise diagnose.max_missing)"
        )
    grouped = {w: [s for s in stats if s.sampled_by == w] for w in SOURCES}
    by_source: Sources = {w: rows for w, rows in grouped.items() if rows}
    return Diagnosis(
        texts={
            w: TextCount(len(rows), len({s.prompt for s in rows}), sum(s.tokens for s in rows))
            for w, rows in by_source.items()
        },
        cross_tokenizer=_cross_tokenizer(stats, unaligned),
        grid={d: {w: _mean_kl(rows, d) for w, rows in by_source.items()} for d in DIVERGENCES},
        sequence={
            d: _sequence_kl(by_source[w], d) for d, w in SEQUENCE_SOURCE.items() if w in by_source
        },
        tail={
            d: _tail(by_source.get(SEQUENCE_SOURCE[d]) or stats, d, kl_fraction)
            for d in DIVERGENCES
        },
        off_policy=_off_policy(by_source),
        gap=_gap(by_source.get("student", ()), stats),
        symptoms=text_symptoms([s for s in (*stats, *unaligned) if s.sampled_by == "student"]),
    )


def _ratio(rows: Sequence[TokenStats], top: Value, bottom: Value) -> Estimate:
    return bootstrap_ratio(per_prompt(rows, top), per_prompt(rows, bottom))


def _over_prompts(values: Mapping[int, float]) -> Estimate:
    return bootstrap(lambda drawn: float(np.mean([values[i] for i in drawn])), sorted(values))


def _safe(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def _total(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return reduce(add, arrays)


def _positions(s: TokenStats) -> float:
    return s.positions


def _bytes(s: TokenStats) -> float:
    return s.n_bytes


def _one(s: TokenStats) -> float:
    return 1.0


def _student_bits(s: TokenStats) -> float:
    return _bits(s.student_logp_n, s)


def _teacher_bits(s: TokenStats) -> float:
    return _bits(s.teacher_logp_n, s)


def _bits(logp_n: np.ndarray, s: TokenStats) -> float:
    """Without the stop token."""
    return -float(logp_n[: len(logp_n) - s.rollout.ended].sum()) / math.log(2)


def _log_ratio_n(s: TokenStats) -> np.ndarray:
    """log p_student - log p_teacher of each token."""
    return s.student_logp_n - s.teacher_logp_n


def _mean_kl(rows: Sequence[TokenStats], divergence: Divergence) -> MeanKL:
    def total(s: TokenStats) -> float:
        return float(s.kl[divergence].sum())

    return MeanKL(
        _ratio(rows, total, _positions), _ratio(rows, total, _bytes), _ratio(rows, total, _one)
    )


def _sequence_kl(rows: Sequence[TokenStats], divergence: Divergence) -> SequenceKL:
    sign = 1.0 if divergence == "forward" else -1.0
    sampled = _ratio(
        rows, lambda s: sign * float((s.teacher_logp_n - s.student_logp_n).sum()), _one
    )
    everywhere = _compared(rows) >= NEARLY_ALL
    return SequenceKL(sampled, _mean_kl(rows, divergence).per_text if everywhere else None)


def _compared(rows: Sequence[TokenStats]) -> float:
    """The fraction of all positions at which distributions were compared."""
    positions = sum(s.positions if s.alignment is None else s.alignment.positions for s in rows)
    return _safe(sum(s.positions for s in rows), positions)


def _cross_tokenizer(
    stats: Sequence[TokenStats], unaligned: Sequence[TokenStats]
) -> CrossTokenizer | None:
    """None where both models have one tokenizer."""
    rows = [(s, s.alignment) for s in stats if s.alignment is not None]
    if not rows:
        return None
    positions = sum(a.positions for _, a in rows)
    student, teacher = (_safe(sum(a.missing[side] for _, a in rows), positions) for side in (0, 1))
    spelled = {
        w: [s for s, _ in rows if s.sampled_by == w]
        for w in SOURCES
        if any(s.sampled_by == w and s.n_bytes for s, _ in rows)
    }
    total = sum(s.n_bytes for s, _ in rows)
    return CrossTokenizer(
        unaligned=len(unaligned),
        unaligned_by=dict(Counter(s.sampled_by for s in unaligned)),
        byte_positions=positions,
        compared=_compared([s for s, _ in rows]),
        missing=BothModels(student, teacher),
        bits_per_byte_gap={
            w: _ratio(texts, lambda s: _bits(_log_ratio_n(s), s), _bytes)
            for w, texts in spelled.items()
        },
        bytes_per_token=BothModels(
            _safe(total, sum(len(a.student_unit) for _, a in rows)),
            _safe(total, sum(len(a.teacher_unit) for _, a in rows)),
        ),
    )


# tail noise
def _tail(rows: Sequence[TokenStats], divergence: Divergence, kl_fraction: float) -> Tail:
    curves = [s.curves[divergence] for s in rows]
    tokens = max(sum(s.positions for s in rows), 1)
    k_K = curves[0].k
    bucket_K = _total(c.bucket_K for c in curves) / tokens
    raw_K = _total(c.raw_K for c in curves) / tokens
    gradient_K = _total(c.gradient_tail_K for c in curves) / tokens
    top_k = smallest_k(bucket_K.tolist(), k_K, kl_fraction)
    index, types = _types(rows, divergence)
    return Tail(
        k=list(k_K),
        bucket=bucket_K.tolist(),
        raw=raw_K.tolist(),
        gradient_tail=gradient_K.tolist(),
        top_k=top_k,
        kl_fraction=kl_fraction,
        gradient_outside=float(gradient_K[k_K.index(top_k)]),
        tail_noise_index=index,
        sparsity=sparsity(np.concatenate([s.kl[divergence] for s in rows])),
        types=types,
        bands=_bands(rows, divergence),
    )


def _types(
    rows: Sequence[TokenStats], divergence: Divergence
) -> tuple[Estimate, dict[str, TypeKL]]:
    """The tail-noise index, and the KL by token type."""
    all_N = _by_prompt(rows, lambda s: s.curves[divergence].type_N)
    first_N = _by_prompt(rows, lambda s: s.curves[divergence].type_at_10_N)
    count_N = _by_prompt(rows, lambda s: np.bincount(s.type_n, minlength=len(TYPES)).astype(float))

    def index_of(drawn: Sequence[int]) -> float:
        counts = _total(count_N[i] for i in drawn)
        return tail_noise_index(
            _total(all_N[i] for i in drawn),
            _total(first_N[i] for i in drawn),
            counts / counts.sum(),
            NOISY,
        )

    total_N, head_N, frequency_N = (_total(x.values()) for x in (all_N, first_N, count_N))
    frequency_N = frequency_N / max(frequency_N.sum(), 1.0)
    types = {
        name: TypeKL(
            _safe(total_N[i], total_N.sum()),
            _safe(head_N[i], head_N.sum()),
            float(frequency_N[i]),
        )
        for i, name in enumerate(TYPES)
    }
    return bootstrap(index_of, sorted(all_N)), types


def _by_prompt(
    rows: Sequence[TokenStats], value: Callable[[TokenStats], np.ndarray]
) -> dict[int, np.ndarray]:
    sums: dict[int, np.ndarray] = {}
    for s in rows:
        sums[s.prompt] = sums.get(s.prompt, 0.0) + value(s)
    return sums


def _bands(rows: Sequence[TokenStats], divergence: Divergence) -> dict[str, BandKL]:
    """By how frequent a class is. Empty where bands are not measured."""
    bands = [s.band_n for s in rows if s.band_n is not None]
    if len(bands) < len(rows):
        return {}
    curves = [s.curves[divergence] for s in rows]
    counts = [np.bincount(band_n, minlength=len(BANDS)).astype(float) for band_n in bands]
    fraction_M, fraction_at_10_M, frequency_M = (
        x / max(x.sum(), 1e-300)
        for x in (
            _total(c.band_M for c in curves),
            _total(c.band_at_10_M for c in curves),
            _total(counts),
        )
    )
    return {
        name: BandKL(
            float(fraction_M[i]),
            float(fraction_at_10_M[i]),
            float(frequency_M[i]),
            _safe(fraction_M[i], frequency_M[i]),
            _safe(fraction_at_10_M[i], frequency_M[i]),
        )
        for i, name in enumerate(BANDS)
    }


# off-policy instability
def _off_policy(by_source: Sources) -> OffPolicy:
    decile: dict[Divergence, dict[SampledBy, list[float]]] = {
        d: {w: _deciles(rows, d) for w, rows in by_source.items()} for d in DIVERGENCES
    }
    teachers, students = by_source.get("teacher"), by_source.get("student")
    both = bool(teachers and students)
    return OffPolicy(
        decile,
        effective_samples=_effective_samples(teachers) if teachers else None,
        log_ratio=_log_ratio(teachers) if teachers else None,
        prefix_ratio={d: _prefix_ratio(by_source, d) for d in DIVERGENCES} if both else None,
        drift={
            d: BothModels(slope(decile[d]["student"]), slope(decile[d]["teacher"]))
            for d in DIVERGENCES
        }
        if both
        else None,
    )


def _deciles(rows: Sequence[TokenStats], divergence: Divergence) -> list[float]:
    """Mean over texts of the KL by tenths of the text's bytes."""
    table = np.array([by_decile(s.kl[divergence], s.start_n, s.n_bytes) for s in rows])
    known = np.isfinite(table)
    count = np.where(known.sum(0) > 0, known.sum(0), np.nan)
    return (np.where(known, table, 0.0).sum(0) / count).tolist()


def _effective_samples(rows: Sequence[TokenStats]) -> dict[str, Estimate]:
    of_prompt: dict[int, list[TokenStats]] = {}
    for s in rows:
        of_prompt.setdefault(s.prompt, []).append(s)

    def ess(first: int | None) -> Callable[[Sequence[int]], float]:
        return lambda drawn: effective_samples(
            [float(_log_ratio_n(s)[:first].sum()) for i in drawn for s in of_prompt[i]]
        )

    longest = max(len(s.student_logp_n) for s in rows)
    named = {"whole": None, **{f"first {n}": n for n in PREFIXES if n < longest}}
    return {name: bootstrap(ess(first), sorted(of_prompt)) for name, first in named.items()}


def _log_ratio(rows: Sequence[TokenStats]) -> LogRatio:
    size = np.concatenate([np.abs(_log_ratio_n(s)) for s in rows])
    return LogRatio(
        _ratio(
            rows,
            lambda s: float(np.abs(_log_ratio_n(s)).sum()),
            lambda s: len(s.student_logp_n),
        ),
        p99=float(np.quantile(size, 0.99)) if len(size) else math.nan,
        max=float(size.max(initial=0.0)),
    )


def _prefix_ratio(by_source: Sources, divergence: Divergence) -> Estimate:
    """Over the prompts that both answered."""

    def sums(source: SampledBy) -> tuple[dict[int, float], dict[int, float]]:
        rows = by_source[source]
        return (
            per_prompt(rows, lambda s: float(s.kl[divergence].sum())),
            per_prompt(rows, _positions),
        )

    (student_kl, student_n), (teacher_kl, teacher_n) = sums("student"), sums("teacher")

    def ratio(drawn: Sequence[int]) -> float:
        return _safe(
            _safe(sum(student_kl[i] for i in drawn), sum(student_n[i] for i in drawn)),
            _safe(sum(teacher_kl[i] for i in drawn), sum(teacher_n[i] for i in drawn)),
        )

    return bootstrap(ratio, sorted(set(student_kl) & set(teacher_kl)))


# teacher-student gap
def _gap(students: Sequence[TokenStats], stats: Sequence[TokenStats]) -> TeacherStudentGap:
    solved = [s for s in stats if s.sampled_by == "teacher" and s.correct]
    bits = None
    if any(s.n_bytes for s in solved):
        bits = BothModels(
            _ratio(solved, _student_bits, _bytes), _ratio(solved, _teacher_bits, _bytes)
        )
    graded = [s for s in students if s.correct is not None and s.rollout.ended and s.n_bytes]
    return TeacherStudentGap(
        overlap=_ratio(stats, lambda s: float(s.overlap_n.sum()), _positions),
        teachable=_ratio(stats, lambda s: float(s.teachable_n.sum()), _positions),
        entropy_gap=_ratio(stats, lambda s: float(s.entropy_gap_n.sum()), _positions),
        correct_teacher_bits_per_byte=bits,
        on_solved_by_teacher=_solved_by_teacher(students, {s.prompt for s in solved}),
        wrong_trace=_wrong_trace(graded) if graded else None,
        degraded_prefix=_degraded_prefix(graded),
    )


def _solved_by_teacher(students: Sequence[TokenStats], prompts: set[int]) -> SolvedByTeacher | None:
    """Does the student solve those prompts in any of its texts?"""
    tried = [s for s in students if s.correct is not None and s.prompt in prompts]
    if not tried:
        return None
    correct, count = per_prompt(tried, lambda s: float(bool(s.correct))), per_prompt(tried, _one)
    return SolvedByTeacher(
        n=int(max(count.values())),
        pass_at_n=_over_prompts({i: float(x > 0) for i, x in correct.items()}),
        accuracy=_over_prompts({i: correct[i] / count[i] for i in correct}),
    )


def _wrong_trace(graded: Sequence[TokenStats]) -> WrongTrace:
    preference = wrong_trace_preference(
        [
            GradedLogProb(
                s.prompt,
                bool(s.correct),
                float(s.teacher_logp_n.sum()),
                float(s.student_logp_n.sum()),
                s.n_bytes,
            )
            for s in graded
        ]
    )
    return WrongTrace(
        _over_prompts(preference.pair),
        _over_prompts(preference.margin),
        _over_prompts(preference.pull),
        _over_prompts(preference.matched_pair),
        usable_prompts=len(preference.pair),
        graded_texts=len(graded),
        length_gap=preference.length_gap,
    )


def _degraded_prefix(graded: Sequence[TokenStats]) -> float | None:
    wrong, correct = ([s for s in graded if s.correct is flag] for flag in (False, True))
    if not wrong or not correct:
        return None
    means = [
        _safe(sum(float(s.kl["reverse"].sum()) for s in rows), sum(s.positions for s in rows))
        for rows in (wrong, correct)
    ]
    return _safe(*means)
