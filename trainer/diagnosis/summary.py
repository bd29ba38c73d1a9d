"""Readings of a teacher-student pair -> one table of numbers with intervals, and what they say
(docs/method.md, "Diagnose").

Every interval is a 95 % percentile interval of a bootstrap over prompts. Directions are those of
the KL (forward: teacher || student), writers are who wrote the prefix; the two are never tied to
each other.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reflux.trainer.runs.stats import Estimate, bootstrap, bootstrap_ratio

from .frequency_bands import BANDS
from .measure import DIRECTIONS, TokenStats, per_prompt
from .metrics import (
    Graded,
    by_decile,
    effective_samples,
    keeps,
    slope,
    sparsity,
    tail_noise_index,
    wrong_trace_preference,
)
from .symptoms import confidence_report, loops, repeated_ngrams
from .token_classes import TYPES

NOISY = [TYPES.index("function"), TYPES.index("punctuation")]
PREFIXES = (16, 64, 256)  # tokens, of importance weights
# of the teacher's mass on tokens that both vocabularies have, for the class map that knows no
# others
COMMON_ENOUGH = 0.98
# whose texts make a direction a sequence KL
OWN_WRITER = {"forward": "teacher", "reverse": "student"}


def diagnose_readings(
    readings: Sequence[TokenStats], *, share: float = 0.95, unread: Sequence[TokenStats] = ()
) -> dict[str, Any]:
    """All numbers that follow from readings alone. share: of the KL that the kept classes should
    hold.

    unread: texts that only one of two tokenizers can spell; their symptoms count. ValueError where
    nothing else is left.
    """
    if not readings:
        raise ValueError(
            f"diagnose: none of {len(unread)} texts could be aligned between the two tokenizers, "
            "so nothing can be compared. `python -m reflux.tokenalign STUDENT TEACHER --text ...` "
            "shows where they part; check the models' texts"
        )
    by_writer = {
        w: [r for r in readings if r.writer == w] for w in ("dataset", "teacher", "student")
    }
    by_writer = {w: rows for w, rows in by_writer.items() if rows}
    tail_of = {d: by_writer.get(OWN_WRITER[d]) or readings for d in DIRECTIONS}
    return {
        "texts": {
            w: {
                "texts": len(rows),
                "prompts": len({r.rollout.prompt.index for r in rows}),
                "tokens": sum(r.tokens for r in rows),
            }
            for w, rows in by_writer.items()
        },
        "across": _across([r for r in readings if r.across], unread),
        "grid": {d: {w: _kl(rows, d) for w, rows in by_writer.items()} for d in DIRECTIONS},
        "sequence": {
            d: _sequence_kl(by_writer[w], d) for d, w in OWN_WRITER.items() if w in by_writer
        },
        "tail": {d: _tail(tail_of[d], d, share) for d in DIRECTIONS},
        "off_policy": _off_policy(by_writer),
        "gap": _gap(by_writer.get("student", []), readings),
        "symptoms": _symptoms([r for r in (*readings, *unread) if r.writer == "student"]),
    }


def _ratio(
    rows: Sequence[TokenStats],
    top: Callable[[TokenStats], float],
    bottom: Callable[[TokenStats], float],
) -> dict:
    return bootstrap_ratio(per_prompt(rows, top), per_prompt(rows, bottom))._asdict()


def _kl(rows: Sequence[TokenStats], direction: str) -> dict[str, dict]:
    total = lambda r: float(r.kl[direction].sum())
    return {
        "per_token": _ratio(rows, total, lambda r: r.states),
        "per_byte": _ratio(rows, total, lambda r: r.n_bytes),
        "per_text": _ratio(rows, total, lambda r: 1.0),
    }


def _sequence_kl(rows: Sequence[TokenStats], direction: str) -> dict[str, dict]:
    """Both estimators of the KL between whole texts: log-ratio of the sampled tokens, and exact
    token KLs along the texts.
    """
    sign = 1.0 if direction == "forward" else -1.0
    sampled = _ratio(rows, lambda r: sign * float((r.teacher_n - r.student_n).sum()), lambda r: 1.0)
    # coarse classes only bound it from below
    exact = {} if rows[0].across else {"exact_tokens": _kl(rows, direction)["per_text"]}
    return {"sampled_tokens": sampled, **exact}


def _across(rows: Sequence[TokenStats], unread: Sequence[TokenStats]) -> dict[str, Any] | None:
    """Of two tokenizers: how much of the texts and of the distributions was compared. None where
    they share one.
    """
    if not rows:
        return None
    total = lambda value: sum(value(r) for r in rows)
    spans = total(lambda r: len(r.student_n))
    common_2 = (
        np.concatenate([r.across.common_P2 for r in rows]).mean(0)
        if total(lambda r: r.states)
        else (math.nan, math.nan)
    )
    bytes_S = lambda r: np.diff(np.append(r.start_n, r.n_bytes))  # the stop has none
    writers = [
        w
        for w in ("dataset", "teacher", "student")
        if any(r.writer == w and r.n_bytes for r in rows)
    ]
    return {
        "spans": spans,
        "unaligned": len(unread),
        "unaligned_by": dict(Counter(r.writer for r in unread)),
        "compared_bytes": _safe(
            total(lambda r: int(bytes_S(r)[r.across.place_span].sum())), total(lambda r: r.n_bytes)
        ),
        "bits_per_byte_gap": {
            w: _ratio(
                [r for r in rows if r.writer == w],
                lambda r: _bits(r.student_n - r.teacher_n, r),
                lambda r: r.n_bytes,
            )
            for w in writers
        },
        "places": total(lambda r: r.states),
        "compared": _safe(total(lambda r: r.states), spans),
        "student_tokens_per_span": _safe(
            total(lambda r: len(r.across.student_span)),
            total(lambda r: len(set(r.across.student_span))),
        ),
        "teacher_tokens_per_span": _safe(
            total(lambda r: len(r.across.teacher_span)),
            total(lambda r: len(set(r.across.teacher_span))),
        ),
        "common_mass": {"student": float(common_2[0]), "teacher": float(common_2[1])},
    }


# trap 1
def _tail(rows: Sequence[TokenStats], direction: str, share: float) -> dict[str, Any]:
    curves = [r.curves[direction] for r in rows]
    tokens = max(sum(r.states for r in rows), 1)
    k = curves[0].k
    bucket_K, raw_K, gradient_K = (
        sum(getattr(c, name) for c in curves) / tokens
        for name in ("bucket_K", "raw_K", "gradient_tail_K")
    )
    kept = keeps(bucket_K, k, share)
    keys = sorted({r.rollout.prompt.index for r in rows})
    all_N, first_N, count_N = (
        _by_prompt(rows, value)
        for value in (
            lambda r: r.curves[direction].type_N,
            lambda r: r.curves[direction].type_at_10_N,
            lambda r: np.bincount(r.type_n, minlength=len(TYPES)).astype(float),
        )
    )

    def index_of(drawn: Sequence[int]) -> float:
        counts = sum(count_N[i] for i in drawn)
        return tail_noise_index(
            sum(all_N[i] for i in drawn),
            sum(first_N[i] for i in drawn),
            counts / counts.sum(),
            NOISY,
        )

    total_N, head_N, frequency_N = (sum(x.values()) for x in (all_N, first_N, count_N))
    frequency_N = frequency_N / max(frequency_N.sum(), 1.0)
    return {
        "k": list(k),
        "bucket": bucket_K.tolist(),
        "raw": raw_K.tolist(),
        "gradient_tail": gradient_K.tolist(),
        "k_share": kept,
        "share": share,
        "gradient_outside": float(gradient_K[k.index(kept)]),
        "tail_noise_index": bootstrap(index_of, keys)._asdict(),
        "sparsity": sparsity(np.concatenate([r.kl[direction] for r in rows])),
        "types": {
            name: {
                "share": _safe(total_N[i], total_N.sum()),
                "share_at_10": _safe(head_N[i], head_N.sum()),
                "frequency": float(frequency_N[i]),
            }
            for i, name in enumerate(TYPES)
        },
        "bands": _bands(rows, direction),
    }


def _bands(rows: Sequence[TokenStats], direction: str) -> dict[str, dict[str, float]]:
    """Share of the KL against share of the tokens by how frequent a class is; lift = the one / the
    other.
    """
    if any(r.band_n is None for r in rows):
        return {}
    curves = [r.curves[direction] for r in rows]
    share_M, share_at_10_M, frequency_M = (
        x / max(x.sum(), 1e-300)
        for x in (
            sum(c.band_M for c in curves),
            sum(c.band_at_10_M for c in curves),
            sum(np.bincount(r.band_n, minlength=len(BANDS)).astype(float) for r in rows),
        )
    )
    return {
        name: {
            "share": float(share_M[i]),
            "share_at_10": float(share_at_10_M[i]),
            "frequency": float(frequency_M[i]),
            "lift": _safe(share_M[i], frequency_M[i]),
            "lift_at_10": _safe(share_at_10_M[i], frequency_M[i]),
        }
        for i, name in enumerate(BANDS)
    }


def _by_prompt(
    rows: Sequence[TokenStats], value: Callable[[TokenStats], np.ndarray]
) -> dict[int, np.ndarray]:
    sums: dict[int, np.ndarray] = {}
    for r in rows:
        sums[r.rollout.prompt.index] = sums.get(r.rollout.prompt.index, 0.0) + value(r)
    return sums


# trap 2
def _off_policy(by_writer: Mapping[str, Sequence[TokenStats]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "decile": {
            d: {w: _deciles(rows, lambda r, d=d: r.kl[d]) for w, rows in by_writer.items()}
            for d in DIRECTIONS
        }
    }
    if "teacher" in by_writer:
        found["effective_samples"] = _effective(by_writer["teacher"])
        found["log_ratio"] = _log_ratio(by_writer["teacher"])
    if {"teacher", "student"} <= by_writer.keys():
        found["prefix_ratio"] = {d: _prefix_ratio(by_writer, d) for d in DIRECTIONS}
        found["drift"] = {
            d: {
                "student": slope(found["decile"][d]["student"]),
                "teacher": slope(found["decile"][d]["teacher"]),
            }
            for d in DIRECTIONS
        }
    return found


def _deciles(rows: Sequence[TokenStats], value: Callable[[TokenStats], np.ndarray]) -> list[float]:
    """Mean over texts of a value by tenths of the text's bytes."""
    table = np.array([by_decile(value(r), r.state_start_n, r.n_bytes) for r in rows])
    known = np.isfinite(table)
    return (
        np.where(known, table, 0.0).sum(0) / np.where(known.sum(0) > 0, known.sum(0), np.nan)
    ).tolist()


