"""From names and options to graders; wrong ones are in test_tasks.py."""

import pytest

from reflux.trainer.data.grader_options import GRADERS, TASKS, Limits, checked_options, make_grader
from reflux.trainer.data.graders import Exact, Function, Grade
from reflux.trainer.data.prompt import Prompt
from reflux.trainer.data.tasks import build_task


def test_options_go_to_the_grader_and_to_its_limits():
    grader, limits = make_grader("exact", {"marker": "####", "timeout_s": 3, "isolate": True})
    assert grader == Exact(marker="####") and limits == Limits(timeout_s=3.0)
    assert set(TASKS) == {*GRADERS, "column", "judge", "reward_model"}


def test_a_function_is_loaded_by_its_name():
    grader, limits = make_grader("operator:eq", {"threshold": 0.5, "isolate": False})
    assert isinstance(grader, Function) and limits.isolate is False
    prompt = Prompt(0, ())
    assert grader(prompt, prompt) == Grade(1.0, True)


def test_the_sandbox_is_the_default():
    assert Limits().isolate and not Limits().trust_model_text


@pytest.mark.parametrize("name", sorted(GRADERS))
def test_every_grader_says_whether_it_may_run_text(name):
    grader, _ = make_grader(name, {})
    assert grader.evaluates == (name in ("math", "reasoning_gym"))
    assert grader.cannot_hang == (not grader.evaluates)


def test_options_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="task exact: timeout_s = 'x'; want a finite float"):
        checked_options("exact", {"timeout_s": "x"}, Exact, Limits)


def test_an_option_without_a_default_is_missed_by_name():
    """A TypeError of the grader before."""
    with pytest.raises(ValueError, match="^task reward_model: task.options.path is missing; want"):
        build_task("reward_model", {"batch_size": 3})
