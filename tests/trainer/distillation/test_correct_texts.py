"""What distill.correct_only asks of a grader (runs with it: test_texts.py)."""

from types import SimpleNamespace

import pytest

from reflux.trainer.data.graders import Grade
from reflux.trainer.distillation.correct_texts import check_right_and_wrong

RIGHT, WRONG = Grade(1.0, True), Grade(0.0, False)
FAILED, CUT = Grade(0.0, None, error="it raised"), Grade(0.0, False, graded=False)


def test_every_rank_is_told_of_a_reward_alone():
    """The sum is over all ranks: one that has graded nothing raises, too."""
    for elsewhere in (0.0, 1.0):
        engine = SimpleNamespace(sum=lambda mine, elsewhere=elsewhere: mine + elsewhere)
        check_right_and_wrong([RIGHT, WRONG, FAILED, CUT], SimpleNamespace(sum=float), "exact")
        grades = [] if elsewhere else [RIGHT, Grade(0.5, None)]
        with pytest.raises(ValueError, match="with task m:f: 1 grades are a reward alone.*thresh"):
            check_right_and_wrong(grades, engine, "m:f")
