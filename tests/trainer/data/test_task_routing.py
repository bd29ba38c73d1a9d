"""Each prompt of a mixture is graded by the task of its part."""

from dataclasses import replace

import pytest

from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import TaskSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.task_routing import asks_a_judge, build_grader, task_names


def answer(part: str, gold: str, text: str) -> Rollout:
    return Rollout(Prompt(0, (), gold, part=part), (1,), (2,), (0.0,), 0.0, text, True)


def config(parts) -> Config:
    base = {
        "phase": "calibrate",
        "folder": "run",
        "model": {"path": "m"},
        "task": {"name": "exact"},
    }
    return fill(Config, base | {"data": {"parts": parts}}, "test")


def test_grades_keep_their_order():
    options = {"marker": "=>"}
    cfg = config(
        {
            "marked": {"source": "a", "task": {"name": "exact", "options": options}},
            "choice": {"source": "b", "task": {"name": "multiple_choice"}},
            "plain": {"source": "c"},
        }
    )
    rollouts = [
        answer("choice", "B", "The answer is B."),
        answer("marked", "4", "so => 4"),
        answer("plain", "4", "so => 4"),
        answer("plain", "4", "4"),
        answer("choice", "B", "(A)"),
    ]
    grades = build_grader(cfg).grade(rollouts)
    assert [g.correct for g in grades] == [True, True, False, True, False]
    assert task_names(cfg) == "exact, multiple_choice"


def test_parts_with_one_task_share_its_grader():
    task = {"name": "exact", "options": {"marker": "=>"}}
    cfg = config({"a": {"source": "a", "task": task}, "b": {"source": "b", "task": task}})
    graders = build_grader(cfg)._graders
    assert graders["a"] is graders["b"] and graders["a"] is not graders[""]


def test_a_judge_is_refused_where_ranks_share_a_row():
    """Each would ask for itself: their rewards, and so their weights, could differ."""
    judge = {"name": "judge", "options": {"server": "http://h:1", "model": "m"}}
    plain = config({"a": {"source": "a"}})
    shared = replace(plain, titan={"parallelism": {"tensor_parallel_degree": 2}})
    assert build_grader(shared)
    for task in (TaskSection(**judge), TaskSection("column", {"tasks": {"a": judge}})):
        with pytest.raises(ValueError, match="ask each for itself, and a judge may grade one text"):
            build_grader(replace(shared, task=task))


def test_a_judge_is_found_behind_a_column():
    judge = {"name": "judge", "options": {"server": "http://h:1", "model": "m"}}
    for task, asks in (
        (TaskSection("judge"), True),
        (TaskSection("math"), False),
        (TaskSection("column", {"tasks": {"a": "math", "b": judge}}), True),
        (TaskSection("column", {"tasks": {"a": "math"}}), False),
    ):
        assert asks_a_judge(task) == asks
