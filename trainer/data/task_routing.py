"""One grader for all parts of a mixture: each prompt is graded by the task of its part."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from reflux.trainer.config.parts import tasks
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import TaskSection

from .batch import Prompt, Rollout
from .grader_options import checked_options
from .graders import Grade
from .task_column import ColumnOptions
from .tasks import task_grader

if TYPE_CHECKING:
    from reflux.trainer.phase import Grader

UNGRADED = Grade(0.0, None, graded=False)  # of a text whose part has no task
OncePerRow = Callable[[Callable[[], list[Grade]]], list[Grade]]


class RoutedGrader:
    """graders: by the name of the part; a part without one has UNGRADED texts."""

    def __init__(self, graders: Mapping[str, "Grader"]):
        self._graders = graders

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order."""
        grades: dict[int, Grade] = {}
        for part, grader in self._graders.items():
            mine = [i for i, r in enumerate(rollouts) if r.prompt.part == part]
            if mine:
                grades |= zip(mine, grader.grade([rollouts[i] for i in mine]))
        return [grades.get(i, UNGRADED) for i in range(len(rollouts))]


class SharedGrader:
    """Grades once for the ranks that hold the same rows. A time limit, a judge or a reward model
    may give one text two grades, and the weights of these ranks would part.
    """

    def __init__(self, grader: "Grader", once_per_row: OncePerRow):
        self._grader, self._once_per_row = grader, once_per_row

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order. Collective over the ranks of a row."""
        return self._once_per_row(lambda: self._grader.grade(rollouts))


def build_grader(cfg: Config, once_per_row: OncePerRow) -> "Grader":
    """The grader of a run: of [task], or of the parts' tasks. Parts with one task share its
    process. once_per_row: the engine's. ValueError as build_task.
    """
    grader = _grader_of_parts(cfg)
    return SharedGrader(grader, once_per_row) if cfg.ranks_of_a_row > 1 else grader


def _grader_of_parts(cfg: Config) -> "Grader":
    named = {part: task for part, task in tasks(cfg).items() if task.name}
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


class GraderNames:
    """Which task grades a prompt's texts, and whether it names the answers it finds."""

    def __init__(self, cfg: Config):
        """ValueError as build_task."""
        self._names = {part: task.name for part, task in tasks(cfg).items()}
        self._columns = {
            part: ColumnOptions(**checked_options(task.name, task.options, ColumnOptions))
            for part, task in tasks(cfg).items()
            if task.name == "column"
        }

    def of(self, prompt: Prompt) -> str:
        """The name of the task of its part, or of the one that its row names; "" without one."""
        column = self._columns.get(prompt.part)
        return self._names[prompt.part] if column is None else column.task_of(prompt.extra)

    def with_answers(self, texts: Iterable[tuple[Prompt, str | None]]) -> set[str]:
        """The tasks that name answers, from (prompt, the answer found or None) of texts. A user's
        function may name none at all: then none of its texts lacks one.
        """
        pairs = ((self.of(prompt), answer) for prompt, answer in texts)
        return {name for name, answer in pairs if ":" not in name or answer is not None}


def task_names(cfg: Config) -> str:
    """For messages."""
    return ", ".join(dict.fromkeys(task.name for task in tasks(cfg).values() if task.name))


def asks_a_judge(task: TaskSection) -> bool:
    """Whether a language model grades some of its texts. ValueError as build_task."""
    if task.name != "column":
        return task.name == "judge"
    named = ColumnOptions(**checked_options(task.name, task.options, ColumnOptions)).named()
    return any(name == "judge" for name, _ in named.values())
