"""Keep what the runs of a matrix found as a record: python -m bench.matrix FOLDER NAME

The record holds every report of the folder that is there (attacks, knob, ablations, diagnoses), the
commits and versions that the runs wrote into their own logs, and which cells had not ended. A run
from a tree with changes that are not committed makes it refuse.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from .records import FOLDER, device, write

REPORTS = ("report", "knob", "ablations", "diagnoses")


def collect(folder: Path) -> dict:
    """The record's content. ValueError where a run is of a dirty tree, or nothing has ended."""
    matrix = json.loads((folder / "matrix.json").read_text())
    heads, missing = [], []
    for cell in matrix["cells"]:
        run = folder / cell["folder"]
        if not (run / "summary.json").exists():
            missing.append(cell["name"])
        elif (run / "run.jsonl").exists():  # a cell of another module keeps no log
            with open(run / "run.jsonl") as lines:
                heads.append((cell["name"], json.loads(next(lines))))
    if dirty := [name for name, head in heads if head["code"]["dirty"] is not False]:
        raise ValueError(
            f"{folder}: {len(dirty)} runs, such as {dirty[0]}, are of a tree with changes that "
            "were not committed; want numbers that somebody else can make again. Commit, delete "
            "these runs' folders, and run the matrix again"
        )
    if not heads:
        raise ValueError(f"{folder}: no run has ended; want the folder of a matrix that has run")
    commits = Counter(head["code"]["commit"] for _, head in heads)
    found = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in REPORTS
        if (folder / f"{name}.json").exists()
    }
    return {
        "title": matrix["title"],
        "cells": len(matrix["cells"]),
        "not_ended": missing,
        "commits_of_runs": dict(commits),
        "versions_of_runs": heads[0][1]["versions"],
        **device(),
        **found,
    }


def main(arguments: list[str], records: Path = FOLDER) -> int:
    if len(arguments) != 2:
        sys.exit(__doc__)
    try:
        content = collect(Path(arguments[0]))
    except (OSError, ValueError) as error:
        sys.exit(f"No record: {error}")
    print(
        f"Recorded in {write(arguments[1], content, records, command='python -m bench.matrix')}; "
        f"{len(content['not_ended'])} of {content['cells']} cells had not ended"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
