"""The configurations that are shipped, by name: `quickstart`, `miniature/calibrate`, ...

A recipe's name is its file below configs/ without the suffix. `recipe:NAME` stands for the file
wherever a configuration names another one (`base`, the `config` of a cell), so that a file of one's
own can build on a shipped one from any folder.
"""

from dataclasses import dataclass
from pathlib import Path

from .files import SUFFIXES
from .fit import nearest

FOLDER = Path(__file__).parents[2] / "configs"  # of a checkout, and beside trainer/ in a wheel
PREFIX = "recipe:"


@dataclass(frozen=True)
class Suggestion:
    """A recipe worth starting from, in a user's words."""

    name: str
    purpose: str
    needs: str
    takes: str


# The first one is the one to take first. Times are those of the recipes' own first lines.
SUGGESTED = (
    Suggestion(
        "quickstart",
        "the method on small models from random weights: teachers, students, a report",
        "two idle CPU cores",
        "9 minutes",
    ),
    Suggestion(
        "debug_cpu_distill",
        "one distillation with random models: a short file to change into your own",
        "one CPU core; first `python -m reflux.trainer.studies.debug_models`",
        "10 s",
    ),
    Suggestion(
        "debug_cpu_calibrate",
        "one calibration with random models, every part of it",
        "one CPU core; first `python -m reflux.trainer.studies.debug_models`",
        "10 s",
    ),
    Suggestion(
        "lora/calibrate_qwen3-8b_1gpu",
        "calibrate an 8 B teacher by LoRA, the smallest start with a real one; not run yet",
        "one GPU of 80 GB, models/Qwen3-8B, models/Qwen3-0.6B",
        "cost unknown",
    ),
    Suggestion(
        "paper/distill_qwen3-1.7b_8gpu",
        "distil a 1.7 B student from a calibrated 8 B teacher; not run yet",
        "8 x 80 GB and an export of the calibration",
        "196.8 H100-h reported",
    ),
)


def names() -> list[str]:
    """Of all recipes, sorted."""
    files = (p for s in SUFFIXES for p in FOLDER.rglob(f"*{s}"))
    return sorted(p.relative_to(FOLDER).with_suffix("").as_posix() for p in files)


def purpose(name: str) -> str:
    """The first line of a recipe, without its command: what it is for, and mostly its cost."""
    lines = recipe(name).read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("#").split(": `")[0].strip() if lines else ""


def recipe(name: str) -> Path:
    """The file of a recipe. ValueError with the nearest name."""
    for suffix in SUFFIXES:
        file = FOLDER / f"{name}{suffix}"
        if file.is_file():
            return file
    raise ValueError(f"no recipe {name!r}{nearest(name, names())} All of them: reflux init --all")


def find(given: str) -> Path:
    """The file that somebody means: a path, a recipe's name, or recipe:NAME. What is neither comes
    back as a path, for the error of whoever opens it; ValueError for an unknown recipe:NAME.
    """
    if given.startswith(PREFIX):
        return recipe(given.removeprefix(PREFIX))
    path = Path(given)
    if path.exists() or path.suffix in (*SUFFIXES, ".py") or path.is_absolute():
        return path
    return recipe(given)


def beside(folder: Path, given: str) -> Path:
    """The file that a configuration in `folder` names: relative to it, or recipe:NAME."""
    return recipe(given.removeprefix(PREFIX)) if given.startswith(PREFIX) else folder / given
