"""Diagnoses of a matrix folder side by side, from files whose numbers are known."""

import json

import pytest

from reflux.trainer.studies.diagnosis_table import (
    diagnosis_columns,
    diagnosis_rows,
    write_diagnoses,
)


def diagnosis(noise: float, present: bool | None, preference: float | None) -> dict:
    gap = {"teachable": {"mean": 0.9}} | (
        {}
        if preference is None
        else {"wrong_trace": {"pair": {"mean": preference}, "pull": {"mean": -0.1}}}
    )
    return {
        "verdict": [
            {
                "trap": "tail noise",
                "measure": "tail-noise index, forward KL",
                "mean": noise,
                "present": present,
            }
        ],
        "grid": {"forward": {"teacher": {"per_token": {"mean": 0.5}}}, "reverse": {}},
        "gap": gap,
        "symptoms": {"repeated_4grams": 0.0},
    }


def write(folder):
    cells = []
    for name, pair, found in (
        ("a0", "before", diagnosis(1.0, True, 0.2)),
        ("a1", "before", diagnosis(3.0, False, None)),
        ("b0", "after", diagnosis(float("nan"), None, 0.6)),
        ("c0", "unfinished", diagnosis(9.0, True, 0.9)),
    ):
        (folder / name).mkdir(parents=True)
        text = json.dumps(found).replace("NaN", "null")  # as diagnosis.json has it
        (folder / name / "diagnosis.json").write_text(text)
        if pair != "unfinished":
            (folder / name / "summary.json").write_text("{}")
        cells.append({"folder": name, "labels": {"pair": pair, "seed": name[1]}})
    cells.append({"folder": "t", "labels": {"role": "teacher"}})
    (folder / "matrix.json").write_text(json.dumps({"title": "", "styles": {}, "cells": cells}))
    return folder


def test_estimates_over_the_seeds_that_have_a_number(tmp_path):
    columns = diagnosis_columns(write(tmp_path))
    assert {pair: len(seeds) for pair, seeds in columns.items()} == {"before": 2, "after": 1}
    rows = diagnosis_rows(columns)
    noise = rows["tail noise: tail-noise index"]
    assert (
        noise["before"]["mean"] == 2.0
        and noise["before"]["std"] == pytest.approx(2**0.5)
        and noise["before"]["caught"] == 1
    )
    assert noise["after"]["n"] == 0 and noise["after"]["caught"] == 0
    assert (
        rows["wrong-trace preference"]["before"]["n"] == 1
        and rows["wrong-trace preference"]["after"]["mean"] == 0.6
    )
    assert rows["reverse KL, student's prefixes, nats/token"]["before"]["n"] == 0


def test_the_files_are_written(tmp_path):
    text = write_diagnoses(write(tmp_path))
    assert (
        "|  | before | after |" in text
        and "| tail noise: tail-noise index | 2.000 +- 1.414 (1 of 2) |  |" in text
    )
    assert (
        "| wrong-trace preference | 0.200 | 0.600 |" in text
        and (tmp_path / "diagnoses.md").read_text() == text
    )
    assert (
        json.loads((tmp_path / "diagnoses.json").read_text())["repeated 4-grams"]["before"]["n"]
        == 2
    )


def test_a_folder_without_diagnoses_says_so(tmp_path):
    (tmp_path / "matrix.json").write_text('{"cells": []}')
    with pytest.raises(ValueError, match="no finished diagnosis carries a label pair"):
        write_diagnoses(tmp_path)
