"""One grader for all parts of a mixture: each prompt is graded by the task of its part."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reflux.trainer.config.parts import ranks_of_a_row, tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import TaskSection

from .batch import Rollout
from .grader_options import checked_options
from .graders import Grade
from .task_column import ColumnOptions
from .tasks import task_grader

if TYPE_CHECKING:
    from reflux.trainer.phase import Grader


class RoutedGrader:
    """graders: by the name of the part."""

    def __init__(self, graders: Mapping[str, "Grader"]):
        self._graders = graders

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order."""
        grades: dict[int, Grade] = {}
        for part, grader in self._graders.items():
            mine = [i for i, r in enumerate(rollouts) if r.prompt.part == part]
            if mine:
                grades |= zip(mine, grader.grade([rollouts[i] for i in mine]))
        return [grades[i] for i in range(len(rollouts))]


def build_grader(cfg: Config) -> "Grader":
    """The grader of a run: of [task], or of the parts' tasks. Parts with one task share its
    process. ValueError as build_task, and for a judge whose answers the ranks of a row would not
    share.
    """
    named = {part: task for part, task in tasks(cfg).items() if task.name}
    if ranks_of_a_row(cfg) > 1 and any(map(asks_a_judge, named.values())):
        raise ValueError(
            "task.name = 'judge' with parallelism.tensor_parallel_degree > 1: the ranks that share "
            "a row ask each for itself, and a judge may grade one text differently. Use "
            "tensor_parallel_degree = 1, or a task without a judge"
        )
    if not (cfg.data.parts or cfg.eval.parts):
        return task_grader(cfg.task)
    built: list[tuple[TaskSection, Grader]] = []
    graders = {}
    for part, task in named.items():
        known = next((grader for other, grader in built if other == task), None)
        if known is None:
            known = task_grader(task)
            built.append((task, known))
        graders[part] = known
    return RoutedGrader(graders)


def task_names(cfg: Config) -> str:
    """For messages."""
    return ", ".join(dict.fromkeys(task.name for task in tasks(cfg).values() if task.name))


def asks_a_judge(task: TaskSection) -> bool:
    """Whether a language model grades some of its texts. ValueError as build_task."""
    if task.name != "column":
        return task.name == "judge"
    named = ColumnOptions(**checked_options(task.name, task.options, ColumnOptions)).named()
    return any(name == "judge" for name, _ in named.values())
