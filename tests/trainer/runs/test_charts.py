"""Coordinates of charts: every value inside the plot, gaps at what is not finite, honest ticks."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.runs.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    interval_rows,
    line_chart,
    number,
    ticks,
)

VALUES = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(VALUES, min_size=1, max_size=400), st.integers(0, 500))
def test_every_point_lies_inside_the_plot(values, last_step):
    chart = line_chart([Series("x", list(enumerate(values)))], last_step=last_step)
    for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", chart.lines[0].path):
        assert LEFT - 0.1 <= float(x) <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= float(y) <= HEIGHT - BOTTOM + 0.1
    assert len(chart.lines[0].dots) <= MOST_POINTS


@given(VALUES, VALUES)
def test_ticks_enclose_the_range_at_equal_distances(a, b):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert found[0] <= low + slack and found[-1] >= high - slack and 2 <= len(found) <= 8
    steps = [y - x for x, y in zip(found, found[1:])]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_what_stays_at_0_stands_on_the_axis():
    assert ticks(0, 0)[0] == 0 and ticks(0, 0)[-1] == 1


def test_a_value_that_is_not_finite_leaves_a_gap_and_is_told():
    points = [(1, 1.0), (2, math.nan), (3, 2.0), (4, math.inf)]
    chart = line_chart([Series("norm", points)])
    assert chart.lines[0].path.count("M") == 2 and len(chart.lines[0].dots) == 2
    assert chart.notes == ["2 of 4 values of norm are not finite: gaps"]
    assert chart.lines[0].last == "2"


def test_without_a_finite_value_there_is_no_chart():
    assert line_chart([Series("x", [(1, math.nan)])]) is None


def test_a_long_run_is_shown_by_means_and_ranges():
    points = [(i, float(i % 10)) for i in range(10 * MOST_POINTS)]
    chart = line_chart([Series("x", points)])
    line = chart.lines[0]
    assert len(line.dots) == MOST_POINTS and line.band and not line.visible
    assert "[0, 9]" in line.dots[0].title and "means of 10 steps" in chart.notes[0]


def test_an_interval_is_a_band_and_stands_in_the_title():
    chart = line_chart([Series("x", [(0, 0.5), (5, 0.6)], [0.4, 0.5], [0.6, math.nan])])
    assert "step 0, x: 0.5 [0.4, 0.6]" == chart.lines[0].dots[0].title
    assert chart.lines[0].dots[1].title == "step 5, x: 0.6" and chart.lines[0].band.endswith("Z")


def test_rules_are_inside_and_marks_stand_at_their_step():
    chart = line_chart(
        [Series("x", [(0, 1.0), (10, 2.0)])], rules=[(5.0, "start")], marks=[(5, "a")]
    )
    assert TOP <= float(chart.rules[0].at) <= HEIGHT - BOTTOM
    assert float(chart.marks[0].x) == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1)


def test_interval_rows_stay_between_0_and_1():
    whole, bare = interval_rows([("a", 0.5, -0.1, 1.2), ("b", 0.25, math.nan, math.nan)])
    assert (whole.at, whole.low, whole.width) == ("50.00", "0.00", "100.00")
    assert whole.text == "0.500 [-0.100, 1.200]" and bare.text == "0.250" and bare.width == "0.00"


def test_numbers_have_three_digits():
    shown = [number(x) for x in (0, 0.01234, 1.5, 12345.6, 1e-6, 3e9, math.nan, -math.inf)]
    assert shown == ["0", "0.0123", "1.5", "12,346", "1e-06", "3e+09", "NaN", "-infinity"]
