"""Token stats of texts with numbers chosen by hand, for the tests of several files."""

import numpy as np

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.diagnosis.measure import KLCurves, TokenStats
from reflux.trainer.diagnosis.results import BothModels, CrossTokenizer
from reflux.trainer.diagnosis.token_classes import TYPES
from reflux.trainer.runs.stats import Estimate

FUNCTION, CONTENT = TYPES.index("function"), TYPES.index("content")


def rollout_of(prompt, ids, ended=True):
    return Rollout(Prompt(prompt, ()), (1,), ids, (0.0,) * len(ids), 0.0, "ab", ended)


def token_stats(
    prompt=0,
    sampled_by="student",
    correct=None,
    student=(-1.0, -1.0),
    teacher=(-2.0, -1.0),
    forward=(0.2, 0.4),
    reverse=(0.1, 0.3),
    bucket=(0.5, 0.6),
    types=(FUNCTION, CONTENT),
    type_sums=(0.3, 0.3),
    first_sums=(0.1, 0.5),
    ended=True,
    ids=(5, 6, 9),
    bands=(0, 4),
    outside=(False, True),
    answer=None,
) -> TokenStats:
    """student, teacher: log-probabilities; first_sums: of the first ten classes, by type as
    type_sums.
    """
    n = len(student)
    whole, first = np.zeros(len(TYPES)), np.zeros(len(TYPES))
    whole[[FUNCTION, CONTENT]], first[[FUNCTION, CONTENT]] = type_sums, first_sums
    curves = KLCurves(
        (1, 10),
        raw_K=np.array([0.9, 0.6]),
        bucket_K=np.array(bucket),
        gradient_tail_K=np.array([0.4 * n, 0.0]),
        type_N=whole,
        type_at_10_N=first,
        band_M=np.array([0.3, 0, 0, 0, 0.3]),
        band_at_10_M=np.array([0.1, 0, 0, 0, 0.3]),
    )
    return TokenStats(
        rollout_of(prompt, ids, ended),
        sampled_by,
        correct,
        start_n=np.arange(n),
        n_bytes=n,
        type_n=np.array(types),
        student_logp_n=np.array(student),
        teacher_logp_n=np.array(teacher),
        kl={"forward": np.array(forward), "reverse": np.array(reverse)},
        curves={"forward": curves, "reverse": curves},
        overlap_n=np.full(n, 0.5),
        teachable_n=np.full(n, 0.8),
        entropy_gap_n=np.full(n, -0.1),
        band_n=np.array(bands),
        outside_n=np.array(outside),
        answer=answer,
    )


def student_diagnosis_cases(tail: bool, ratio: float, prefers_wrong: bool) -> list[TokenStats]:
    """Twelve prompts of one kind: tail noise or not, KL on student prefixes `ratio` times that on
    the teacher's, a teacher that prefers wrong texts or not.
    """
    stats = []
    liked, other = (-1.0, -1.0), (-5.0, -5.0)
    first = (0.1, 0.5) if tail else (0.5, 0.1)
    for i in range(12):
        on_teacher = (0.1, 0.1 + 0.01 * i)
        on_student = (0.1 * ratio, 0.1 * ratio + 0.01 * i)
        stats.append(
            token_stats(i, "teacher", forward=on_teacher, reverse=on_teacher, first_sums=first)
        )
        for correct in (True, False):
            stats.append(
                token_stats(
                    i,
                    "student",
                    correct=correct,
                    forward=on_student,
                    reverse=on_student,
                    teacher=other if correct == prefers_wrong else liked,
                    first_sums=first,
                )
            )
    return stats


def cross_tokenizer() -> CrossTokenizer:
    """What two tokenizers leave to compare."""
    return CrossTokenizer(
        unaligned=3,
        unaligned_by={"student": 2, "teacher": 1},
        byte_positions=40,
        compared=0.75,
        missing=BothModels(0.03, 0.02),
        bits_per_byte_gap={"student": Estimate(0.5, 0.1, 0.4, 0.6, 3)},
        bytes_per_token=BothModels(1.25, 2.5),
    )
