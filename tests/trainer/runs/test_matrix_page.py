"""The page of a matrix: every cell with its state, and a link to a page of its own."""

import json
import re

import pytest
from page_runs import calibration, metrics, record, write_calibration

from reflux.trainer.runs.matrix_page import MatrixLog


def matrix(folder, *names):
    cells = [{"name": f"{n}@0", "folder": f"seed-0/{n}", "labels": {"role": "x"}} for n in names]
    (folder / "matrix.json").write_text(json.dumps({"title": "A sweep", "cells": cells}))
    return MatrixLog(folder)


def test_cells_have_their_state_their_scores_and_a_page(tmp_path):
    write_calibration(tmp_path / "seed-0" / "ended")
    with record(calibration(tmp_path / "seed-0" / "going")) as log:
        log(1, metrics(1), None)
        (tmp_path / "seed-0" / "module").mkdir()
        (tmp_path / "seed-0" / "module" / "summary.json").write_text('{"command": "x"}')
        found = matrix(tmp_path, "ended", "going", "module", "later")
        page = found.write().read_text()
    rows = re.findall(r"<tr><td>(.*?)</td><td><span class=\"badge (\w+)\"", page)
    assert [state for _, state in rows] == ["stopped", "running", "done", "waits"]
    links = [re.search('href="(.*?)"', cell) for cell, _ in rows]
    assert [m and m[1] for m in links[2:]] == [None, None]
    assert all((tmp_path / m[1]).is_file() for m in links[:2])
    assert "greedy 0.5 [0.4, 0.6]" in page and not found.ended


def test_a_page_is_written_again_only_where_there_is_news(tmp_path):
    write_calibration(tmp_path / "seed-0" / "a")
    found = matrix(tmp_path, "a")
    found.write()
    page = tmp_path / "seed-0" / "a" / "report.html"
    first = page.stat().st_mtime_ns
    found.write()
    assert page.stat().st_mtime_ns == first and found.ended


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": 3}'])
def test_a_damaged_matrix_file_is_told(tmp_path, text):
    (tmp_path / "matrix.json").write_text(text)
    with pytest.raises(ValueError, match=r"matrix.json: want the matrix.json of a matrix"):
        MatrixLog(tmp_path)
