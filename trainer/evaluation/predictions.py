"""The answers of an evaluation, one row each, on disk: predictions/step-N.jsonl, and what an
unfinished one has so far.

Every row: mode (greedy, sampled, likelihood_sum, likelihood_per_byte), prompt (its index), id (of
the question itself), sample, answer, correct, reward, extracted, error; position and choice_at, the
places of the right and of the chosen option (from 0; null without).
  generated        text, ended, tokens, nll; outcome, once all rows are there
  by likelihood    logp (nats) and bytes of every option, in the order of the places; extracted is
                   the text of the chosen one
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from reflux.trainer.config.evaluation import LIKELIHOOD
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.graders import Grade

# by way of answering: rows a prompt and sample
MODES = {"greedy": ("greedy",), "sampled": ("sampled",), "likelihood": LIKELIHOOD}
OUTCOMES = ("right", "wrong", "no_answer", "refused", "truncated")


def prompt_id(prompt: Prompt) -> str:
    """12 hex digits of the question and its answer: two runs with the same ones asked the same
    thing.
    """
    text = json.dumps([list(prompt.messages), prompt.answer], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]


def generated_row(
    mode: str, rollout: Rollout, grade: Grade, sample: int, place: Mapping[str, Any]
) -> dict:
    """`place`: id, position and choice_at."""
    return {
        "mode": mode,
        "prompt": rollout.prompt.index,
        "sample": sample,
        "text": rollout.text,
        "answer": rollout.prompt.answer,
        "ended": rollout.ended,
        "tokens": len(rollout.ids),
        "nll": -float(np.sum(rollout.logp)),
        **asdict(grade),
        **place,
    }


def add_outcomes(rows: Iterable[dict], refusal: str, names_answers: bool) -> None:
    """Gives every graded text exactly one of OUTCOMES: right, else cut at the limit, else refused,
    else without an answer, else wrong.

    names_answers: whether the grader says what it took for the answer; if not, a text without an
    answer counts as wrong. A text that made the grader fail is wrong, too (its row has the error).
    """
    expression = re.compile(refusal) if refusal else None
    for row in rows:
        if row["correct"] is None:
            row["outcome"] = None
        elif row["correct"]:
            row["outcome"] = "right"
        elif not row["ended"]:
            row["outcome"] = "truncated"
        elif expression and expression.search(row["text"]):
            row["outcome"] = "refused"
        else:
            missing = names_answers and row["extracted"] is None and row["error"] is None
            row["outcome"] = "no_answer" if missing else "wrong"


def save_rows(folder: Path, step: int, rows: Sequence[dict]) -> None:
    """All of them, in order, or none."""
    _replace(Path(folder) / "predictions" / f"step-{step}.jsonl", rows)


def load_rows(folder: str | Path, option: str) -> list[dict]:
    """The last predictions of a run. ValueError, naming the option that asked for them, where there
    are none.
    """
    files = sorted(
        (Path(folder) / "predictions").glob("step-*.jsonl"),
        key=lambda p: int(p.stem.removeprefix("step-")),
    )
    if not files:
        raise ValueError(
            f"{option} = {str(folder)!r}: no predictions/step-*.jsonl there; want the folder of a "
            "run that has evaluated"
        )
    return [json.loads(line) for line in files[-1].read_text().splitlines()]


class Unfinished:
    """Rows of an evaluation under way, block by block, so that a killed one goes on instead of
    starting again.

    `asked` is all that its answers depend on; rows kept for anything else are not read.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]):
        self._path = Path(folder) / "predictions" / "unfinished.jsonl"
        self._head = json.loads(json.dumps({"asked": asked}, default=list))

    def load(self, samples: Mapping[str, int]) -> list[dict]:
        """Rows of prompts that have all of theirs: `samples` a prompt by way of answering (a key of
        MODES).
        """
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        head, *rows = [json.loads(line) for line in lines] or [{}]
        if head != self._head:
            return []
        way = {mode: way for way in samples for mode in MODES[way]}
        have = Counter((way[row["mode"]], row["prompt"]) for row in rows)
        whole = {(w, p) for (w, p), count in have.items() if count == samples[w] * len(MODES[w])}
        return [row for row in rows if (way[row["mode"]], row["prompt"]) in whole]

    def open(self, rows: Sequence[dict]) -> None:
        """Starts the file anew with the rows that are kept; in one rename, because other ranks may
        be reading it.
        """
        _replace(self._path, (self._head, *rows))

    def add(self, rows: Sequence[dict]) -> None:
        with open(self._path, "a") as file:
            file.write("".join(map(_line, rows)))

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


def _replace(path: Path, lines: Sequence[Mapping]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(map(_line, lines)))
    partial.replace(path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
