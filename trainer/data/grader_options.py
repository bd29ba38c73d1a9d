"""From the name and the options of a task to its grader."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from reflux.trainer.config.fit import fit, nearest, spell

from .attempt import GradeText
from .graders import Exact, Function, Instructions, Math, MultipleChoice, ReasoningGym
from .sources import load_function

GRADERS: dict[str, type] = {
    "exact": Exact,
    "math": Math,
    "multiple_choice": MultipleChoice,
    "instructions": Instructions,
    "reasoning_gym": ReasoningGym,
}
TASKS = (*GRADERS, "reward_model", "judge", "column")


@dataclass(frozen=True)
class Limits:
    """Options of the tasks of GRADERS and of functions; docs/trust.md has what they are for."""

    timeout_s: float = 10.0  # for one response
    grade_truncated: bool = False  # False: a truncated response has reward 0 and is not correct
    # False: a package.module:function runs in the trainer's process, with all that it may do
    isolate: bool = True
    trust_model_text: bool = False  # True: go on where the machine allows no sandbox
    memory_gib: float = 8.0  # of the process that grades


def make_grader(name: str, options: Mapping[str, Any]) -> tuple[GradeText, Limits]:
    """The grader of one text and its limits. ValueError for an unknown name or option, with the
    nearest one.
    """
    kind = Function if ":" in name else GRADERS.get(name)
    if kind is None:
        raise ValueError(
            f"unknown task {name!r}{nearest(name, TASKS)} Known: {', '.join(TASKS)}, "
            "package.module:function"
        )
    checked = checked_options(name, options, kind, Limits)
    common = {f.name for f in fields(Limits)}
    limits = Limits(**{key: value for key, value in checked.items() if key in common})
    _check_limits(name, limits, kind)
    own = {key: value for key, value in checked.items() if key not in common}
    if kind is Function:
        own["function"] = load_function(name)
    return kind(**own), limits


def _check_limits(name: str, limits: Limits, kind: type) -> None:
    if limits.timeout_s <= 0:
        raise ValueError(f"task {name}: timeout_s = {limits.timeout_s}; want more than 0 seconds")
    if limits.memory_gib <= 0:
        raise ValueError(f"task {name}: memory_gib = {limits.memory_gib}; want more than 0 GiB")
    if not limits.isolate and kind is not Function:
        raise ValueError(
            f"task {name}: isolate = false is for graders of your own, package.module:function; "
            "leave it out. Where the machine allows no sandbox, trust_model_text = true goes on "
            "without one"
        )


def checked_options(task: str, options: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """Options of these dataclasses, each as its field wants it. ValueError, too, for one that has
    no default and is not given.
    """
    known = [(kind, f) for kind in kinds for f in fields(kind) if f.name != "function"]
    hints = {f.name: get_type_hints(kind)[f.name] for kind, f in known}
    for key in options:
        if key not in hints:
            raise ValueError(
                f"task {task}: unknown option {key}{nearest(key, hints)} Known: {', '.join(hints)}"
            )
    for _, f in known:
        if f.default is MISSING and f.default_factory is MISSING and f.name not in options:
            raise ValueError(
                f"task {task}: task.options.{f.name} is missing; want {spell(hints[f.name])}"
            )
    return {key: fit(value, hints[key], f"task {task}: {key}") for key, value in options.items()}
