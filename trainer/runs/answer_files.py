"""Which files of predictions/ hold the answers of a run: those of evaluations in its log, of
weights that were kept. A guard that goes back leaves the files of the weights that it rejected, and
so does a run that was resumed from an earlier step.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .logger import LOG, load_run


def kept_step(events: Iterable[Mapping[str, Any]]) -> float:
    """The step of the exported weights, where a guard went back to one; else inf."""
    ends = [e.get("restored_step") for e in events if e["event"] == "stopped"]
    return math.inf if not ends or ends[-1] is None else ends[-1]


def answer_files(folder: str | Path) -> dict[int, Path]:
    """Step -> predictions/step-N.jsonl, in order. A folder without a log has all of its
    files.
    """
    files = {_step_of(file): file for file in Path(folder).glob("predictions/step-*.jsonl")}
    if not (Path(folder) / LOG).is_file():
        return dict(sorted(files.items()))
    events = load_run(folder).events
    logged, kept = {e["step"] for e in events if e["event"] == "eval"}, kept_step(events)
    return {step: file for step, file in sorted(files.items()) if step <= kept and step in logged}


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))
