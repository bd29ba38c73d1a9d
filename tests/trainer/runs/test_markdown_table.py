"""Numbers as reports write them, and pages from templates."""

import math

import jinja2
import pytest

from reflux.trainer.runs.markdown_table import (
    interval,
    mean_and_std,
    points,
    points_with_interval,
    render_template,
    score,
    table,
    with_interval,
)
from reflux.trainer.runs.stats import Estimate, over_seeds


def test_numbers_as_reports_write_them():
    several, one, none = (over_seeds(v) for v in ([0.1, 0.3], [0.25], []))
    assert [mean_and_std(e) for e in (several, one, none)] == ["0.200 +- 0.141", "0.250", ""]
    assert [points(e) for e in (several, one, none)] == ["+20.0 +- 14.1", "+25.0", ""]
    estimate = Estimate(0.5, 0.1, 0.25, 1.0, 3)
    assert score(estimate) == "0.50 [0.25, 1.00]" and score(None) == ""
    assert with_interval(estimate, "{:+.0%}") == "+50% [+25%, +100%]"
    assert with_interval(one) == "0.250" and interval(one) == ""
    assert interval(estimate) == "[0.250, 1.000]"


def test_a_table():
    assert table(("a", "b"), [(1, "x"), (2, "")]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 |  |"


def test_a_page_from_a_template(tmp_path):
    file = tmp_path / "page.md.jinja"
    file.write_text("# {{ title }}\n{% for x in rows %}\n- {{ show(x) }}\n{% endfor %}\nend <&>\n")
    page = render_template(file, title="a & b", rows=[1.0, math.nan], show="{:.1f}".format)
    assert page == "# a & b\n- 1.0\n- nan\nend <&>\n"
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        render_template(file, rows=[])


def test_another_number_of_seeds_is_said():
    two = over_seeds([0.1, 0.3])
    assert mean_and_std(two, 3) == "0.200 +- 0.141 (n 2)" and mean_and_std(two, 2)[-1] == "1"
    assert points(over_seeds([0.25]), 3) == "+25.0 (n 1)"
    assert points_with_interval(Estimate(0.01, 0.1, -0.02, 0.04, 2), 3) == "+1.0 [-2.0, +4.0] (n 2)"
    assert points_with_interval(over_seeds([]), 3) == ""


def test_a_ratio_that_several_runs_do_not_bound_says_so():
    assert score(Estimate(0.5, 0.1, math.nan, math.nan, 3)) == "0.50 [unbounded]"
    assert score(over_seeds([0.5])) == "0.50"
