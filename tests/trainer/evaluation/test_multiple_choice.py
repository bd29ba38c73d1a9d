"""Options by likelihood. Scored in test_evaluator.py."""

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.options import Options
from reflux.trainer.evaluation.multiple_choice import choices_by_likelihood
from reflux.trainer.evaluation.predictions import OptionScores, prompt_id


def ask(answer="B", choices=("red", "green", "blue"), index=0):
    return Prompt(
        index,
        ({"role": "system", "content": "s"}, {"role": "user", "content": "Which?"}),
        answer,
        None,
        {"choices": choices, "more": 1},
    )


def test_the_best_in_sum_and_per_byte_differ():
    options = Options(("A", "B", "C"), ("no", "é" * 4, "maybe"), 1)
    total, per_byte = choices_by_likelihood(ask(), options, [-2.0, -4.0, -6.0])
    assert (total.mode, total.choice_at, total.correct) == ("likelihood_sum", 0, False)
    assert total.extracted == "no" and total.reward == 0.0
    assert (per_byte.mode, per_byte.choice_at) == ("likelihood_per_byte", 1)
    assert per_byte.correct and per_byte.reward == 1.0 and per_byte.position == 1
    assert per_byte.options == OptionScores((-2.0, -4.0, -6.0), (2, 8, 5))
    assert total.id == per_byte.id == prompt_id(ask())
    assert choices_by_likelihood(ask(), options, [0.0] * 3, "q")[0].id == "q"
