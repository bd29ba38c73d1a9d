"""A bar on a terminal, lines elsewhere, nothing in quiet runs; durations in one form."""

import io

import pytest
from rich.console import Console

from reflux.trainer.runs import progress as module
from reflux.trainer.runs.progress import (
    counted,
    duration,
    inside_step,
    moment,
    progress,
    shown_stages,
    time_left,
)


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


def inside(console, stages=1, **options):
    with shown_stages(console):
        for _ in range(stages):
            with inside_step("sampling", 100, "tokens", **options) as advance:
                advance(40)
                advance(10)


def console_of(out, terminal=True, width=100):
    return Console(file=out, force_terminal=terminal, width=width)


def test_inside_a_step_one_line_that_is_gone_afterwards(monkeypatch):
    monkeypatch.setattr(module, "DRAW_S", 0.0)
    out = io.StringIO()
    inside(console_of(out))
    drawn = out.getvalue().split(module.CLEAR)
    assert drawn[1].startswith("  sampling: 40 of 100 tokens, 0 s, left 0 s")
    assert drawn[2].startswith("  sampling: 50 of 100 tokens") and drawn[3] == ""
    assert "\n" not in out.getvalue()


def test_a_bound_is_called_one_and_a_narrow_terminal_is_not_wrapped(monkeypatch):
    monkeypatch.setattr(module, "DRAW_S", 0.0)
    out = io.StringIO()
    inside(console_of(out, width=40), at_most=True)
    drawn = out.getvalue().split(module.CLEAR)[1]
    assert drawn.startswith("  sampling: 40 of at most 100 tokens") and len(drawn) == 39


def test_inside_a_step_nothing_elsewhere_and_nothing_where_it_is_short(monkeypatch):
    for console in (None, console_of(io.StringIO()), console_of(io.StringIO(), terminal=False)):
        inside(console, stages=3)
        assert console is None or console.file.getvalue() == ""
    monkeypatch.setattr(module, "DRAW_S", 0.0)
    elsewhere = console_of(io.StringIO(), terminal=False)
    inside(elsewhere)
    assert elsewhere.file.getvalue() == ""


def test_a_line_is_drawn_a_few_times_a_second(monkeypatch):
    clock = iter(x / 1000 for x in range(10_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with shown_stages(console_of(out)), inside_step("scoring", 1000) as advance:
        for _ in range(1000):
            advance(1)
    assert 3 <= out.getvalue().count("scoring") <= 4, "once in 250 ms"


def test_bars_and_the_line_do_not_draw_at_once(monkeypatch):
    monkeypatch.setattr(module, "DRAW_S", 0.0)
    out, bars = io.StringIO(), io.StringIO()
    with shown_stages(console_of(out)), progress(True, console_of(bars)) as stage:
        with stage("texts", 3), inside_step("sampling", 3) as advance:
            advance(1)
    assert out.getvalue() == ""


def test_a_line_is_cleared_when_its_stage_fails(monkeypatch):
    monkeypatch.setattr(module, "DRAW_S", 0.0)
    out = io.StringIO()
    with pytest.raises(ZeroDivisionError), shown_stages(console_of(out)):
        for item in counted("scoring", [1, 2, 0], "micro-batches"):
            1 / item
    assert out.getvalue().endswith(module.CLEAR) and "scoring: 2 of 3 micro-" in out.getvalue()


def test_a_moment_is_written_as_people_do():
    assert moment("2026-11-29T18:05:30+01:00") == "2026-11-29 17:05 UTC"
    assert moment(None) == moment("yesterday") == "unknown"
