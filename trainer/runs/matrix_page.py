"""report.html of a matrix folder: its cells with their state, their last evaluation and links to
their own pages; matrix_page.html.jinja lays it out.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .charts import number
from .files import write_whole
from .run_log import Line, RunLog
from .run_page import PARTIAL, REPORT, environment, pictures, status, write_run_page
from .run_panels import evaluation_names

TEMPLATE = "matrix_page.html.jinja"
MATRIX = "matrix.json"
REFRESH_S = 30
SHOWN_METRICS = 2  # of a cell's last evaluation
IMAGES = {  # pictures of a matrix's reports -> title
    "students.png": "Student accuracy by attack and teacher",
    "calibration.png": "Calibration: rewards and KL over steps",
    "styles.png": "Answer styles of the teachers",
    "curves.png": "Students over training",
    "eta_sweep.png": "The sweep over eta",
}
FILES = ("report.md", "eta_sweep.md", "ablations.md", "diagnoses.md", "matrix.json")


@dataclass(frozen=True)
class CellRow:
    name: str
    labels: str
    state: str  # of the badge
    words: str
    steps: str
    scores: str
    page: str  # relative address of its page; empty without one
    folder: str


class MatrixLog:
    """The cells of a matrix folder, each read on from where the last call ended. ValueError where
    there is no matrix.json that can be read.
    """

    def __init__(self, folder: Path):
        self.folder, self._logs = folder, dict[Path, RunLog]()
        self.table = self._read()

    def _read(self) -> dict[str, Any]:
        path = self.folder / MATRIX
        try:
            table = json.loads(path.read_text())
            return {"title": str(table.get("title", "")), "cells": list(table["cells"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: want the matrix.json of a matrix ({error})") from None

    def write(self, *, refresh: bool = False) -> Path:
        """Writes the pages of all cells that have news, and the page of the matrix. refresh: a
        browser reads them anew while cells run.
        """
        rows = [self._row(cell, refresh) for cell in self.table["cells"]]
        self.ended = all(row.state not in ("running", "waits") for row in rows)
        path = self.folder / REPORT
        page = (
            environment()
            .get_template(TEMPLATE)
            .render(
                title=self.table["title"] or f"Matrix: {self.folder.resolve().name}",
                rows=rows,
                counts=Counter(row.state for row in rows),
                pictures=pictures(self.folder, IMAGES),
                files=self._files(),
                written=datetime.now(UTC).isoformat(timespec="seconds"),
                refresh=REFRESH_S if refresh and not self.ended else 0,
            )
        )
        write_whole(path, page, partial=PARTIAL)
        return path

    def _files(self) -> list[str]:
        families = sorted(self.folder.glob("report-*/report.md"))
        there = [name for name in FILES if (self.folder / name).is_file()]
        return [*(str(f.relative_to(self.folder)) for f in families), *there]

    def _row(self, cell: Mapping[str, Any], refresh: bool) -> CellRow:
        relative = str(cell.get("folder", ""))
        folder = self.folder / relative
        log = self._logs.setdefault(folder, RunLog(folder))
        news = log.refresh()
        if log.head and (news or not (folder / REPORT).exists()):
            write_run_page(log, refresh=refresh)
        state, words = _state(log)
        labels = cell.get("labels") or {}
        return CellRow(
            name=str(cell.get("name", relative)),
            labels=", ".join(f"{k} {v}" for k, v in labels.items()),
            state=state,
            words=words,
            steps=str(log.steps[-1]["step"]) if log.steps else "",
            scores=_scores(log),
            page=f"{relative}/{REPORT}" if log.head else "",
            folder=relative,
        )


def _state(log: RunLog) -> tuple[str, str]:
    if not log.head:
        return ("done", "") if log.summary is not None else ("waits", "not started")
    state = status(log)
    return state.word, "" if state.word in ("done", "running") else state.reason


def _scores(log: RunLog) -> str:
    evaluations = [e for e in log.events if e["event"] == "eval"]
    if not evaluations:
        return ""
    last: Line = evaluations[-1]
    names = evaluation_names([last])[:SHOWN_METRICS]
    return "; ".join(f"{name} {_estimate(last, name)}" for name in names)


def _estimate(line: Line, name: str) -> str:
    found = [line.get(f"eval/{name}{end}") for end in ("", "_low", "_high")]
    values = [number(x) for x in found if isinstance(x, int | float)]
    return f"{values[0]} [{values[1]}, {values[2]}]" if len(values) == 3 else "no number"
