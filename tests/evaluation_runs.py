"""Whole evaluations of the talkers, and what they leave."""

import json
from pathlib import Path
from typing import Any

from runs import config, run_here, write_data

from reflux.trainer.runs.logger import Run

EXACT = {"name": "exact", "options": {"marker": "=>"}}
CHOICE = {"name": "multiple_choice", "options": {"answer_is": "index"}}


def fail_on_odd(prompt, text: str) -> float:
    """A grader that fails on about half of all texts."""
    if sum(map(ord, text)) % 2:
        raise ValueError("odd")
    return len(text) / 10


def fail_on_prompt_1(prompt, text: str) -> bool:
    """A grader that fails on one prompt."""
    if prompt.index == 1:
        raise ValueError("prompt 1")
    return True


def evaluate(talkers: Path, folder: Path, expect: int = 0, **over) -> tuple[Run, list[dict]]:
    """A run with phase = "evaluate" that ends with the exit code `expect`, and its predictions.
    `over`: tables of the configuration, and `source` of [eval].
    """
    source = over.pop("source", None) or str(write_data(folder.parent))
    over["eval"] = {"source": source, "samples": 3} | over.get("eval", {})
    over = {"task": EXACT, "rollout": {"max_tokens": 14}} | over
    run = run_here(config(talkers, folder, "evaluate", **over), expect)
    return run, predictions(folder)


def predictions(folder: Path) -> list[dict]:
    files = list((Path(folder) / "predictions").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().split("\n") if line]


def of_mode(rows: list[dict], mode: str) -> list[dict]:
    return [row for row in rows if row["mode"] == mode]


def results_of(run: Run) -> dict[str, Any]:
    return next(e for e in run.events if e["event"] == "eval")


def verdicts_of(run: Run) -> dict[str, Any]:
    return next(e for e in run.events if e["event"] == "accept")


def write_choices(folder: Path, count: int = 12) -> str:
    path = folder / "choices.jsonl"
    rows = [
        {
            "prompt": f"What is {a}+1?",
            "answer": str(a % 3),
            "choices": [str(a + 1 - a % 3 + i) for i in range(3)],
        }
        for a in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
