"""Diagnoses of a matrix folder side by side, from files whose numbers are known."""

import json

import pytest

from reflux.trainer.studies.diagnosis_table import (
    control_rows,
    diagnosis_rows,
    load_diagnoses,
    load_pairs,
    write_diagnoses,
)


def diagnosis(noise: float | None, present: bool | None, preference: float | None) -> dict:
    gap = {"teachable": {"mean": 0.9}}
    if preference is not None:
        gap["wrong_trace"] = {"pair": {"mean": preference}, "pull": {"mean": -0.1}}
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
        "symptoms": {"repeated_4grams": 0.0, "confidence": None},
    }


def write(folder):
    cells = []
    for name, pair, content in (
        ("a0", "before", diagnosis(1.0, True, 0.2)),
        ("a1", "before", diagnosis(3.0, False, None)),
        ("b0", "after", diagnosis(None, None, 0.6)),
        ("c0", "unfinished", diagnosis(9.0, True, 0.9)),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "diagnosis.json").write_text(json.dumps(content))
        if pair != "unfinished":
            (folder / name / "summary.json").write_text("{}")
        cells.append({"folder": name, "labels": {"pair": pair, "seed": name[1]}})
    cells.append({"folder": "t", "labels": {"role": "teacher"}})
    (folder / "matrix.json").write_text(json.dumps({"title": "", "styles": {}, "cells": cells}))
    return folder


def test_estimates_over_the_seeds_that_have_a_number(tmp_path):
    pairs = load_diagnoses(write(tmp_path))
    counts = {pair: len(seeds) for pair, seeds in pairs.items()}
    assert counts == {"before": 2, "after": 1, "unfinished": 0}
    rows = {row.measure: row for row in diagnosis_rows(pairs)}
    noise = next(iter(rows.values()))
    assert noise.measure == "tail noise: tail-noise index"
    assert noise.pairs["before"].mean == 2.0
    assert noise.pairs["before"].std == pytest.approx(2**0.5)
    assert noise.pairs["after"].n == 0 and noise.detected == {"before": 1, "after": 0}
    preference = rows["wrong-trace preference"]
    assert preference.pairs["before"].n == 1 and preference.pairs["after"].mean == 0.6
    assert not preference.detected
    assert rows["reverse KL, student's prefixes, nats/token"].pairs["before"].n == 0
    assert rows["wrong with confidence >= 0.9"].pairs["before"].n == 0


def test_the_files_are_written(tmp_path):
    text = write_diagnoses(write(tmp_path))
    assert "|  | before | after | unfinished |\n|---|---|---|---|\n| tail noise: tail" in text
    index = "2.000 +- 1.414 [-10.706, 14.706] (1 of 2)"
    assert f"| tail noise: tail-noise index | {index} | no number (of 1) | not run |\n" in text
    assert "| wrong-trace preference | 0.200 (n 1) | 0.600 | not run |" in text
    assert (tmp_path / "diagnoses.md").read_text() == text
    saved = json.loads((tmp_path / "diagnoses.json").read_text())
    assert saved["repeated 4-grams"]["before"]["n"] == 2
    assert "detected" not in saved["repeated 4-grams"]["before"]
    assert saved["tail noise: tail-noise index"]["before"]["detected"] == 1


def write_control(folder):
    """Two pairs of three seeds; the control lacks the last one."""
    cells = []
    for pair, noise in (("mine", (1.5, 2.0, 9.0)), ("control", (1.0, 1.0))):
        for seed, value in enumerate(noise):
            name = f"{pair}{seed}"
            (folder / name).mkdir(parents=True)
            content = diagnosis(value, True, 0.5 if seed else None)
            (folder / name / "diagnosis.json").write_text(json.dumps(content))
            (folder / name / "summary.json").write_text("{}")
            labels = {"pair": pair, "seed": str(seed), "control": "control"}
            cells.append({"folder": name, "labels": labels})
    (folder / "matrix.json").write_text(json.dumps({"title": "", "styles": {}, "cells": cells}))
    return folder


def test_differences_to_the_control_are_paired_by_seed(tmp_path):
    rows = {row.measure: row for row in control_rows(load_pairs(write_control(tmp_path)))}
    noise = rows["tail noise: tail-noise index"]
    assert list(noise.differences) == ["mine"] and next(iter(rows)) == noise.measure
    # 0.5 and 1.0: mean 0.75, t over two seeds 12.706 * 0.354 / sqrt(2)
    assert noise.cell("mine") == "+0.750 [-2.427, +3.927] (n 2)"
    assert rows["wrong-trace preference"].cell("mine") == "+0.000 (n 1)"
    assert rows["recovery after an inserted error"].cell("mine") == "no number"
    text = write_diagnoses(tmp_path)
    assert "## Against the control" in text
    assert "| tail noise: tail-noise index | +0.750 [-2.427, +3.927] (n 2) |" in text
    saved = json.loads((tmp_path / "diagnoses.json").read_text())
    assert saved["tail noise: tail-noise index"]["minus control"]["mine"]["n"] == 2


def test_a_trap_that_was_decided_by_another_measure_is_not_compared(tmp_path):
    write_control(tmp_path)
    path = tmp_path / "mine0" / "diagnosis.json"
    other = json.loads(path.read_text())
    other["verdict"][0]["measure"] = "another index, reverse KL"
    path.write_text(json.dumps(other))
    text = write_diagnoses(tmp_path)
    assert "| tail noise: tail-noise index | +1.000 (n 1) |" in text
    assert "| tail noise: another index | no number |" in text


def test_another_measure_of_a_trap_is_another_row(tmp_path):
    """Its number was averaged with the first one's, under the first one's title."""
    write(tmp_path)
    path = tmp_path / "a1" / "diagnosis.json"
    other = json.loads(path.read_text())
    other["verdict"][0]["measure"] = "another index, reverse KL"
    path.write_text(json.dumps(other))
    text = write_diagnoses(tmp_path)
    assert "| tail noise: tail-noise index | 1.000 (n 1) (1 of 1) |" in text
    assert "| tail noise: another index | 3.000 (n 1) (0 of 1) |" in text


@pytest.mark.parametrize(
    "first, second, cell",
    [
        ((1.0, True), (None, True), "1.000 (n 1) (1 of 1)"),  # of the seeds with a number
        ((1.0, True), (1.0, None), "1.000 +- 0.000 [1.000, 1.000] (1 of 2, 1 undecided)"),
        ((1.0, None), (1.0, None), "1.000 +- 0.000 [1.000, 1.000] (0 of 2, 2 undecided)"),
    ],
)
def test_what_was_not_decided_is_not_counted_as_absent(tmp_path, first, second, cell):
    pairs = {"p": [diagnosis(*first, None), diagnosis(*second, None)]}
    assert diagnosis_rows(pairs)[0].cell("p") == cell


def test_without_a_control_there_is_no_second_table(tmp_path):
    assert "Against the control" not in write_diagnoses(write(tmp_path))


def test_a_folder_without_diagnoses_is_an_error(tmp_path):
    (tmp_path / "matrix.json").write_text('{"cells": []}')
    with pytest.raises(ValueError, match="no finished diagnosis carries a label pair"):
        write_diagnoses(tmp_path)


def test_two_diagnoses_of_one_pair_and_seed_are_refused(tmp_path):
    cells = [{"folder": f, "labels": {"pair": "p", "seed": "0"}} for f in ("math", "facts")]
    (tmp_path / "matrix.json").write_text(json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match="math and facts stand in one place .*pair = 'p'"):
        load_pairs(tmp_path)