def _effective(rows: Sequence[TokenStats]) -> dict[str, dict]:
    """ESS / n of w = p_student(y) / p_teacher(y) on the teacher's texts: whole, and their first
    tokens.
    """
    of_prompt: dict[int, list[TokenStats]] = {}
    for r in rows:
        of_prompt.setdefault(r.rollout.prompt.index, []).append(r)

    def ess(first: int | None) -> Callable[[Sequence[int]], float]:
        return lambda drawn: effective_samples(
            [float((r.student_n - r.teacher_n)[:first].sum()) for i in drawn for r in of_prompt[i]]
        )

    longest = max(len(r.student_n) for r in rows)
    named = {"whole": None, **{f"first {n}": n for n in PREFIXES if n < longest}}
    return {
        name: bootstrap(ess(first), sorted(of_prompt))._asdict() for name, first in named.items()
    }


def _log_ratio(rows: Sequence[TokenStats]) -> dict[str, Any]:
    """|log p_student - log p_teacher| of the teacher's tokens, nats: what the importance weights
    are made of.
    """
    size_of = lambda r: np.abs(r.student_n - r.teacher_n)
    size_T = np.concatenate([size_of(r) for r in rows])
    return {
        "mean": _ratio(rows, lambda r: float(size_of(r).sum()), lambda r: len(r.student_n)),
        "p99": float(np.quantile(size_T, 0.99)) if len(size_T) else math.nan,
        "max": float(size_T.max(initial=0.0)),
    }


