"""The numbers of docs/traps.md are its record's, over seeds."""

import copy
import math
import statistics

import pytest

from bench.report_record import Record, read_record
from bench.trap_tables import (
    NOT_STATED,
    STATED,
    TRAPS,
    traps_measures,
    traps_teachers,
)
from reflux.trainer.runs.stats import t95


@pytest.fixture(scope="module")
def record():
    return read_record(TRAPS)


def cells_of(table, begin):
    line = next(x for x in table.splitlines() if x.startswith(f"| {begin} |"))
    return [x.strip() for x in line.strip("| ").split(" | ")][1:]


def test_a_student_by_hand(record):
    wanted = {"role": "student", "attack": "kd_forward", "teacher": "undistillable"}
    values = [r["sampled"] for r in record.rows if wanted.items() <= r.items()]
    cell = cells_of(traps_teachers(record), "undistillable")[3]
    assert len(values) == 5
    assert cell == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def test_recorded_intervals_are_student_s_over_the_five_seeds(record):
    for title in STATED | NOT_STATED:
        for pair in record.content["diagnoses"][title]["minus control"].values():
            half = t95(5) * pair["std"] / math.sqrt(5)
            assert pair["n"] == 5
            assert pair["low"] == pytest.approx(pair["mean"] - half, abs=1e-12)
            assert pair["high"] == pytest.approx(pair["mean"] + half, abs=1e-12)


def test_a_measure_is_shown_beside_its_control(record):
    pairs = record.content["diagnoses"]["tail noise: tail-noise index"]
    before, after = (
        pairs[f"{when}, task_only"]["mean"] for when in ("before distillation", "after seq_kd")
    )
    change = pairs["minus control"]["after seq_kd, undistillable"]
    cells = cells_of(traps_measures(record), "tail-noise index")
    assert cells[0] == f"{before:.3f} / {after:.3f}"
    assert cells[4] == f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


def test_no_seed_differs_is_0_and_a_mean_of_0_is_not(record):
    content = copy.deepcopy(record.content)
    name = "repeated 4-grams"
    assert cells_of(traps_measures(record), name)[1] == "0"
    pair = content["diagnoses"][name]["minus control"]["before distillation, distillable"]
    pair |= {"mean": 0.0, "std": 0.01, "low": -0.012, "high": 0.012}
    assert cells_of(traps_measures(Record(content)), name)[1] == "+0.000 [-0.012, +0.012]"
