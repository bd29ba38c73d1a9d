"""Each prompt of a mixture is graded by the task of its part."""

from dataclasses import replace

from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import TaskSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.task_routing import (
    UNGRADED,
    GraderNames,
    asks_a_judge,
    build_grader,
    task_names,
)


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


def alone(work):
    """Of a rank whose rows no other one holds."""
    return work()


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
    grades = build_grader(cfg, alone).grade(rollouts)
    assert [g.correct for g in grades] == [True, True, False, True, False]
    assert task_names(cfg) == "exact, multiple_choice"


def test_texts_of_a_part_without_a_task_have_no_grade():
    cfg = config({"a": {"source": "a", "task": {"name": "exact"}}, "b": {"source": "b"}})
    teacher = replace(cfg.teacher, path="t")
    cfg = replace(cfg, phase="distill", task=TaskSection(), teacher=teacher)
    texts = [answer("b", "4", "4"), answer("a", "4", "4"), answer("b", "4", "5")]
    assert build_grader(cfg, alone).grade(texts) == [UNGRADED, Grade(1.0, True, "4"), UNGRADED]
    assert UNGRADED.correct is None and not UNGRADED.graded and not UNGRADED.failed


def test_who_names_answers_is_known_of_each_grader():
    """A function does where one of its texts has one; a row's task is that of its column."""
    column = {"name": "column", "options": {"tasks": {"f": "my:grader", "e": "exact"}}}
    cfg = config(
        {
            "plain": {"source": "a"},
            "own": {"source": "b", "task": {"name": "my:other"}},
            "mixed": {"source": "c", "task": column},
        }
    )
    names = GraderNames(cfg)

    def row(part, **extra):
        return Prompt(0, (), "4", extra=extra, part=part)

    rows = [row("plain"), row("own"), row("mixed", task="f"), row("mixed", task="e")]
    assert [names.of(r) for r in rows] == ["exact", "my:other", "my:grader", "exact"]
    assert names.of(row("mixed", task=["f"])) == names.of(row("mixed")) == ""
    assert names.with_answers((r, None) for r in rows) == {"exact"}
    assert names.with_answers([(rows[1], None), (rows[1], "4")]) == {"my:other"}


def test_parts_with_one_task_share_its_grader():
    task = {"name": "exact", "options": {"marker": "=>"}}
    cfg = config({"a": {"source": "a", "task": task}, "b": {"source": "b", "task": task}})
    graders = build_grader(cfg, alone)._graders
    assert graders["a"] is graders["b"] and graders["a"] is not graders[""]


def test_ranks_that_share_a_row_share_its_grades():
    """Each for itself could come to another one (a time limit, a judge): their weights would
    part.
    """
    asked = []

    def of_the_first_rank(work):
        asked.append(work())
        return [Grade(0.25, None)]

    task = {"name": "exact", "options": {"marker": "=>"}}
    plain = replace(config({"a": {"source": "a"}}), task=TaskSection(**task))
    rollouts = [answer("a", "1", "=> 1")]
    grades = build_grader(plain, of_the_first_rank).grade(rollouts)
    assert not asked and grades[0].reward == 1.0
    shared = replace(plain, titan={"parallelism": {"tensor_parallel_degree": 2}})
    assert build_grader(shared, of_the_first_rank).grade(rollouts) == [Grade(0.25, None)]
    assert asked == [grades]


def test_a_judge_is_found_behind_a_column():
    judge = {"name": "judge", "options": {"server": "http://h:1", "model": "m"}}
    for task, asks in (
        (TaskSection("judge"), True),
        (TaskSection("math"), False),
        (TaskSection("column", {"tasks": {"a": "math", "b": judge}}), True),
        (TaskSection("column", {"tasks": {"a": "math"}}), False),
    ):
        assert asks_a_judge(task) == asks
