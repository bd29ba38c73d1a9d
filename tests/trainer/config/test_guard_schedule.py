"""Whether the utility guard can act is said beforehand as it acts: by the guard itself."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from reflux.trainer.calibration.guards import Guards
from reflux.trainer.config.guard_schedule import (
    compared_with,
    evaluations_after_start,
    utility_guard_gap,
)
from reflux.trainer.config.loader import load
from reflux.trainer.evaluation.evaluator import Evaluator
from reflux.trainer.phase import Stop

ROOT = Path(__file__).parents[3]
ENOUGH = {"eval.source": "'x.jsonl'", "eval.every": 10, "steps": 100, "eval.at_start": "true"}
ENOUGH["guard.utility_drop"] = 0.02


def calibrate(**over):
    sets = tuple(f"{k}={v}" for k, v in (ENOUGH | over).items())
    return load(ROOT / "configs/debug_cpu_calibrate.toml", sets)


def ends(cfg) -> tuple[bool, int]:
    """Whether the guard ends a run that falls from 0.9 to 0 after the start, and how often it was
    evaluated after that.
    """
    engine = SimpleNamespace(notes={}, save_this_step=lambda: None)
    guards, evaluator, asked = Guards(cfg, engine), Evaluator.__new__(Evaluator), []
    evaluator.cfg = cfg

    def results(step):
        asked.append(step)
        sampled = {"eval/sampled": 0.0 if step else 0.9}
        return sampled if cfg.eval.asks and cfg.eval.generates else {}

    evaluator.results = results
    stopped = False
    for step in range(cfg.steps + 1):
        try:
            guards.check(step, {}, evaluator.due(step))
        except Stop:
            stopped = True
    return stopped, sum(step > 0 for step in asked)


@pytest.mark.parametrize(
    "over, mends",
    [
        ({}, None),
        ({"eval.every": 0}, "Set eval.every = 10, or guard.utility_drop = 0"),
        ({"eval.every": 200}, "Set eval.every = 10"),
        ({"eval.every": 100}, "Set eval.every = 10"),
        ({"eval.every": 99}, None),
        ({"eval.source": "''"}, "Set eval.source"),
        ({"eval.at_start": "false"}, "compares with no start: "),
        ({"eval.every": 0, "steps": 1}, "Set steps to 2 or more, and eval.every = 1"),
        ({"eval.every": 0, "steps": 5}, "Set eval.every = 1,"),
        ({"guard.utility_drop": 0.0, "eval.every": 0}, None),
    ],
)
def test_the_guard_can_end_the_run_just_where_nothing_is_said(over, mends):
    cfg = calibrate(**over)
    gap = utility_guard_gap(cfg)
    assert (gap is None) if mends is None else (mends in gap)
    stopped, count = ends(cfg)
    if cfg.guard.utility_drop and cfg.eval.at_start:
        assert stopped is (gap is None)
        assert compared_with(cfg) == "the start" * stopped
    assert count == evaluations_after_start(cfg)


def test_without_a_start_the_first_evaluation_on_the_way_is_one():
    assert compared_with(calibrate(**{"eval.at_start": "false"})).startswith("the first evaluation")
    assert not compared_with(calibrate(**{"eval.at_start": "false", "eval.every": 50}))
    assert not compared_with(calibrate(**{"guard.utility_drop": 0.0}))


def test_other_phases_have_no_such_guard():
    assert (
        utility_guard_gap(load(ROOT / "configs/debug_cpu_distill.toml", ("eval.every=0",))) is None
    )
