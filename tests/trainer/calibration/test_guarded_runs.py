"""A run that fails, or is killed, and is resumed stops where the uninterrupted one would, whichever
guard stops it. The numbers that the guards read are scripted.
"""

import pytest
from runs import config, run_here

from reflux.trainer import loop
from reflux.trainer.calibration.phase import CalibratePhase
from reflux.trainer.engine.last_step import LastStep
from reflux.trainer.runs import run_folder
from reflux.trainer.runs.logger import load_run

pytestmark = pytest.mark.usefixtures("titan_process")
BREAKS, STOPS = 3, 4  # steps

# guard, numbers of each step, accuracies, and the step that the run goes back to. The averages are
# over the limit in step 4, and would not be without what was seen in step 3.
CASES = {
    "kl": ({"kl_budget": 1.0}, {"reference_kl": [0.1, 0.1, 3.0, 3.0]}, {}, 3),
    "length": ({"length_drift": 1.0}, {"length": [40.0, 40.0, 220.0, 220.0]}, {}, 3),
    "entropy": ({"entropy_drift": 1.0}, {"entropy": [1.0, 1.0, 5.5, 5.5]}, {}, 3),
    "truncation": ({"truncation_drift": 0.2}, {"truncated": [0.0, 0.0, 0.9, 0.9]}, {}, 3),
    "utility": ({}, {}, {0: 0.5, 1: 0.5, 3: 0.4, 4: 0.4}, 1),
    # half the budget is passed in the step of the first bad evaluation
    "utility at a mark": (
        {"kl_budget": 1.3, "length_drift": 5.0},
        {"reference_kl": [0.1, 0.1, 3.0, 0.1]},
        {0: 0.5, 1: 0.5, 3: 0.4, 4: 0.4},
        1,
    ),
}


@pytest.fixture
def scripted(monkeypatch):
    """scripted(case): the guards read the numbers of the case, as the log does."""
    timing = loop._timing

    def script(case: str) -> None:
        _, numbers, accuracy, _ = CASES[case]

        def more(stats, start, sampled, scored, engine):
            at = min(engine._trainer.step, STOPS) - 1
            return timing(stats, start, sampled, scored, engine) | {
                name: values[at] for name, values in numbers.items()
            }

        def due(self, step):
            return {"eval/sampled": accuracy[step]} if step in accuracy else {}

        monkeypatch.setattr(loop, "_timing", more)
        monkeypatch.setattr("reflux.trainer.evaluation.phase.Evaluator.due", due)

    return script


def fails_once(patch, owner, name: str, at: int) -> None:
    """The method raises where its first argument is the step `at`."""
    method = getattr(owner, name)

    def failing(self, step, *more):
        if step == at:
            raise ConnectionError("the server went away")
        return method(self, step, *more)

    patch.setattr(owner, name, failing)


BROKEN = {
    "while the next step samples": (CalibratePhase, "sample", BREAKS + 1),
    "before its evaluation": (CalibratePhase, "close_step", BREAKS),
    "before its alarms": (loop.Callbacks, "step", BREAKS),
    "after its evaluation": (loop.Callbacks, "evaluation", BREAKS),
}


@pytest.mark.parametrize(
    "case, breaks",
    [
        *((case, None) for case in CASES),
        *((case, "while the next step samples") for case in CASES),
        *((case, "before its evaluation") for case in CASES),
        ("kl", "before its alarms"),
        ("utility", "after its evaluation"),
        ("utility at a mark", "killed"),
    ],
)
def test_a_resumed_run_stops_where_the_uninterrupted_one_would(
    talkers, tmp_path, monkeypatch, scripted, case, breaks
):
    scripted(case)
    guard, _, _, restored = CASES[case]
    interval = 1 if breaks == "killed" else 1000
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=6,
        on_existing_run="resume",
        guard={"utility_drop": 0.02} | guard,
        checkpoint={"interval": interval, "keep_latest_k": 2},
    )
    if breaks:
        with monkeypatch.context() as patch:
            if breaks == "killed":  # nothing is saved on the way out
                patch.setattr(LastStep, "save_if_unsaved", lambda self: (None, None))
            owner, name, at = BROKEN.get(breaks, BROKEN["while the next step samples"])
            fails_once(patch, owner, name, at)
            with pytest.raises(ConnectionError):
                run_here(cfg)
        cfg = run_folder.settle(cfg)
    run = run_here(cfg, expect=4)
    (stopped,) = (e for e in run.events if e["event"] == "stopped")
    assert (len(run.steps), stopped["restored_step"]) == (STOPS, restored)
    assert [e["step"] for e in run.events if e["event"] == "resume"] == [BREAKS] * bool(breaks)
    evaluated = [e["step"] for e in run.events if e["event"] == "eval"]
    if breaks != "after its evaluation":
        assert evaluated == sorted(set(evaluated)), "none is made twice"


def test_the_last_evaluation_is_made_by_the_process_that_goes_on(
    talkers, tmp_path, monkeypatch, scripted
):
    """It failed after the last step was made: there is no step left, and still it is due."""
    scripted("utility")
    cfg = config(talkers, tmp_path / "run", "calibrate", steps=3, on_existing_run="resume")
    with monkeypatch.context() as patch:
        fails_once(patch, CalibratePhase, "close_step", 3)
        with pytest.raises(ConnectionError):
            run_here(cfg)
    assert [e["step"] for e in load_run(cfg.folder).events if e["event"] == "eval"] == [0, 1]
    run = run_here(run_folder.settle(cfg))
    assert [e["step"] for e in run.events if e["event"] == "eval"] == [0, 1, 3]
    assert len(run.steps) == 3 and run.summary["exit_code"] == 0
