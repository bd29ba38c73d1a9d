"""A diagnosis adds up token stats: every number on cases that a hand can compute, intervals over
prompts.
"""

import math
from dataclasses import replace

import pytest
from token_stats_cases import token_stats

from reflux.trainer.diagnosis.results import BandKL, TextCount, TypeKL
from reflux.trainer.diagnosis.summary import diagnose_token_stats
from reflux.trainer.diagnosis.symptoms import Symptoms


def test_the_grid_has_both_divergences_on_every_prefix():
    diagnosis = diagnose_token_stats(
        [
            token_stats(0, "student"),
            token_stats(1, "student", forward=(1.0, 1.0)),
            token_stats(0, "teacher", reverse=(2.0, 0.0)),
        ]
    )
    student = diagnosis.grid["forward"]["student"]
    assert student.per_token.mean == pytest.approx((0.6 + 2.0) / 4)
    assert student.per_text.mean == pytest.approx(1.3)
    assert student.per_byte.mean == pytest.approx(2.6 / 4)
    assert diagnosis.grid["reverse"]["teacher"].per_token.mean == 1.0
    assert diagnosis.texts == {
        "teacher": TextCount(texts=1, prompts=1, tokens=2),
        "student": TextCount(texts=2, prompts=2, tokens=4),
    }


def test_sequence_kls_belong_to_their_own_source_in_both_estimators():
    sequence = diagnose_token_stats(
        [
            token_stats(0, "teacher", student=(-3.0, -1.0), teacher=(-1.0, -1.0)),
            token_stats(0, "student"),
        ]
    ).sequence
    # log p_T - log p_S on the teacher's text
    assert sequence["forward"].sampled_tokens.mean == pytest.approx(2.0)
    # the other way round on the student's
    assert sequence["reverse"].sampled_tokens.mean == pytest.approx(1.0)
    assert sequence["forward"].exact_tokens.mean == pytest.approx(0.6)
    assert sequence["reverse"].exact_tokens.mean == pytest.approx(0.4)


def test_intervals_are_over_prompts_not_tokens():
    """Eight texts of one prompt are one observation: no interval. Two prompts that differ: from one
    value to the other.
    """

    def per_token(stats):
        return diagnose_token_stats(stats).grid["forward"]["student"].per_token

    one = per_token([token_stats(0, "student", forward=(float(i), 0.0)) for i in range(8)])
    assert one.n == 1 and math.isnan(one.low)
    two = per_token([token_stats(i, "student", forward=(2.0 * i, 2.0 * i)) for i in (0, 1)])
    assert (two.low, two.mean, two.high) == (0.0, 1.0, 2.0)


def test_the_tail_on_numbers_by_hand():
    stats = [token_stats(0, "teacher")]
    tail = diagnose_token_stats(stats, kl_fraction=0.8).tail["forward"]
    # 0.5 / 0.6 is over 80 %
    assert tail.bucket == pytest.approx([0.25, 0.3]) and tail.top_k == 1
    assert tail.gradient_outside == pytest.approx(0.4) and tail.kl_fraction == 0.8
    assert diagnose_token_stats(stats, kl_fraction=0.9).tail["forward"].top_k == 10
    # function words: half the KL over half the tokens, a sixth of the first ten's: 1 / (1 / 3)
    assert tail.tail_noise_index.mean == pytest.approx(3.0)
    assert vars(tail.types["function"]) == pytest.approx(vars(TypeKL(0.5, 1 / 6, 0.5)))
    assert tail.sparsity == 1.0  # 0.4 of 0.6 is not 80 %: both tokens


def test_bands_compare_their_fraction_of_the_kl_with_that_of_the_tokens():
    def bands_of(stats):
        return diagnose_token_stats(stats).tail["forward"].bands

    stats = [token_stats(0, "teacher", bands=(0, 0)), token_stats(1, "teacher", bands=(0, 1))]
    bands = bands_of(stats)
    assert vars(bands["top 10"]) == pytest.approx(vars(BandKL(0.5, 0.25, 0.75, 2 / 3, 1 / 3)))
    assert bands["11-100"].lift == 0 and bands["11-100"].frequency == 0.25
    assert bands["never seen"].fraction == 0.5 and math.isnan(bands["never seen"].lift)
    for name in ("fraction", "fraction_at_10", "frequency"):
        assert sum(getattr(b, name) for b in bands.values()) == pytest.approx(1.0)
    assert str(bands_of(stats[::-1])) == str(bands)  # NaN is not equal to itself
    assert bands_of([replace(s, band_n=None) for s in stats]) == {}


