"""Rows that say themselves how they are graded: the task is chosen by a column of the row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reflux.trainer.config.fit import nearest

from .batch import Rollout
from .graders import Grade

if TYPE_CHECKING:  # it imports the engine's modules
    from reflux.trainer.phase import Grader

Build = Callable[[str, Mapping[str, Any]], "Grader"]


@dataclass(frozen=True)
class ColumnOptions:
    """The options of the task column."""

    column: str = "task"  # of the row; its value is a key of `tasks`
    # value of the column -> the name of a task, or a table with its name and options
    tasks: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(
                "task column: tasks is missing; want a task for each value of the column "
                f"{self.column!r}, e.g. tasks = {{ sums = 'math', facts = 'exact' }}"
            )
        self.named()

    def named(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Value of the column -> (name of its task, options). ValueError for anything else."""
        found: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for value, task in self.tasks.items():
            table: Any = {"name": task} if isinstance(task, str) else task
            known = isinstance(table, Mapping) and set(table) <= {"name", "options"}
            if not known or not isinstance(table.get("name"), str):
                raise ValueError(
                    f"task column: tasks.{value} = {task!r}; want the name of a task, or a table "
                    "with name and options"
                )
            if table["name"] == "column":
                raise ValueError(f"task column: tasks.{value} is a column again; want a task")
            found[value] = (table["name"], table.get("options", {}))
        return found

    def task_of(self, extra: Mapping[str, Any]) -> str:
        """The name of the task of a row with these columns; "" where it names none."""
        own, named = extra.get(self.column), self.named().items()
        return next((name for value, (name, _) in named if value == own), "")


class ColumnGrader:
    """A Grader. A row whose column names no task is a failed grade."""

    def __init__(self, options: ColumnOptions, build: Build):
        """ValueError as `build`, which makes a grader of a name and options."""
        self._column = options.column
        self._graders = {value: build(*task) for value, task in options.named().items()}

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order."""
        values = [r.prompt.extra.get(self._column) for r in rollouts]
        grades: dict[int, Grade] = {}
        for value, grader in self._graders.items():
            mine = [i for i, v in enumerate(values) if v == value]
            if mine:
                grades |= zip(mine, grader.grade([rollouts[i] for i in mine]))
        return [grades.get(i) or self._failed(values[i]) for i in range(len(rollouts))]

    def _failed(self, value: Any) -> Grade:
        known = ", ".join(self._graders)
        hint = nearest(str(value), self._graders)
        error = f"column {self._column} = {value!r} names no task{hint} Known: {known}"
        return Grade(0.0, False, error=error)
