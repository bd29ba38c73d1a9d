"""The task of a row, named by a column of it."""

import pytest

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.tasks import build_task
from reflux.trainer.engine.fingerprints import _task

TASKS = {"sums": "math", "facts": {"name": "exact", "options": {"marker": "A:"}}}


def rollout(kind, text, answer):
    extra = {} if kind is None else {"kind": kind}
    prompt = Prompt(0, ({"role": "user", "content": "?"},), answer=answer, extra=extra)
    return Rollout(prompt, (), (1,), (0.0,), 0.0, text, True)


def test_each_row_is_graded_by_its_own_task_in_order():
    grader = build_task("column", {"column": "kind", "tasks": TASKS})
    texts = [
        rollout("facts", "so A: red", "red"),
        rollout("sums", r"\boxed{4/2}", "2"),
        rollout("facts", r"\boxed{2}", "2"),
        rollout("fact", "A: red", "red"),
        rollout(None, "A: red", "red"),
    ]
    grades = grader.grade(texts)
    assert [g.correct for g in grades] == [True, True, False, False, False]
    assert [g.failed for g in grades] == [False, False, False, True, True]
    assert "kind = 'fact' names no task, did you mean facts?" in grades[3].error
    assert (
        "kind = None names no task" in grades[4].error and "Known: sums, facts" in grades[4].error
    )


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "tasks is missing"),
        ({"tasks": {"a": 1}}, "tasks.a = 1; want the name"),
        ({"tasks": {"a": {"nam": "math"}}}, "want the name of a task, or a table"),
        ({"tasks": {"a": "maths"}}, "unknown task 'maths', did you mean math?"),
        ({"tasks": {"a": "column"}}, "a column again"),
        ({"tasks": {"a": "math"}, "colum": "b"}, "did you mean column?"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ValueError) as error:
        build_task("column", options)
    assert says in str(error.value)


def test_the_files_of_all_its_tasks_are_inputs_of_the_run(tmp_path):
    (tmp_path / "t.txt").write_text("{response}")
    judge = {"server": "http://h:1", "model": "m", "template": str(tmp_path / "t.txt")}
    tasks = {"a": {"name": "judge", "options": judge}, "b": "math"}
    source = _task("column", {"tasks": tasks})
    assert list(source.files) == ["a/template"] and "math-verify" in source.versions
