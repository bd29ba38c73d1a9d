"""What a diagnosis says: for each of the three traps its number, the value of a healthy pair, and
what to do.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from reflux.trainer.runs.stats import Estimate

from .gradient_snr import GradientNoise
from .metrics import DIVERGENCES, Divergence
from .results import Diagnosis, OffPolicy, TrapVerdict

# nats per token: what float32 leaves of a KL that is 0
RESOLUTION = 1e-6
# nats per token: above it, tokens that one model writes are more than e times less likely to the
# other, in the geometric mean. A ratio of two such KLs does not tell where to learn: both are large
FAR_APART = 1.0
# effective fraction of the teacher's texts under the student, below which they are not its own
EFFECTIVE_ENOUGH = 0.5


def with_verdict(diagnosis: Diagnosis) -> Diagnosis:
    """Adds the verdict on each of the three traps, also where one was not measured."""
    traps = [_tail(diagnosis), _off_policy(diagnosis), _gap(diagnosis)]
    if _alike(diagnosis):
        traps[:2] = [_nothing(t) for t in traps[:2]]
    return replace(diagnosis, verdict=tuple(traps))


def _nothing(trap: TrapVerdict) -> TrapVerdict:
    """A trap between two models that are one distribution."""
    if trap.missing is not None:
        return trap
    return replace(trap, mean=0.0, present=False, advice=ALIKE)


def _alike(diagnosis: Diagnosis) -> bool:
    """Are both models one distribution, as far as it was measured?"""
    kls = [kl.per_token.mean for by in diagnosis.grid.values() for kl in by.values()]
    return bool(kls) and all(abs(kl) < RESOLUTION for kl in kls)


def flatten(diagnosis: Diagnosis) -> dict[str, float]:
    """The few numbers of a log line: "diagnose/<trap>" -> mean, of what was measured."""
    measured = [t for t in diagnosis.verdict if t.missing is None]
    return {f"diagnose/{t.trap.replace(' ', '_')}": t.mean for t in measured}


def _tail(diagnosis: Diagnosis) -> TrapVerdict:
    divergence = _worse({d: tail.tail_noise_index for d, tail in diagnosis.tail.items()})
    tail = diagnosis.tail[divergence]
    advice, everything = (
        f"distill.tail = 'bucket' and top_k = {tail.top_k}: the first {tail.top_k} classes hold "
        f"{tail.kl_fraction:.0%} of the {divergence} KL, the tail bucket holds the rest; "
        f"{tail.gradient_outside:.0%} of the gradient comes from outside them",
        "the full vocabulary",
    )
    if diagnosis.cross_tokenizer:
        advice = (
            "distill.objective = 'byte' with the whole teacher, not with a cache of its likeliest "
            f"ids: {tail.top_k} of {tail.k[-1]} symbols hold {tail.kl_fraction:.0%} of the "
            f"{divergence} KL, {tail.gradient_outside:.0%} of the gradient comes from outside them"
        )
        everything = "the whole distribution (distill.objective = 'byte')"
    trap = _verdict(
        "tail noise",
        f"tail-noise index, {divergence} KL",
        tail.tail_noise_index,
        1.0,
        advice,
        f"keep {everything}: {_noisy(diagnosis)} weigh no more in the tail than in the first ten "
        "classes",
    )
    return replace(trap, advice=_no_noise(diagnosis)) if math.isnan(trap.mean) else trap


def _noisy(diagnosis: Diagnosis) -> str:
    """The token types of summary.NOISY; a letter alone is of no word."""
    return "punctuation marks" if diagnosis.cross_tokenizer else "function words and punctuation"


def _no_noise(diagnosis: Diagnosis) -> str:
    return (
        f"cannot be measured here: in the first ten classes {_noisy(diagnosis)} carry no KL (a "
        "partial sum of 0 or below), or the texts have none, so there is no lift to compare with"
    )


def _off_policy(diagnosis: Diagnosis) -> TrapVerdict:
    off, measure = diagnosis.off_policy, "KL on student prefixes / on teacher prefixes"
    if off.prefix_ratio is None or off.effective_samples is None:
        return _not_measured("off-policy instability", measure, 1.0, _no_texts(diagnosis))
    divergence = _worse(off.prefix_ratio)
    gradient = _gradient_words(off.gradient, divergence)
    effective = off.effective_samples["whole"].mean
    bytes_ = " with distill.objective = 'byte'" if diagnosis.cross_tokenizer else ""
    return _verdict(
        "off-policy instability",
        f"{divergence} {measure}",
        off.prefix_ratio[divergence],
        1.0,
        f"distill.on_policy > 0{bytes_}: the pair differs more on the student's own prefixes than "
        "on the teacher's, and off-policy texts reach those only as far as the student would "
        f"write them (effective fraction of the teacher's texts under it: {effective:.0%})"
        + gradient
        + _far_apart(diagnosis, ". But"),
        _far_apart(diagnosis, "the pair differs no more on the student's prefixes, but")
        or _off_policy_is_fine(off, divergence, effective) + gradient,
    )


def _off_policy_is_fine(off: OffPolicy, divergence: Divergence, effective: float) -> str:
    """The advice where the trap is not there, with what speaks against it all the same."""
    difference = off.gradient and off.gradient.of(divergence).on_minus_off
    cleaner = bool(difference and difference.low > 0)
    if not cleaner and not effective < EFFECTIVE_ENOUGH:
        return "off-policy texts are as good to learn from as the student's own, and cheaper"
    few = f", though few of them count as the student's own ({effective:.0%})"
    few = few if effective < EFFECTIVE_ENOUGH else ""
    return (
        "the pair differs no more on the student's prefixes, so off-policy texts, which are "
        f"cheaper, show where it differs{few}; try distill.on_policy > 0 beside them"
    )


def _far_apart(diagnosis: Diagnosis, begin: str) -> str:
    """What to do before anything else where the pair differs by more than FAR_APART; else ""."""
    kls = {
        (divergence, prefix): cell.per_token.mean
        for divergence, by_prefix in diagnosis.grid.items()
        for prefix, cell in by_prefix.items()
        if prefix in ("teacher", "student") and cell.per_token.mean > FAR_APART
    }
    if not kls:
        return ""
    divergence, prefix = max(kls, key=lambda key: kls[key])
    kl = kls[divergence, prefix]
    factor = f"{math.exp(kl):.1f}" if kl < 5 else f"{math.exp(kl):.2g}"
    return (
        f"{begin} it is far apart: {divergence} KL of {kl:.2f} nats per token on the {prefix}'s "
        f"prefixes (above {FAR_APART:g}), so tokens of one model are {factor} times less likely to "
        "the other. Bring the student nearer first (distill.objective = 'nll', on_policy = 0.0 on "
        "the teacher's texts), then diagnose again"
    )


def _worse(estimates: dict[Divergence, Estimate]) -> Divergence:
    return max(DIVERGENCES, key=lambda d: np.nan_to_num(estimates[d].mean))


def _gradient_words(gradient: GradientNoise | None, divergence: Divergence) -> str:
    if gradient is None:
        return ""
    compared = gradient.of(divergence)
    difference = compared.on_minus_off
    if difference is None or math.isnan(difference.mean):
        return ""
    on, off = compared.of("student"), compared.of(difference.off)
    assert on is not None and off is not None  # there is no difference without both
    which = "much alike"
    if difference.low > 0:
        which = "cleaner on the student's texts"
    elif difference.high < 0:
        which = "noisier on the student's texts"
    return (
        f"; a gradient is {which}: signal to noise {on.unbiased.mean:.3g}, and "
        f"{off.unbiased.mean:.3g} on the {difference.off}'s"
    )


def _gap(diagnosis: Diagnosis) -> TrapVerdict:
    wrong, trap = diagnosis.gap.wrong_trace, "teacher-student gap"
    measure = "wrong-trace preference (0 = always prefers correct texts)"
    if wrong is None:
        return _not_measured(trap, measure, 0.5, _no_grades(diagnosis))
    likes = (
        "it likes wrong student texts better than correct ones, so its signal on the student's "
        "own texts teaches the wrong thing"
        if wrong.pair.low > 0.5
        else "it cannot be told from a teacher that likes wrong student texts as well as correct "
        f"ones (the interval reaches {wrong.pair.high:.2f}), so its signal on the student's own "
        "texts may teach little"
    )
    return _verdict(
        trap,
        measure,
        wrong.pair,
        0.5,
        "distill.on_policy = 0.0 with correct_only = true, which keeps the teacher's correct texts "
        "(the student's own are never filtered), or calibrate the teacher (calibration.mode = "
        f"'distillable'): {likes}",
        "the teacher tells correct student texts from wrong ones: on-policy distillation has a "
        "signal",
        present=lambda e: not e.high < 0.5,
    )


ALIKE = (
    "nothing: both models give the same distribution at every position, up to rounding "
    f"(KL below {RESOLUTION:g} nats per token)"
)


def _not_measured(trap: str, measure: str, reference: float, why: str) -> TrapVerdict:
    nan, text = math.nan, f"not measured, because {why}"
    return TrapVerdict(trap, measure, nan, nan, nan, nan, 0, reference, None, text, missing=why)


def _no_texts(diagnosis: Diagnosis) -> str:
    """Why there is no comparison of prefixes."""
    absent = [s for s in ("student", "teacher") if s not in diagnosis.texts]
    if not absent:
        return "no text was left to compare"
    return (
        f"there are no texts by the {' and none by the '.join(absent)}: want both in "
        "diagnose.prefixes"
    )


def _no_grades(diagnosis: Diagnosis) -> str:
    """Why the teacher's preference among the student's texts is not known."""
    if "student" not in diagnosis.texts:
        return "there are no texts by the student: want it in diagnose.prefixes"
    return (
        "no finished text of the student has a grade: name a task (task.name), and raise "
        "rollout.max_tokens where texts are truncated"
    )


def _verdict(
    trap: str,
    measure: str,
    e: Estimate,
    reference: float,
    advice: str,
    healthy: str,
    present: Callable[[Estimate], bool] | None = None,
) -> TrapVerdict:
    """present: is the trap there? Default: the interval lies above `reference`."""
    detected = None
    text = (
        f"cannot be decided from {e.n} prompts: it has no interval. Give it more prompts "
        "(data.limit), or more texts of each (diagnose.student_texts)"
    )
    if not math.isnan(e.low):
        detected = bool(present(e) if present else e.low > reference)
        text = advice if detected else healthy
    return TrapVerdict(trap, measure, e.mean, e.std, e.low, e.high, e.n, reference, detected, text)
