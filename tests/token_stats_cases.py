"""What several test files share: token stats cases."""

import numpy as np

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.diagnosis.measure import Curves, TokenStats
from reflux.trainer.diagnosis.token_classes import TYPES

FUNCTION, CONTENT = TYPES.index("function"), TYPES.index("content")


def reading(
    prompt=0,
    writer="student",
    right=None,
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
):
    n = len(student)
    whole, first = np.zeros(len(TYPES)), np.zeros(len(TYPES))
    whole[[FUNCTION, CONTENT]], first[[FUNCTION, CONTENT]] = type_sums, first_sums
    curve = Curves(
        (1, 10),
        np.array([0.9, 0.6]),
        np.array(bucket),
        np.array([0.4 * n, 0.0]),
        whole,
        first,
        np.array([0.3, 0, 0, 0, 0.3]),
        np.array([0.1, 0, 0, 0, 0.3]),
    )
    rollout = Rollout(Prompt(prompt, ()), (1,), ids, (0.0,) * len(ids), 0.0, "ab", ended)
    return TokenStats(
        rollout,
        writer,
        right,
        np.arange(n),
        n,
        np.array(types),
        np.array(student),
        np.array(teacher),
        {"forward": np.array(forward), "reverse": np.array(reverse)},
        {"forward": curve, "reverse": curve},
        np.full(n, 0.5),
        np.full(n, 0.8),
        np.full(n, -0.1),
        np.array(bands),
        np.array(outside),
    )
