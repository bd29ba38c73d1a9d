"""Truncated texts that no grader saw, beside the graded ones of their group.

Their reward is 0, the least that a grader of right and wrong gives. A function of rewards may give
less, as -1 for a wrong answer: running on until the limit would then pay more than answering.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from .graders import Grade


def beside_their_group(grades: Sequence[Grade], group_of: Sequence[Hashable]) -> list[Grade]:
    """The grades, truncated ones with at most the least reward of their group, and with `correct`
    None where the group, or, if all of it is truncated, every graded text, has no right and wrong.
    """
    seen: dict[Hashable, list[Grade]] = defaultdict(list)
    for grade, group in zip(grades, group_of):
        if grade.graded and not grade.failed:
            seen[group].append(grade)
    everywhere = [g for others in seen.values() for g in others]
    numeric = bool(everywhere) and all(g.correct is None for g in everywhere)

    def beside(grade: Grade, others: Sequence[Grade]) -> Grade:
        if grade.graded:
            return grade
        least = min([grade.reward, *(g.reward for g in others)])
        unknown = any(g.correct is None for g in others) if others else numeric
        return replace(grade, reward=least, correct=None if unknown else grade.correct)

    return [beside(grade, seen.get(group, ())) for grade, group in zip(grades, group_of)]
