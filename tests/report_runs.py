"""Finished runs with known numbers, for the tests of the reports."""

import json

STYLES = {"easy": "^e", "hard": "^h"}
PROMPTS = 100
TEACHERS = {"original": 0.9, "distillable": 0.91, "undistillable": 0.89}


def write_run(folder, labels, sampled, greedy, answered=1.0, seed="0", steps=3, config=None):
    """A finished run whose last evaluation has the given fractions of correct answers among
    PROMPTS prompts. `answered`: fraction of texts with an answer. Returns its cell of matrix.json.
    """
    folder.mkdir(parents=True)
    head = {"config": config or {}, "code": {"commit": "c0ffee"}, "versions": {"torch": "2"}}
    lines = [{"schema": 1} | head]
    lines += [
        {
            "step": s,
            "wall_s": s,
            "loss": 1.0 / s,
            "reference_kl": 0.01 * s,
            "reward/task": 0.5,
            "length": 9,
        }
        for s in range(1, steps + 1)
    ]
    lines += [
        {"event": "eval", "step": s, "wall_s": s, "eval/sampled": v, "eval/greedy": greedy}
        for s, v in ((0, 0.1), (steps, sampled))
    ]
    write_lines(folder / "run.jsonl", lines)
    (folder / "summary.json").write_text(json.dumps({"wall_s": 10.0}))
    (folder / "predictions").mkdir()
    rows = [
        prediction(i, i < answered * PROMPTS, i < fraction * PROMPTS, mode=mode)
        for mode, fraction in (("sampled", sampled), ("greedy", greedy))
        for i in range(PROMPTS)
    ]
    write_lines(folder / f"predictions/step-{steps}.jsonl", rows)
    return {
        "name": folder.name,
        "folder": folder.name,
        "command": "torchrun ...",
        "labels": labels | {"seed": seed},
    }


def prediction(prompt, answered, correct, mode="sampled"):
    """A row of predictions/*.jsonl; three texts in four have the style easy."""
    return {
        "mode": mode,
        "prompt": prompt,
        "sample": 0,
        "text": "e" if prompt % 4 else "h",
        "correct": answered and correct,
        "extracted": "x" if answered else None,
    }


def write_matrix(folder, scores, answered=1.0, teachers=None, start=None, seeds="01"):
    """Two seeds of teachers and of one student each, by the attack kd, or of other seeds. scores,
    teachers: name -> accuracy; start: accuracy of the student before the attack.
    """
    cells = []
    begun = {} if start is None else {"start": "student"}
    for seed in seeds:
        for name, accuracy in (teachers or TEACHERS).items():
            labels = {"role": "teacher", "teacher": name}
            run = folder / f"t-{name}-{seed}"
            cells.append(write_run(run, labels, accuracy, accuracy, seed=seed))
        for name, accuracy in scores.items():
            labels = {"role": "student", "teacher": name, "attack": "kd"} | begun
            fraction = answered if name == "undistillable" else 1.0
            run = folder / f"s-{name}-{seed}"
            cells.append(write_run(run, labels, accuracy, accuracy, fraction, seed=seed))
        if start is not None:
            labels = {"role": "start", "student": "student"}
            cells.append(write_run(folder / f"start-{seed}", labels, start, start, seed=seed))
    write_cells(folder, cells)


def write_cells(folder, cells):
    (folder / "matrix.json").write_text(
        json.dumps({"title": "T", "styles": STYLES, "cells": cells})
    )


def add_runs(folder, runs, config=None, seeds="01"):
    """More runs into a matrix folder, one per seed of each (labels, accuracy). Their likelihood
    accuracy is the same number.
    """
    matrix = json.loads((folder / "matrix.json").read_text())
    for labels, accuracy in runs:
        for seed in seeds:
            name = "-".join(filter(None, labels.values())).replace(" ", "_")
            run = folder / f"{name}-{seed}"
            cell = write_run(run, labels, accuracy, accuracy, seed=seed, config=config)
            edit_logs(folder, [run.name], _with_likelihood)
            matrix["cells"].append(cell)
    (folder / "matrix.json").write_text(json.dumps(matrix))


def _with_likelihood(row):
    known = "eval/sampled" in row
    return row | {"eval/likelihood_sum": row["eval/sampled"]} if known else row


def edit_logs(folder, names, edit):
    """`edit` on each line of the logs whose folder begins so. Lines for which it returns None go; a
    list replaces its line.
    """
    for log in (p for name in names for p in folder.glob(f"{name}*/run.jsonl")):
        rows = [edit(json.loads(line)) for line in log.read_text().splitlines()]
        write_lines(
            log, [x for r in rows if r is not None for x in (r if isinstance(r, list) else [r])]
        )


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
