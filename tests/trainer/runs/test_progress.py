"""A bar on a terminal, lines elsewhere, nothing in quiet runs; durations in one form."""

import io

import pytest
from rich.console import Console

from reflux.trainer.runs import progress as module
from reflux.trainer.runs.progress import duration, progress, time_left


def shown(terminal: bool, show: bool = True, steps=(2, 1)) -> str:
    out = io.StringIO()
    with progress(show, Console(file=out, force_terminal=terminal, width=100)) as stage:
        with stage("texts by the student", 3) as advance:
            for count in steps:
                advance(count)
    return out.getvalue()


def test_elsewhere_a_line_at_the_end_of_a_stage():
    assert (
        shown(False) == "texts by the student: 3 done after 0 s\n"
        and shown(False, show=False) == ""
    )


def test_a_long_stage_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    assert shown(False).splitlines() == [
        "texts by the student: 2 of 3 after 0 s",
        "texts by the student: 3 done after 0 s",
    ]


def test_a_bar_on_a_terminal():
    out = shown(True)
    assert (
        "texts by the student" in out
        and "3/3" in out
        and "done after" not in out
        and shown(True, show=False) == ""
    )


def test_a_failing_stage_is_not_called_done():
    out = io.StringIO()
    with (
        pytest.raises(ZeroDivisionError),
        progress(True, Console(file=out)) as stage,
        stage("x", 1),
    ):
        raise ZeroDivisionError
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.0, "0 s"),
        (59.9, "59 s"),
        (60.0, "1m 00s"),
        (185.0, "3m 05s"),
        (3599.0, "59m 59s"),
        (3600.0, "1h 00m"),
        (90_120.0, "25h 02m"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_time_left_is_the_median_item_times_the_items_left():
    assert time_left([1.0, 1.0, 99.0], 30) == "30 s"