def _prefix_ratio(by_writer: Mapping[str, Sequence[TokenStats]], direction: str) -> dict:
    """KL per token on the student's prefixes / on the teacher's, over the prompts that both
    answered.
    """
    sums = {
        w: (
            per_prompt(by_writer[w], lambda r: float(r.kl[direction].sum())),
            per_prompt(by_writer[w], lambda r: r.states),
        )
        for w in ("student", "teacher")
    }
    keys = sorted(set(sums["student"][0]) & set(sums["teacher"][0]))

    def ratio(drawn: Sequence[int]) -> float:
        mean = {
            w: _safe(sum(kl[i] for i in drawn), sum(n[i] for i in drawn))
            for w, (kl, n) in sums.items()
        }
        return _safe(mean["student"], mean["teacher"])

    return bootstrap(ratio, keys)._asdict()


# trap 3
def _gap(students: Sequence[TokenStats], everything: Sequence[TokenStats]) -> dict[str, Any]:
    tokens = lambda r: r.states
    found: dict[str, Any] = {
        "overlap": _ratio(everything, lambda r: float(r.overlap_n.sum()), tokens),
        "teachable": _ratio(everything, lambda r: float(r.teachable_n.sum()), tokens),
        "entropy_gap": _ratio(everything, lambda r: float(r.entropy_gap_n.sum()), tokens),
    }
    found |= _solved_by_teacher(
        students, [r for r in everything if r.writer == "teacher" and r.right]
    )
    graded = [r for r in students if r.right is not None and r.rollout.ended and r.n_bytes]
    if not graded:
        return found
    preference = wrong_trace_preference(
        [
            Graded(
                r.rollout.prompt.index,
                r.right,
                float(r.teacher_n.sum()),
                float(r.student_n.sum()),
                r.n_bytes,
            )
            for r in graded
        ]
    )
    found["wrong_trace"] = {
        "pair": _over_prompts(preference.pair),
        "margin": _over_prompts(preference.margin),
        "pull": _over_prompts(preference.pull),
        "matched_pair": _over_prompts(preference.matched_pair),
        "usable_prompts": len(preference.pair),
        "graded_texts": len(graded),
        "length_gap": preference.length_gap,
    }
    wrong, right = ([r for r in graded if r.right is flag] for flag in (False, True))
    if wrong and right:
        mean = lambda rows: _safe(
            sum(float(r.kl["reverse"].sum()) for r in rows), sum(tokens(r) for r in rows)
        )
        found["degraded_prefix"] = _safe(mean(wrong), mean(right))
    return found


