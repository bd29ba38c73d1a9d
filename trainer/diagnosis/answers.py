"""What a student's answers say beside right and wrong: pure functions of answers and grades, prompt
by prompt.

    votes          a confidence that does not look at probabilities: how many of n samples agree on
                   the answer
    format breaks  finished texts in which the grader found no answer
    sampling gap   accuracy of the most likely text - accuracy at temperature 1: what sampling costs
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reflux.trainer.runs.stats import Estimate, bootstrap_ratio

from .measure import TokenStats
from .symptoms import confidence_report


def vote(answers: Sequence[str | None], right: Sequence[bool]) -> tuple[float, bool]:
    """(share of the samples that gave the most frequent answer, is it right?); of equally frequent
    ones the first.

    None is no answer and gets no votes; without any answer (0.0, False).
    """
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0, False
    winner, count = votes.most_common(1)[0]
    return count / len(answers), bool(right[answers.index(winner)])


def mean_over_prompts(value: Mapping[int, float]) -> Estimate:
    return bootstrap_ratio(value, dict.fromkeys(value, 1.0))


def sampling_gap(
    greedy: Mapping[int, bool], sampled: Mapping[int, Sequence[bool]]
) -> dict[str, Any]:
    """Accuracy greedy, at temperature 1, and their difference over the prompts that have both;
    intervals over prompts.
    """
    mean = {i: float(np.mean(sampled[i])) for i in greedy if sampled.get(i)}
    right = {i: float(greedy[i]) for i in mean}
    return {
        "greedy": mean_over_prompts(right)._asdict(),
        "sampled": mean_over_prompts(mean)._asdict(),
        "gap": mean_over_prompts({i: right[i] - mean[i] for i in mean})._asdict(),
    }


def answer_symptoms(
    students: Sequence[TokenStats], greedy: Mapping[int, bool], *, names_answers: bool
) -> dict[str, Any]:
    """Of graded texts of the student. names_answers: does the grader say what it took for the
    answer?
    """
    of_prompt: dict[int, list[TokenStats]] = {}
    for r in students:
        if r.right is not None:
            of_prompt.setdefault(r.rollout.prompt.index, []).append(r)
    found: dict[str, Any] = {}
    if not of_prompt:
        return found
    if greedy:
        found["sampling"] = sampling_gap(
            greedy, {i: [bool(r.right) for r in rows] for i, rows in of_prompt.items()}
        )
    if names_answers:
        rows = [r for texts in of_prompt.values() for r in texts]
        found["format_breaks"] = float(
            np.mean([r.rollout.ended and not r.right and r.answer is None for r in rows])
        )
        votes = [
            vote([r.answer for r in texts], [bool(r.right) for r in texts])
            for texts in of_prompt.values()
        ]
        report = confidence_report(*zip(*votes))
        found["vote_confidence"] = vars(report) | {"overconfidence": report.overconfidence}
    return found


def own_errors(continued: Mapping[int, bool], students: Sequence[TokenStats]) -> dict[str, Any]:
    """Right after half of the student's own wrong text, and what the student gets on the same
    prompts from the start.
    """
    if not continued:
        return {}
    afresh = {
        i: float(np.mean([bool(r.right) for r in students if r.rollout.prompt.index == i]))
        for i in continued
    }
    return {
        "own_error": {
            "texts": len(continued),
            "right_after": mean_over_prompts({i: float(x) for i, x in continued.items()})._asdict(),
            "right_from_the_start": mean_over_prompts(afresh)._asdict(),
        }
    }