def test_off_policy_compares_prompts_that_both_answered():
    off = diagnose_token_stats(
        [
            token_stats(0, "teacher", forward=(0.1, 0.1)),
            token_stats(0, "student", forward=(0.3, 0.3)),
            token_stats(1, "student", forward=(9.0, 9.0)),
        ]
    ).off_policy
    ratio = off.prefix_ratio["forward"]
    assert ratio.mean == pytest.approx(3.0) and ratio.n == 1
    assert off.effective_samples["whole"].mean == pytest.approx(1.0)
    decile = off.decile["forward"]
    assert len(decile["student"]) == 10
    assert decile["teacher"][0] == pytest.approx(0.1) and math.isnan(decile["teacher"][3])


def test_effective_samples_fall_with_unequal_weights():
    same = token_stats(0, "teacher", student=(-1.0, -1.0), teacher=(-1.0, -1.0))
    far = token_stats(1, "teacher", student=(-50.0, -1.0), teacher=(-1.0, -1.0))
    ess = diagnose_token_stats([same, far]).off_policy.effective_samples
    # no text is longer than 16 tokens
    assert ess["whole"].mean == pytest.approx(0.5) and list(ess) == ["whole"]


def test_log_ratios_have_no_sign_and_a_tail():
    stats = [
        token_stats(0, "teacher", student=(-3.0, -1.0), teacher=(-1.0, -1.0)),
        token_stats(1, "teacher", student=(-1.0, -1.0), teacher=(-1.0, -5.0)),
    ]
    size = diagnose_token_stats(stats).off_policy.log_ratio  # 2, 0, 0, 4
    assert size.mean.mean == pytest.approx(1.5)
    assert size.max == 4.0 and size.p99 == pytest.approx(2 + 2 * 0.97)
    assert diagnose_token_stats([token_stats(0, "student")]).off_policy.log_ratio is None


def test_the_student_on_what_the_teacher_solves():
    # the last id is the stop token
    one = {"student": (-2.0, -1.0), "teacher": (-1.0, -1.0), "ids": (5, 9)}
    sure = {"student": (0.0, 0.0), "teacher": (0.0, 0.0), "ids": (5, 9)}
    students = [
        token_stats(0, "student", correct=True),
        token_stats(0, "student", correct=False),
        token_stats(1, "student", correct=False),
        token_stats(1, "student", correct=False),
        token_stats(2, "student", correct=True),
    ]
    teachers = [
        token_stats(0, "teacher", correct=True, **one),
        token_stats(0, "teacher", correct=False),
        token_stats(1, "teacher", correct=True, **sure),
    ]
    gap = diagnose_token_stats(teachers + students).gap
    # one content token over two bytes each, two texts
    bits = gap.correct_teacher_bits_per_byte
    assert bits.student.mean == pytest.approx(2.0 / math.log(2) / 4)
    assert bits.teacher.mean == pytest.approx(1.0 / math.log(2) / 4)
    solved = gap.on_solved_by_teacher
    assert solved.n == 2 and solved.pass_at_n.mean == 0.5
    assert solved.accuracy.mean == 0.25 and solved.accuracy.n == 2
    gap = diagnose_token_stats(students).gap
    assert gap.correct_teacher_bits_per_byte is None and gap.on_solved_by_teacher is None


def test_the_gap_needs_finished_graded_texts_of_the_student():
    gap = diagnose_token_stats(
        [
            token_stats(0, "student", correct=True, teacher=(-4.0, -4.0)),
            token_stats(0, "student", correct=False, teacher=(-1.0, -1.0)),
            token_stats(0, "student", correct=False, ended=False),
            token_stats(0, "teacher", correct=True),
        ]
    ).gap
    assert gap.wrong_trace.graded_texts == 2 and gap.wrong_trace.pair.mean == 1.0
    assert gap.wrong_trace.margin.mean == pytest.approx(3.0)
    assert gap.degraded_prefix == pytest.approx(1.0)
    assert gap.overlap.mean == pytest.approx(0.5) and gap.teachable.mean == pytest.approx(0.8)
    assert diagnose_token_stats([token_stats()]).gap.wrong_trace is None


def test_symptoms_are_of_the_student_only():
    symptoms = diagnose_token_stats(
        [
            token_stats(0, "student", correct=True, student=(0.0, 0.0)),
            token_stats(1, "student", correct=False, student=(0.0, 0.0), ended=False),
            token_stats(0, "teacher", ended=False),
        ]
    ).symptoms
    # the teacher's text does not count
    assert symptoms.off_nucleus == symptoms.truncated == 0.5
    assert symptoms.confidence.confident_wrong == symptoms.confidence.overconfidence == 0.5
    assert diagnose_token_stats([token_stats(0, "teacher")]).symptoms == Symptoms()
