"""The table world: only the length-free form moves the style and leaves the length."""

import json
import math
from pathlib import Path

import pytest

from bench import lengths
from reflux.trainer.runs.stats import Estimate

ROOT = Path(__file__).parents[2]


def test_the_original_is_a_distribution_with_a_third_in_the_easy_style():
    log_t0 = lengths.original()
    assert math.fsum(math.e**x for x in log_t0) == pytest.approx(1.0)
    assert float((math.e**log_t0) @ lengths.EASY_N) == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode, sign", [("distillable", 1), ("undistillable", -1)])
def test_one_seed_of_every_form(mode, sign):
    moved = {form: lengths.calibrate(mode, form, seed=7) for form in lengths.FORMS}
    assert all(m["easy"] * sign > 0.15 and m["kl"] > 0.1 for m in moved.values())
    assert moved["sum"]["words"] * sign < -0.8 and moved["per_byte"]["words"] * sign > 0.2
    assert abs(moved["length_free"]["words"]) < 0.35


def test_the_page_shows_the_record():
    record = json.loads((ROOT / "bench/records/2026-11-29_lengths.json").read_text())
    assert record["dirty"] is False and record["seeds"] == list(lengths.SEEDS)
    for forms in record["measured"].values():
        for of in forms.values():
            for measure in of.values():
                measure["estimate"] = Estimate(**measure["estimate"])
                seeds = measure["seeds"]
                assert measure["estimate"].mean == pytest.approx(sum(seeds) / len(seeds))
    assert lengths.page(record["measured"]) in (ROOT / "docs/method.md").read_text()
