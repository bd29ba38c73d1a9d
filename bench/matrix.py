"""The reports of a matrix folder as one record: python -m bench.matrix FOLDER NAME [REPORT ...]

The record holds every report of the folder that is there (attacks, eta sweep, ablations,
diagnoses, texts of each seed side by side), or those that are named (report, texts, ...), the
commits and versions that the runs wrote into their own logs, and the cells that had
not ended. Runs of a tree with uncommitted changes are not recorded.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .records import FOLDER, device, write

# <name>.json of the folder; "knob" is what the eta sweep was called before
REPORTS = ("report", "eta_sweep", "knob", "ablations", "diagnoses")
TEXTS = "texts"  # seed -> texts.json of trainer/studies/side_by_side.py


def collect(folder: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """The content of the record; names: the reports in it, all of them where none is named.
    ValueError where a run is of a dirty tree, or none has ended, or a named report is not there.
    """
    matrix = json.loads((folder / "matrix.json").read_text())
    heads, not_ended = _read_heads(folder, matrix["cells"])
    if dirty := [name for name, head in heads.items() if head["code"]["dirty"] is not False]:
        raise ValueError(
            f"{folder}: {len(dirty)} runs, such as {dirty[0]}, are of a tree with changes that "
            "were not committed; want numbers that can be reproduced. Commit, delete these runs' "
            "folders, and run the matrix again"
        )
    if not heads:
        raise ValueError(f"{folder}: no run has ended; want the folder of a matrix that has run")
    return {
        "title": matrix["title"],
        "cells": len(matrix["cells"]),
        "not_ended": not_ended,
        "commits_of_runs": dict(Counter(head["code"]["commit"] for head in heads.values())),
        "versions_of_runs": next(iter(heads.values()))["versions"],
        **device(),
        **_read_reports(folder, names),
    }


def _read_heads(
    folder: Path, cells: list[dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(head line of each finished run's log, names of the cells that have not ended)."""
    heads, not_ended = {}, []
    for cell in cells:
        run = folder / cell["folder"]
        if not (run / "summary.json").exists():
            not_ended.append(cell["name"])
        elif (run / "run.jsonl").exists():  # a cell of another module has no log
            with open(run / "run.jsonl") as lines:
                head = next(lines, "")
            if not head:
                raise ValueError(f"{run}: run.jsonl is empty, though the run has ended")
            heads[cell["name"]] = json.loads(head)
    return heads, not_ended


def _read_reports(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    paths = {name: folder / f"{name}.json" for name in REPORTS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    texts = {
        file.parts[-3].removeprefix("seed-"): json.loads(file.read_text())
        for file in sorted(folder.glob("seed-*/*/texts.json"))
    }
    found |= {TEXTS: texts} if texts else {}
    # of a matrix with families: one of each
    families = sorted(folder.glob("report-*/report.json"))
    found |= {file.parent.name: json.loads(file.read_text()) for file in families}
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{folder}: no {missing[0]}; there are {', '.join(found) or 'none'}")
    return {name: found[name] for name in names or found}


def main(arguments: Sequence[str] | None = None, records: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.matrix", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("folder", type=Path, help="of the matrix")
    parser.add_argument("name", help="of the record: bench/records/DATE_NAME.json")
    reports = f"only these of {', '.join(REPORTS)}, {TEXTS}; default: all that are there"
    parser.add_argument("reports", nargs="*", metavar="REPORT", help=reports)
    args = parser.parse_args(arguments)
    try:
        content = collect(args.folder, args.reports)
    except (OSError, ValueError) as error:
        sys.exit(f"No record: {error}")
    path = write(args.name, content, records, command="python -m bench.matrix")
    print(
        f"Recorded in {path}; {len(content['not_ended'])} of {content['cells']} cells had not ended"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
