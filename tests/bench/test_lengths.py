"""The table world: only the length-free form moves the style and leaves the length."""

import math

import pytest

from bench import lengths


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
