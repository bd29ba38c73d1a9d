"""distill.correct_only: what it asks of a grader."""

from collections.abc import Iterable

from reflux.trainer.data.graders import Grade
from reflux.trainer.phase import Engine


def check_right_and_wrong(grades: Iterable[Grade], engine: Engine, tasks: str) -> None:
    """ValueError, on every rank, for rewards without right and wrong: no text would pass, without a
    word. tasks: their names. Collective.
    """
    unknown = engine.sum(float(sum(g.correct is None and not g.failed for g in grades)))
    if unknown:
        raise ValueError(
            f"distill.correct_only with task {tasks}: {unknown:.0f} grades are a reward alone, "
            "neither correct nor wrong, so that these texts never pass. Set "
            "task.options.threshold, from which on a number of a function is correct, let it "
            "return True or False, or leave correct_only out"
        )
