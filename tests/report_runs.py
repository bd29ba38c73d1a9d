"""What several test files share: report runs."""

import json

STYLES = {"easy": "^e", "hard": "^h"}


def write_run(folder, labels, sampled, greedy, answered=1.0, seed="0", steps=3, config=None):
    """A finished run whose last evaluation has the given shares of right answers among 100
    prompts.
    """
    folder.mkdir(parents=True)
    lines = [
        {
            "schema": 1,
            "config": config or {},
            "code": {"commit": "c0ffee"},
            "versions": {"torch": "2"},
        }
    ]
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
    (folder / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "summary.json").write_text(json.dumps({"wall_s": 10.0}))
    (folder / "predictions").mkdir()
    rows = []
    for mode, right in (("sampled", sampled), ("greedy", greedy)):
        for i in range(100):
            has = i < answered * 100
            rows.append(
                {
                    "mode": mode,
                    "prompt": i,
                    "sample": 0,
                    "text": "e" if i % 4 else "h",
                    "correct": has and i < right * 100,
                    "extracted": "x" if has else None,
                }
            )
    (folder / f"predictions/step-{steps}.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    return {
        "name": folder.name,
        "folder": folder.name,
        "command": "torchrun ...",
        "labels": labels | {"seed": seed},
    }


def write_matrix(folder, scores, answered=1.0, teachers=None, start=None):
    teachers = teachers or {"original": 0.9, "distillable": 0.91, "undistillable": 0.89}
    cells = []
    for seed in "01":
        for name, accuracy in teachers.items():
            cells.append(
                write_run(
                    folder / f"t-{name}-{seed}",
                    {"role": "teacher", "teacher": name},
                    accuracy,
                    accuracy,
                    seed=seed,
                )
            )
        begun = {} if start is None else {"start": "student"}
        for name, accuracy in scores.items():
            cells.append(
                write_run(
                    folder / f"s-{name}-{seed}",
                    {"role": "student", "teacher": name, "attack": "kd"} | begun,
                    accuracy,
                    accuracy,
                    answered if name == "undistillable" else 1.0,
                    seed=seed,
                )
            )
        if start is not None:
            cells.append(
                write_run(
                    folder / f"start-{seed}",
                    {"role": "start", "student": "student"},
                    start,
                    start,
                    seed=seed,
                )
            )
    (folder / "matrix.json").write_text(
        json.dumps({"title": "T", "styles": STYLES, "cells": cells})
    )
