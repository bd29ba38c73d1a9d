"""Results as JSON: every kind of value, no NaN, and whole files."""

import json
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

from reflux.trainer.runs.files import read_object, to_json, write_json, write_rows, write_whole


class Pair(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    name: str
    interval: Pair
    parts: tuple["Result", ...] = ()


@pytest.mark.parametrize(
    "value, want",
    [
        ({"a": (1.0, math.nan, [math.inf, "x", -math.inf])}, {"a": [1.0, None, [None, "x", None]]}),
        (Pair(0.5, math.nan), {"low": 0.5, "high": None}),
        (
            Result("a", Pair(0, 1), (Result("b", Pair(2, 3)),)),
            {
                "name": "a",
                "interval": {"low": 0, "high": 1},
                "parts": [{"name": "b", "interval": {"low": 2, "high": 3}, "parts": []}],
            },
        ),
        ([np.float32(0.5), np.int64(3), np.bool_(True)], [0.5, 3, True]),
        ({"x": np.array([[1.0, np.nan]]), "t": torch.tensor(2)}, {"x": [[1.0, None]], "t": 2}),
        ([None, True, "text", 7], [None, True, "text", 7]),
    ],
)
def test_every_kind_of_value(value, want):
    assert to_json(value) == want
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == want


def test_a_json_file(tmp_path):
    write_json(tmp_path / "x.json", {"b": Pair(1, math.nan), "a": 2})
    text = (tmp_path / "x.json").read_text()
    assert text == '{\n "b": {\n  "low": 1,\n  "high": null\n },\n "a": 2\n}\n'


@pytest.mark.parametrize("text", ["", '{"exit_', "[1]", "null", "\x00\x00"])
def test_a_file_that_is_not_whole_holds_no_object(tmp_path, text):
    file = tmp_path / "summary.json"
    assert read_object(file) is None and read_object(file / "x") is None
    file.write_text(text)
    assert read_object(file) is None and read_object(file / "x") is None, "a file is no folder"
    write_json(file, {"a": 1})
    assert read_object(file) == {"a": 1}


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("old")
    write_whole(tmp_path / "f", "new é")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text(encoding="utf-8") == "new é"

    def crash(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(os, "replace", crash)
        write_whole(tmp_path / "f", "newer")
    assert (tmp_path / "f").read_text(encoding="utf-8") == "new é"


def test_rows_are_lines_of_json(tmp_path):
    rows = [{"prompt": "a\nb"}, {"n": 1}]
    write_rows(tmp_path / "rows.jsonl", iter(rows))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