def _solved_by_teacher(
    students: Sequence[TokenStats], solved: Sequence[TokenStats]
) -> dict[str, Any]:
    """Right teacher texts in bits per byte (the stop token left out), and does the student solve
    those prompts in any of its texts?
    """
    found: dict[str, Any] = {}
    if any(r.n_bytes for r in solved):
        found["right_teacher_bits_per_byte"] = {
            "student": _ratio(solved, lambda r: _bits(r.student_n, r), lambda r: r.n_bytes),
            "teacher": _ratio(solved, lambda r: _bits(r.teacher_n, r), lambda r: r.n_bytes),
        }
    prompts = {r.rollout.prompt.index for r in solved}
    tried = [r for r in students if r.right is not None and r.rollout.prompt.index in prompts]
    if tried:
        right, count = (
            per_prompt(tried, lambda r: float(bool(r.right))),
            per_prompt(tried, lambda r: 1.0),
        )
        found["on_solved_by_teacher"] = {
            "n": int(max(count.values())),
            "pass_at_n": _over_prompts({i: float(x > 0) for i, x in right.items()}),
            "accuracy": _over_prompts({i: right[i] / count[i] for i in right}),
        }
    return found


def _bits(logp_n: np.ndarray, r: TokenStats) -> float:
    """Without the stop token."""
    return -float(logp_n[: len(logp_n) - r.rollout.ended].sum()) / math.log(2)


def _over_prompts(values: Mapping[int, float]) -> dict:
    return bootstrap(
        lambda drawn: float(np.mean([values[i] for i in drawn])), sorted(values)
    )._asdict()


# symptoms
def _symptoms(students: Sequence[TokenStats]) -> dict[str, Any]:
    if not students:
        return {}
    ids = [r.rollout.content_ids for r in students]
    found: dict[str, Any] = {
        "repeated_4grams": float(np.mean([repeated_ngrams(i) for i in ids])),
        "looping": float(np.mean([loops(i) for i in ids])),
        "truncated": float(np.mean([not r.rollout.ended for r in students])),
        "broken_text": float(np.mean(["\ufffd" in r.rollout.text for r in students])),
    }
    if all(r.outside_n is not None for r in students):
        found["off_nucleus"] = _safe(
            sum(int(r.outside_n.sum()) for r in students), sum(len(r.outside_n) for r in students)
        )
    graded = [r for r in students if r.right is not None and len(r.student_n)]
    if graded:
        sure = [math.exp(float(r.student_n.sum()) / r.tokens) for r in graded]
        report = confidence_report(sure, [r.right for r in graded])
        found["confidence"] = vars(report) | {"overconfidence": report.overconfidence}
    return found


