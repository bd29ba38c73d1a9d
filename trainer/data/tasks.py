"""The task reward: graders under limits, rollouts -> grades.

One bad response never stops a run: an exception, or running out of time, becomes a failed Grade of
that response with the reason in it. Where a grader runs:

    the trainer's process   exact and multiple_choice, which compare texts in linear time
    a server, or here       judge and reward_model, which only read texts
    a sandboxed process     every other one (sandbox.py): killed when late, whatever it does
    isolate = false         a user's function in the trainer's process, under an alarm (attempt.py);
                            outside the main thread in a process of its own, without a sandbox
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reflux.trainer.config.sections import TaskSection

from .attempt import GraderAlarm, GradeText, attempt
from .batch import Prompt, Rollout
from .grader_options import Limits, checked_options, make_grader
from .graders import NO_ANSWER, Grade, has_answer, read_grade
from .judge import JudgeGrader, JudgeOptions
from .row_checks import NEEDS_ANSWER
from .sandbox import GraderProcess, Sandbox, find_sandbox
from .task_column import ColumnGrader, ColumnOptions

if TYPE_CHECKING:  # it imports the engine's modules
    from reflux.trainer.phase import Grader

log = logging.getLogger(__name__)


class LimitedGrader:
    """One of GRADERS, or a user's function, under limits; made by build_task."""

    def __init__(
        self,
        name: str,
        grader: GradeText,
        limits: Limits,
        options: Mapping[str, Any],
        sandbox: Sandbox | None,
    ):
        self.name, self._grader, self._limits = name, grader, limits
        self._process = GraderProcess(name, options, limits, sandbox)
        self._failures = 0

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order. Never raises or hangs because of one response."""
        with self._limited() as grader:
            return [self._counted(r.prompt, self._one(grader, r)) for r in rollouts]

    def _limited(self) -> AbstractContextManager[GradeText]:
        if _cannot_hang(self._grader):
            return nullcontext(self._grader)
        if self._limits.isolate or threading.current_thread() is not threading.main_thread():
            return nullcontext(self._process.grade)
        return GraderAlarm(self._limits.timeout_s, self._grader)

    def _one(self, grader: GradeText, rollout: Rollout) -> Grade:
        if not rollout.ended and not self._limits.grade_truncated:
            if self.name in NEEDS_ANSWER and not has_answer(rollout.prompt):
                return Grade(0.0, False, error=NO_ANSWER)  # not wrong: nobody knows
            return Grade(0.0, False, graded=False)
        return attempt(grader, rollout.prompt, rollout.text)

    def _counted(self, prompt: Prompt, grade: Grade) -> Grade:
        if grade.error is not None:
            self._failures += 1
            if self._failures <= 3 or self._failures.bit_count() == 1:  # then at 4, 8, 16, ...
                log.warning(
                    "task %s: grading failed %d times so far, now on prompt %d: %s",
                    self.name,
                    self._failures,
                    prompt.index,
                    grade.error,
                )
        return grade


class RewardModelGrader:
    """Grades by a reward model, without a time limit. A truncated response is scored like any
    other: a reward of 0 would be above many logits.
    """

    def __init__(self, options: Mapping[str, Any]):
        from .reward_model import RewardModel, RewardModelOptions  # here: imports transformers

        checked = checked_options("reward_model", options, RewardModelOptions)
        self._model = RewardModel(RewardModelOptions(**checked))

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout: the raw logit as the reward, `correct` None."""
        scores = self._model.score([r.prompt for r in rollouts], [r.text for r in rollouts])
        grades = [attempt(read_grade, score) for score in scores]
        failed = [grade.error for grade in grades if grade.error is not None]
        if failed:
            log.warning(
                "task reward_model: %d of %d texts were not scored, the first: %s",
                len(failed),
                len(grades),
                failed[0],
            )
        return grades


class AnswerGrader:
    """Grades what follows the last `marker`, as where a model thinks before it answers; a text
    without it is graded whole.
    """

    def __init__(self, grader: "Grader", marker: str):
        self._grader, self._marker = grader, marker

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order."""
        return self._grader.grade(
            [replace(r, text=r.text.rpartition(self._marker)[2]) for r in rollouts]
        )


def task_grader(task: TaskSection) -> "Grader":
    """The grader of a section. ValueError as build_task."""
    grader = build_task(task.name, task.options)
    return AnswerGrader(grader, task.thinking_end) if task.thinking_end else grader


def build_task(name: str, options: Mapping[str, Any]) -> "Grader":
    """The grader of a task.

    name: exact, math, multiple_choice, reasoning_gym, reward_model, judge, column, or
    `package.module:function` of a user's f(prompt, text) -> bool | float | Grade. options: fields
    of the grader and of Limits.
    ValueError for an unknown name or option, with the nearest one, and where a grader that may
    evaluate text wants a sandbox that the machine does not allow.
    """
    if name == "reward_model":
        return RewardModelGrader(options)
    if name == "judge":
        return JudgeGrader(JudgeOptions(**checked_options(name, options, JudgeOptions)))
    if name == "column":
        return ColumnGrader(
            ColumnOptions(**checked_options(name, options, ColumnOptions)), build_task
        )
    grader, limits = make_grader(name, options)
    sandbox = None
    if limits.isolate and not _cannot_hang(grader):
        found = find_sandbox()
        if isinstance(found, Sandbox):
            sandbox = found
        elif getattr(grader, "evaluates", True):
            if not limits.trust_model_text:
                raise _no_sandbox(name, found)
            log.warning(
                "task %s: no sandbox (%s); what a model wrote may run with the rights of this user",
                name,
                found,
            )
    return LimitedGrader(name, grader, limits, options, sandbox)


def _cannot_hang(grader: GradeText) -> bool:
    return getattr(grader, "cannot_hang", False)


def _no_sandbox(task: str, reason: str) -> ValueError:
    own = ", isolate = false where it is a function of yours that runs no text" * (":" in task)
    return ValueError(
        f"task {task}: it may evaluate what a model wrote, and wants a sandbox, which this machine "
        f"does not allow: {reason}. It needs Linux, libseccomp and pyseccomp. Or set "
        "task.options.trust_model_text = true to run it with the rights of this user"
        f"{own} (docs/trust.md)"
    )
