"""Whether the evaluations of a calibration are enough for `guard.utility_drop`, which needs the
accuracy of the start and two more (docs/method.md, "Guards").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import Config

LOW_TWICE = 2  # evaluations in a row that end a run


def evaluations_after_start(cfg: Config) -> int:
    """Of the planned steps, the last one included."""
    last, every = cfg.steps, cfg.eval.every
    return (last // every + bool(last % every)) if every else min(last, 1)


def compared_with(cfg: Config) -> str:
    """What guard.utility_drop compares accuracies with, in words; "" where it cannot end the run.
    Without an evaluation of the start it takes the first one on the way.
    """
    e, count = cfg.eval, evaluations_after_start(cfg)
    if not (cfg.guard.utility_drop and e.asks and e.generates):
        return ""
    if e.at_start:
        return "the start" if count >= LOW_TWICE else ""
    return "the first evaluation on the way" if count > LOW_TWICE else ""


def utility_guard_gap(cfg: Config) -> str | None:
    """Why guard.utility_drop cannot end this run, or knows no start, with the setting that mends
    it; None where all is well, or where it is off.
    """
    if cfg.phase != "calibrate" or not cfg.guard.utility_drop:
        return None
    e, off = cfg.eval, "or guard.utility_drop = 0 to go without"
    asked = f"guard.utility_drop = {cfg.guard.utility_drop:g} cannot end this run: "
    if not e.asks:
        return f"{asked}nothing is evaluated. Set eval.source, {off}"
    if not e.generates:
        return f"{asked}eval.by = {e.by!r} answers nothing. Set eval.by = 'both', {off}"
    if not e.at_start:
        return (
            f"guard.utility_drop = {cfg.guard.utility_drop:g} compares with no start: eval.at_start"
            f" = false leaves the first evaluation on the way. Set eval.at_start = true, {off}"
        )
    if (count := evaluations_after_start(cfg)) < LOW_TWICE:
        advice = f"Set eval.every = {max(cfg.steps // 10, 1)}"
        if cfg.steps < LOW_TWICE:
            advice = f"Set steps to {LOW_TWICE} or more, and eval.every = 1"
        return (
            f"{asked}it needs {LOW_TWICE} evaluations after the start, and eval.every = {e.every} "
            f"with steps = {cfg.steps} makes {count}. {advice}, {off}"
        )
    return None
