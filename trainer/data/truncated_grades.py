"""Truncated texts that no grader saw, beside the graded ones of their group.

Their reward is 0, the least that a grader of right and wrong gives. A function of rewards may give
less, as -1 for a wrong answer: running on until the limit would then pay more than answering.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from .batch import Rollout
from .graders import Grade
from .minibatches import key_of


def beside_their_group(grades: Sequence[Grade], rollouts: Sequence[Rollout]) -> list[Grade]:
    """The grades of whole groups, truncated texts with at most the least reward of their group.
    `correct` is None where the group has no right and wrong; of a group that is all truncated,
    where no graded text of the same part of the data has.
    """
    of_group: dict[Hashable, list[Grade]] = defaultdict(list)
    of_part: dict[str, list[Grade]] = defaultdict(list)
    for grade, rollout in zip(grades, rollouts):
        if grade.graded and not grade.failed:
            of_group[key_of(rollout.prompt)].append(grade)
            of_part[rollout.prompt.part].append(grade)

    def beside(grade: Grade, rollout: Rollout) -> Grade:
        if grade.graded:
            return grade
        others = of_group[key_of(rollout.prompt)]
        least = min([grade.reward, *(g.reward for g in others)])
        alike = others or of_part[rollout.prompt.part]
        unknown = bool(alike) and all(g.correct is None for g in alike)
        return replace(grade, reward=least, correct=None if unknown else grade.correct)

    return [beside(grade, rollout) for grade, rollout in zip(grades, rollouts)]
