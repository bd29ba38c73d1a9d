"""The texts of a query budget on disk: sampled once, read again by a resumed run.

teacher_texts.jsonl in the run folder: a line that says how they were sampled, then a line a group.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.runs.files import write_whole

FILE = "teacher_texts.jsonl"
STORED = [f.name for f in fields(Rollout) if f.name != "prompt"]

Groups = list[list[tuple[int, Rollout]]]  # per prompt: (which teacher, rollout)


def save_teacher_texts(folder: Path, recipe: dict[str, Any], groups: Groups) -> None:
    """Writes the file whole. `recipe`: everything that the texts depend on."""
    lines = [json.dumps({"recipe": recipe})]
    for group in groups:
        rows = [{"teacher": t, **{k: getattr(x, k) for k in STORED}} for t, x in group]
        lines.append(json.dumps({"prompt": group[0][1].prompt.index, "texts": rows}))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, "\n".join(lines) + "\n")


def load_teacher_texts(
    folder: Path, recipe: dict[str, Any], prompt_of: Callable[[int], Prompt]
) -> Groups | None:
    """The groups of an earlier start of this run; None where there are none, or where they were
    sampled by another recipe. prompt_of: the prompt of a row of the source.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    head, *lines = path.read_text().splitlines()
    if json.loads(head)["recipe"] != json.loads(json.dumps(recipe)):
        return None
    return [_group(json.loads(line), prompt_of) for line in lines]


def _group(row: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> list[tuple[int, Rollout]]:
    prompt, group = prompt_of(row["prompt"]), []
    for text in row["texts"]:
        stored: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in text.items()}
        teacher = int(stored.pop("teacher"))
        group.append((teacher, Rollout(prompt=prompt, **stored)))
    return group


def recipe_of(**settings: Any) -> dict[str, Any]:
    """Plain data of settings, dataclasses included."""
    return {k: asdict(v) if hasattr(v, "__dataclass_fields__") else v for k, v in settings.items()}