# what it says
def verdict(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three traps: number, interval, the value of a healthy pair, whether the interval leaves
    it, what to do.
    """
    return [
        trap
        for trap in (_tail_verdict(found), _off_policy_verdict(found), _gap_verdict(found))
        if trap
    ]


def _tail_verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    direction = max(
        DIRECTIONS, key=lambda d: np.nan_to_num(found["tail"][d]["tail_noise_index"]["mean"])
    )
    tail = found["tail"][direction]
    k = tail["k_share"]
    how, all_of_it = "distill.tail = 'bucket'", "the full vocabulary"
    # token KL needs one vocabulary, and kept classes are exact for `common` alone
    if found.get("across"):
        how = "distill.objective = 'class', classes = 'common', tail = 'bucket'"
        all_of_it = "all classes (distill.objective = 'class', classes = 'prefix')"
    advice = (
        f"{how} and top_k = {k}: the first {k} classes hold {tail['share']:.0%} of the {direction} "
        f"KL, the bucket bucket keeps the rest honest; {tail['gradient_outside']:.0%} of the "
        "gradient comes from outside them"
    )
    shared = found["across"]["common_mass"]["teacher"] if found.get("across") else 1.0
    if shared < COMMON_ENOUGH:
        advice = (
            f"{all_of_it}: kept classes need classes = 'common', and only {shared:.1%} of the "
            "teacher's mass lies on tokens that both have; of the rest the student would be asked "
            "for its own uncommon tokens"
        )
    healthy = f"keep {all_of_it}: function words and punctuation weigh no more in the tail than in the first ten classes"
    return _trap(
        "tail noise",
        f"tail-noise index, {direction} KL",
        tail["tail_noise_index"],
        1.0,
        advice,
        healthy,
    )


def _off_policy_verdict(found: Mapping[str, Any]) -> dict[str, Any] | None:
    ratio = found["off_policy"].get("prefix_ratio")
    if not ratio:
        return None
    direction = max(DIRECTIONS, key=lambda d: np.nan_to_num(ratio[d]["mean"]))
    ess = found["off_policy"]["effective_samples"]["whole"]["mean"]
    advice = (
        "distill.on_policy > 0: the pair differs more where the student walks than where the "
        "teacher does, and off-policy texts never go there (effective share of the teacher's "
        f"texts under the student: {ess:.0%})"
    )
    healthy = "off-policy texts are as good a place to learn as the student's own; they are cheaper"
    advice, healthy = (
        words + _gradient_words(found["off_policy"].get("gradient"), direction)
        for words in (advice, healthy)
    )
    return _trap(
        "off-policy instability",
        f"{direction} KL on student prefixes / on teacher prefixes",
        ratio[direction],
        1.0,
        advice,
        healthy,
    )


def _gradient_words(gradient: Mapping[str, Any] | None, direction: str) -> str:
    apart = gradient[direction].get("on_minus_off") if gradient else None
    if not apart or math.isnan(apart["mean"]):
        return ""
    on, off = (gradient[direction][w]["unbiased"]["mean"] for w in ("student", apart["off"]))
    which = (
        "cleaner on the student's texts"
        if apart["low"] > 0
        else "noisier on the student's texts"
        if apart["high"] < 0
        else "much alike"
    )
    return (
        f"; a gradient is {which}: signal to noise {on:.3g}, and {off:.3g} on the {apart['off']}'s"
    )


def _gap_verdict(found: Mapping[str, Any]) -> dict[str, Any] | None:
    wrong = found["gap"].get("wrong_trace")
    if not wrong:
        return None
    advice = (
        "distill.correct_only = true, or calibrate the teacher (calibration.mode = 'distillable'): "
        "it likes wrong student texts at least as well as right ones, so its signal on the "
        "student's own texts teaches little or the wrong thing"
    )
    healthy = (
        "the teacher tells right student texts from wrong ones: on-policy distillation has a signal"
    )
    return _trap(
        "teacher-student gap",
        "wrong-trace preference (0 = always prefers right texts)",
        wrong["pair"],
        0.5,
        advice,
        healthy,
        present=lambda e: not e["high"] < 0.5,
    )


def _trap(
    name: str,
    measure: str,
    estimate: Mapping[str, float],
    reference: float,
    advice: str,
    healthy: str,
    present: Callable[[Mapping[str, float]], bool] | None = None,
) -> dict[str, Any]:
    row = {"trap": name, "measure": measure, **estimate, "reference": reference}
    if math.isnan(estimate["low"]):
        return row | {
            "present": None,
            "advice": f"cannot be said from {estimate['n']} prompts: it has no interval. Give it more prompts "
            "(data.limit), or more texts of each (diagnose.student_texts)",
        }
    caught = bool((present or (lambda e: e["low"] > reference))(estimate))
    return row | {"present": caught, "advice": advice if caught else healthy}


def _safe(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def estimate_text(e: Estimate | Mapping[str, float], digits: int = 3) -> str:
    """0.123 [0.100, 0.150]"""
    e = e._asdict() if isinstance(e, Estimate) else e
    return f"{e['mean']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def flatten(found: Mapping[str, Any], names: Iterable[str] = ()) -> dict[str, float]:
    """The few numbers of a log line: "diagnose/<trap>" -> mean."""
    return {f"diagnose/{t['trap'].replace(' ', '_')}": t["mean"] for t in found["verdict"]}
