"""The budget for failed grades, `task.max_failed`: no success without grades.
Each part of a mixture has that of its own task.

A failed grade says nothing of the response: it is no reward of 0. It leaves its group and its mean,
and too many of them end what asked for them, with the first error in words.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from reflux.trainer.config.sections import TaskSection

FEW = 100  # texts; training has at least the budget of this many, so that one failure ends no run
NEWEST = 1000  # texts that the budget of a training run looks back on

ByPart = Mapping[str, "FailedGrades"]  # name of a part of a mixture -> of its texts


@dataclass(frozen=True)
class FailedGrades:
    """How many texts were given to a grader, and how many it failed on. Sums with `+`."""

    graded: int = 0  # the failed ones too; without truncated texts that no grader saw
    failed: int = 0
    first_error: str | None = None

    def __add__(self, other: "FailedGrades") -> "FailedGrades":
        return FailedGrades(
            self.graded + other.graded,
            self.failed + other.failed,
            self.first_error if self.first_error is not None else other.first_error,
        )

    def check(self, task: str, max_failed: float, *, few: int = 0) -> None:
        """ValueError where more than the fraction `max_failed` failed: of the graded texts, or of
        `few` where they are fewer and not all of them failed.
        """
        base = self.graded if self.failed == self.graded > 1 else max(self.graded, few)
        if self.failed > max_failed * base:
            raise ValueError(
                f"task {task}: grading failed on {self.failed} of {self.graded} texts, more than "
                f"task.max_failed = {max_failed:g} of them; the first error: {self.first_error}. "
                "Mend the grader or the answers, or raise task.max_failed"
            )


def count_failed(errors: Iterable[str | None]) -> FailedGrades:
    """Counts one error, or None, per text that was given to a grader: `[g.error for g in grades if
    g.graded]`.
    """
    listed = list(errors)
    failed = [error for error in listed if error is not None]
    return FailedGrades(len(listed), len(failed), failed[0] if failed else None)


def count_by_part(texts: Iterable[tuple[str, str | None]]) -> dict[str, FailedGrades]:
    """count_failed of each part, from (part, error or None) of texts given to a grader."""
    errors: dict[str, list[str | None]] = {}
    for part, error in texts:
        errors.setdefault(part, []).append(error)
    return {part: count_failed(own) for part, own in errors.items()}


def add_parts(counts: Iterable[ByPart]) -> dict[str, FailedGrades]:
    """The sum over ranks or steps."""
    total: dict[str, FailedGrades] = {}
    for count in counts:
        for part, own in count.items():
            total[part] = total.get(part, FailedGrades()) + own
    return total


def check_parts(counts: ByPart, tasks: Mapping[str, TaskSection], *, few: int = 0) -> None:
    """FailedGrades.check of every part by its own task. tasks: of `config.parts.tasks`; a part that
    is not among them, of another run's answers, has the task of a source without parts.
    """
    for part, count in counts.items():
        task = tasks.get(part, tasks[""])
        count.check(_named(task, part), task.max_failed, few=few)


def _named(task: TaskSection, part: str) -> str:
    return f"{task.name} of part {part}" if part else task.name


class FailedGradesBudgets:
    """The budgets of a training run, of each part by its own task."""

    def __init__(self, tasks: Mapping[str, TaskSection]):
        self._of = {
            part: FailedGradesBudget(_named(task, part), task.max_failed)
            for part, task in tasks.items()
        }

    def add(self, counts: Iterable[ByPart]) -> None:
        """Adds a step's counts, those of all ranks: `engine.gather([count_by_part(...)])`.
        ValueError, the same on every rank, where a budget is used up.
        """
        for part, count in add_parts(counts).items():
            self._of[part].add([count])


class FailedGradesBudget:
    """The budget of one task, over the newest NEWEST graded texts of all ranks."""

    def __init__(self, task: str, max_failed: float):
        self._task, self._max_failed = task, max_failed
        self._steps: deque[FailedGrades] = deque()

    def add(self, counts: Iterable[FailedGrades]) -> FailedGrades:
        """Adds a step's counts, those of all ranks. Returns their sum; ValueError where the budget
        is used up.
        """
        step = sum(counts, FailedGrades())
        if step.graded:  # others would pile up: no newer text pushes them out
            self._steps.append(step)
        total = sum(self._steps, FailedGrades())
        while self._steps and total.graded - self._steps[0].graded >= NEWEST:
            self._steps.popleft()
            total = sum(self._steps, FailedGrades())
        total.check(self._task, self._max_failed, few=FEW)
        return step
