"""Runs of bench/PROTOCOL.md as they are, ended or not, as one record.

    python -m bench.language NAME RUN ... [--against RUN] [--texts 12]

A row a run: its folder's name, behind its seed's; steps done of steps asked; the curve; every
evaluation, and of the last one of weights that were kept the fraction of each style and item-level
intervals over questions; the first sampled texts. --against: a run whose answers to the same
questions are subtracted, pair by pair (item-level, too: one run says nothing about another seed).
Runs of a tree with uncommitted changes are not recorded.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.runs.answer_files import answer_files
from reflux.trainer.runs.files import to_json
from reflux.trainer.runs.logger import load_run
from reflux.trainer.runs.stats import mean_over_prompts, paired_difference
from reflux.trainer.studies.finished_runs import grades

from .records import FOLDER, ROOT, device, write

CURVE = ("step", "loss", "grad_norm", "reward/task", "reward/cal", "eta", "std_cal")
CURVE += ("cal/length_r2", "reference_kl", "length", "entropy", "truncated")
MODES = ("sampled", "greedy")
STYLES = ("language_a_models", "language_c")  # matrices, task by task


def styles() -> Mapping[str, str]:
    """Name -> regular expression, as the matrices of all tasks have them; no text fits two."""
    files = [ROOT / "configs" / f"{name}.toml" for name in STYLES]
    return {k: v for file in files for k, v in tomllib.loads(file.read_text())["styles"].items()}


def row_of(folder: Path, against: Path | None, texts: int) -> dict[str, Any]:
    """One run. ValueError where its tree had changes."""
    run = load_run(folder)
    if run.head["code"]["dirty"] is not False:
        raise ValueError(f"{folder}: of a tree with changes that were not committed")
    seed = f"{folder.parent.name}/" if folder.parent.name.startswith("seed-") else ""
    row: dict[str, Any] = {"run": f"{seed}{folder.name}", "commit": run.head["code"]["commit"]}
    row |= {"steps_done": run.steps[-1]["step"] if run.steps else 0}
    row |= {"steps_asked": run.head["config"]["steps"], "ended": run.summary is not None}
    row["stopped"] = (run.summary or {}).get("stopped")
    row["curve"] = [{k: s[k] for k in CURVE if k in s} for s in run.steps]
    row["evals"] = [
        {k: v for k, v in e.items() if k == "step" or k.startswith("eval/")}
        for e in run.events
        if e["event"] == "eval"
    ]
    return row | _answers(folder, against, texts)


def _answers(folder: Path, against: Path | None, texts: int) -> dict[str, Any]:
    step, mine = _predictions(folder)
    if not mine:
        return {}
    out: dict[str, Any] = {"answers_at_step": step, "answers": {}}
    theirs = _predictions(against)[1] if against else []
    _refuse_other_questions(folder, mine, against, theirs)
    for mode in MODES:
        rows, other = ([p for p in ps if p["mode"] == mode] for ps in (mine, theirs))
        if rows:
            out["answers"][mode] = _measured(rows, other)
    sampled = [p for p in mine if p["mode"] == "sampled" and p["sample"] == 0]
    out["texts"] = [{k: p[k] for k in ("prompt", "text", "correct")} for p in sampled[:texts]]
    return out


def _refuse_other_questions(
    folder: Path, mine: Sequence[dict], against: Path | None, theirs: Sequence[dict]
) -> None:
    ids = {p["prompt"]: p.get("id") for p in theirs}
    for p in mine:
        if ids.get(p["prompt"], p.get("id")) != p.get("id"):
            raise ValueError(
                f"{folder} and {against} were asked different questions: prompt {p['prompt']} is "
                "another one there; want runs with the same [eval] data"
            )


def _measured(rows: Sequence[dict], other: Sequence[dict]) -> dict[str, Any]:
    """Of one mode: graded answers, and those of the other run."""
    graded = list(zip(rows, grades(rows)))
    by_prompt: dict[int, list[float]] = {}
    for p, grade in graded:
        by_prompt.setdefault(p["prompt"], []).append(grade)
    measured: dict[str, Any] = {
        "questions": len(by_prompt),
        "answers": len(rows),
        "correct, item-level": mean_over_prompts(
            {k: sum(v) / len(v) for k, v in by_prompt.items()}
        ),
        "bytes": sum(len(p["text"].encode()) for p in rows) / len(rows),
        "styles": {},
    }
    for name, form in styles().items():
        found = [grade for p, grade in graded if re.search(form, p["text"])]
        correct = sum(found) / len(found) if found else None
        measured["styles"][name] = {"fraction": len(found) / len(rows), "correct": correct}
    theirs = dict(zip(map(_place, other), grades(other) if other else ()))
    both = [(grade, theirs[_place(p)]) for p, grade in graded if _place(p) in theirs]
    if both:
        change = paired_difference([a for a, _ in both], [b for _, b in both])
        measured["change against the other run, item-level"] = change
    return measured


def _place(prediction: Mapping[str, Any]) -> tuple[int, int]:
    return prediction["prompt"], prediction["sample"]


def _predictions(folder: Path) -> tuple[int, list[dict]]:
    """The last of the weights that were kept, and their step; 0 and nothing without. Not those
    whose grade failed, which says nothing of the text.
    """
    files = answer_files(folder)
    if not files:
        return 0, []
    step, file = list(files.items())[-1]
    rows = [json.loads(x) for x in file.read_text().split("\n") if x]
    return step, [p for p in rows if p.get("error") is None]


def main(arguments: list[str] | None = None, records: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--texts", type=int, default=12)
    args = parser.parse_args(arguments)
    try:
        rows = [row_of(run, args.against, args.texts) for run in args.runs]
    except (OSError, ValueError) as error:
        print(f"No record: {error}", file=sys.stderr)
        return 2
    content = {"intervals": "item-level; one seed yields no verdict", "runs": to_json(rows)}
    print("Recorded in", write(args.name, device() | content, records, "python -m bench.language"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
