"""Verdicts on pairs of known numbers: present, absent, and inconclusive without an interval."""

import math
import re
from dataclasses import replace

import pytest
from token_stats_cases import cross_tokenizer, student_diagnosis_cases, token_stats

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.diagnosis.gradient_snr import (
    GradientComparison,
    GradientNoise,
    OnMinusOff,
    SignalToNoise,
)
from reflux.trainer.diagnosis.report import estimate_text
from reflux.trainer.diagnosis.summary import diagnose_token_stats
from reflux.trainer.diagnosis.verdict import flatten, with_verdict
from reflux.trainer.runs.stats import Estimate


def verdict(stats):
    return with_verdict(diagnose_token_stats(stats)).verdict


def test_verdicts_go_both_ways():
    sick = verdict(student_diagnosis_cases(True, 4.0, True))
    healthy = verdict(student_diagnosis_cases(False, 0.5, False))
    traps = ["tail noise", "off-policy instability", "teacher-student gap"]
    assert [t.trap for t in sick] == [t.trap for t in healthy] == traps
    assert all(t.present for t in sick) and not any(t.present for t in healthy)
    for trap, words in zip(sick, ("bucket", "on_policy", "distillable")):
        assert words in trap.advice
    # its signal on the student's own texts: those are never filtered
    assert sick[2].advice.startswith("distill.on_policy = 0.0 with correct_only = true")
    assert all(t.low <= t.mean <= t.high for t in sick + healthy)


def test_a_number_without_an_interval_is_inconclusive():
    one = verdict(
        [
            token_stats(0, "teacher"),
            token_stats(0, "student", correct=True),
            token_stats(0, "student", correct=False),
        ]
    )
    assert [t.present for t in one] == [None] * 3
    assert all("cannot be decided from 1 prompts" in t.advice for t in one)
    # no prompt has correct and wrong texts
    unusable = verdict([token_stats(i, "student", correct=True) for i in range(3)])[-1]
    assert unusable.present is None and unusable.n == 0


@pytest.mark.parametrize(
    "low, high, words",
    [(0.1, 0.3, "cleaner on the student's"), (-0.3, -0.1, "noisier on"), (-0.1, 0.3, "much alike")],
)
def test_the_gradient_joins_the_advice_and_not_the_verdict(low, high, words):
    diagnosis = diagnose_token_stats(student_diagnosis_cases(False, 4.0, False))
    plain = with_verdict(diagnosis).verdict

    def ratio(mean):
        return SignalToNoise(Estimate(mean, 0.1, 0.0, 1.0, 8), plain=1.0)

    difference = OnMinusOff(0.2, 0.1, low, high, 8, "teacher")
    one = GradientComparison(ratio(0.4), ratio(0.2), on_minus_off=difference)
    noise = GradientNoise(one, one, batches=8, texts_of_each=8, tokens={})
    diagnosis = replace(diagnosis, off_policy=replace(diagnosis.off_policy, gradient=noise))
    joined = with_verdict(diagnosis).verdict
    assert words in joined[1].advice
    assert "signal to noise 0.4, and 0.2 on the teacher's" in joined[1].advice
    assert joined[0] == plain[0]
    assert [replace(t, advice="") for t in joined] == [replace(t, advice="") for t in plain]


@pytest.mark.parametrize("kl, far", [(0.5, False), (0.99, False), (1.01, True), (2.7, True)])
@pytest.mark.parametrize("times", [1.0, 2.0])
def test_a_pair_that_is_far_apart_is_never_advised_as_if_it_were_near(kl, far, times):
    """times: KL on the student's prefixes / on the teacher's; the larger one is `kl`."""
    stats = []
    for i in range(12):
        for writer, nats in (("teacher", kl / times), ("student", kl)):
            cell = (nats, nats)
            stats.append(token_stats(i, writer, correct=True, forward=cell, reverse=cell))
    trap = verdict(stats)[1]
    assert trap.present is (times > 1)
    assert ("as good to learn from" in trap.advice) is (times == 1 and not far)
    assert ("distill.on_policy > 0" in trap.advice) is (times > 1)
    assert (f"KL of {kl:.2f} nats per token on the" in trap.advice) is far
    assert ("Bring the student nearer first" in trap.advice) is far
    if kl == 2.7:
        assert "14.9 times less likely" in trap.advice


