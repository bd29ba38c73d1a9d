"""The texts of a query budget on disk: sampled once, read again by a resumed run, and never sampled
again in its middle, where a half-trained student would choose among them.

teacher_texts.jsonl in the run folder: a line that says how they were sampled, then a line a group.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.runs.files import write_whole
from reflux.trainer.runs.run_folder import MAY_CHANGE, differing, values

from .teacher_cache import key_of

FILE = "teacher_texts.jsonl"
STORED = [f.name for f in fields(Rollout) if f.name != "prompt"]

Groups = list[list[tuple[int, Rollout]]]  # per prompt: (which teacher, rollout)


def save_teacher_texts(folder: Path, recipe: dict[str, Any], groups: Groups) -> None:
    """Writes the file whole. `recipe`: everything that the texts depend on."""
    lines = [json.dumps({"recipe": recipe})]
    for group in groups:
        rows = [{"teacher": t, **{k: getattr(x, k) for k in STORED}} for t, x in group]
        prompt = group[0][1].prompt
        lines.append(json.dumps({"prompt": prompt.index, "key": key_of(prompt), "texts": rows}))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, "\n".join(lines) + "\n")


def load_teacher_texts(
    folder: Path, recipe: dict[str, Any], prompt_of: Callable[[int], Prompt]
) -> Groups | None:
    """The groups of an earlier start of this run; None where there are none. prompt_of: the prompt
    of a row of the source.

    ValueError where they were sampled by a recipe that makes other texts, and where a prompt reads
    otherwise than the one that was asked.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    head, *lines = path.read_text().splitlines()
    _refuse_another_recipe(path, json.loads(head)["recipe"], json.loads(json.dumps(recipe)))
    return [_group(path, json.loads(line), prompt_of) for line in lines]


def _refuse_another_recipe(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """An option that only one of them knows is that of another version, with its default: the run's
    configuration is the same (runs/run_folder.py).
    """
    changed = [
        name
        for name in differing(before, now, MAY_CHANGE)
        if name.count(".") != 1 or all(_knows(table, *name.split(".")) for table in (before, now))
    ]
    if changed:
        raise ValueError(
            f"{path}: the texts of the query budget were bought with other values of "
            f"{values(changed, before, now)}"
        )


def _knows(recipe: dict[str, Any], table: str, option: str) -> bool:
    return option in (recipe.get(table) or {})


def _group(
    path: Path, row: dict[str, Any], prompt_of: Callable[[int], Prompt]
) -> list[tuple[int, Rollout]]:
    prompt, group = prompt_of(row["prompt"]), []
    if row.get("key", key_of(prompt)) != key_of(prompt):  # older versions wrote no key
        raise ValueError(
            f"{path}: the texts of prompt {row['prompt']} were bought for another question than "
            f"the one that is there now, {prompt.question[:60]!r} (the data, data.too_long and "
            "training.seq_len decide)"
        )
    for text in row["texts"]:
        stored: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in text.items()}
        teacher = int(stored.pop("teacher"))
        group.append((teacher, Rollout(prompt=prompt, **stored)))
    return group


def recipe_of(**settings: Any) -> dict[str, Any]:
    """Plain data of settings, dataclasses included."""
    return {k: asdict(v) if hasattr(v, "__dataclass_fields__") else v for k, v in settings.items()}