def test_a_tail_without_function_words_is_no_verdict():
    """In the first ten classes they carry nothing: no lift to compare with, so no number and no
    interval of the prompts that happen to have one.
    """
    diagnosis = diagnose_token_stats([token_stats(i, "teacher") for i in range(3)])
    nothing = Estimate(math.nan, math.nan, math.nan, math.nan, 3)
    tail = {d: replace(t, tail_noise_index=nothing) for d, t in diagnosis.tail.items()}
    trap, *_ = with_verdict(replace(diagnosis, tail=tail)).verdict
    assert trap.present is None and trap.advice.startswith("cannot be measured here")
    assert estimate_text(nothing) == "no number"
    assert estimate_text(Estimate(0.5, math.nan, math.nan, math.nan, 1)) == "0.500 (no interval)"


@pytest.mark.parametrize("cross", [False, True])
def test_across_tokenizers_the_tail_noise_is_that_of_punctuation_alone(cross):
    """A byte that is a letter is of no word, so always content."""
    stats = student_diagnosis_cases(False, 0.5, False)
    diagnosis = replace(
        diagnose_token_stats(stats), cross_tokenizer=cross_tokenizer() if cross else None
    )
    nothing = Estimate(math.nan, math.nan, math.nan, math.nan, 3)
    tail = {d: replace(t, tail_noise_index=nothing) for d, t in diagnosis.tail.items()}
    for d in (diagnosis, replace(diagnosis, tail=tail)):
        advice = with_verdict(d).verdict[0].advice
        assert ("function words" not in advice and "punctuation" in advice) is cross, advice


def test_a_trap_that_was_not_measured_stands_there_and_says_why():
    stats = [token_stats(i, "teacher") for i in range(3)]
    diagnosis = with_verdict(diagnose_token_stats(stats))
    tail, off_policy, gap = diagnosis.verdict
    assert tail.missing is None and off_policy.trap == "off-policy instability"
    assert off_policy.advice.startswith("not measured, because there are no texts by the student")
    assert gap.advice.startswith("not measured, because there are no texts by the student")
    assert math.isnan(gap.mean) and gap.present is None
    assert flatten(diagnosis) == {"diagnose/tail_noise": pytest.approx(3.0)}
    ungraded = [token_stats(i, w) for i in range(3) for w in ("teacher", "student")]
    gap = with_verdict(diagnose_token_stats(ungraded)).verdict[2]
    assert "no finished text of the student has a grade: name a task" in gap.advice


def test_advice_does_not_contradict_the_numbers_beside_it():
    """Off-policy texts are not called as good where few of them count, or a gradient is cleaner on
    the student's; a preference below 0.5 is not called liking.
    """
    diagnosis = diagnose_token_stats(student_diagnosis_cases(False, 0.5, False))
    off = diagnosis.off_policy
    few = {k: e._replace(mean=0.03) for k, e in off.effective_samples.items()}
    trap = with_verdict(replace(diagnosis, off_policy=replace(off, effective_samples=few))).verdict[
        1
    ]
    assert "as good to learn from" not in trap.advice and "(3%)" in trap.advice
    sick = diagnose_token_stats(student_diagnosis_cases(True, 4.0, True))
    wide = Estimate(0.35, 0.1, 0.2, 0.52, 12)
    gap = replace(sick.gap, wrong_trace=replace(sick.gap.wrong_trace, pair=wide))
    advice = with_verdict(replace(sick, gap=gap)).verdict[2].advice
    assert "cannot be told from" in advice and "0.52" in advice
    assert "likes wrong student texts better" in with_verdict(sick).verdict[2].advice


def test_the_advice_for_two_tokenizers_is_a_config_that_exists():
    diagnosis = diagnose_token_stats(student_diagnosis_cases(True, 4.0, True))
    advice = with_verdict(replace(diagnosis, cross_tokenizer=cross_tokenizer())).verdict[0].advice
    assert advice.startswith("distill.objective = 'byte' with the whole teacher")
    options = dict(re.findall(r"(\w+) = '(\w+)'", advice))
    assert DistillSection(**options).objective == "byte"


def test_two_equal_models_have_no_trap_whatever_rounding_leaves():
    """Ratios of two roundings are noise: 4e-9 / 1e-9 is no instability."""
    tiny = [
        replace(s, kl={d: 1e-9 * x for d, x in s.kl.items()})
        for s in student_diagnosis_cases(True, 4.0, True)
    ]
    verdict = with_verdict(diagnose_token_stats(tiny)).verdict
    assert [t.present for t in verdict] == [False, False, True]
    assert all(t.mean == 0 and "same distribution" in t.advice for t in verdict[:2])
