"""A run that fails, or is killed, and is resumed stops where the uninterrupted one would, whichever
guard stops it. The numbers that the guards read are scripted.
"""

from pathlib import Path

import pytest
import torch
from runs import config, run_here
from transformers import AutoModelForCausalLM

from reflux.trainer import loop
from reflux.trainer.calibration.phase import CalibratePhase
from reflux.trainer.config.schema import Config
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.engine.last_step import LastStep
from reflux.trainer.runs import run_folder
from reflux.trainer.runs.logger import load_run

pytestmark = pytest.mark.usefixtures("titan_process")
BREAKS, STOPS = 3, 4  # steps

# guard, numbers of each step, accuracies, and the step that the run goes back to. The averages are
# over the limit in step 4, and would not be without what was seen in step 3. The numbers of step 3,
# the last that are inside, were measured of checkpoint 2: it is the one to go back to. Checkpoint 3
# holds the weights that step 4 measured. Both are written by the marks that steps 2 and 3 pass.
CASES = {
    "kl": ({"kl_budget": 1.0}, {"reference_kl": [0.1, 0.9, 0.99, 3.7]}, {}, 2),
    "length": ({"length_drift": 1.0}, {"length": [40.0, 72.0, 79.0, 200.0]}, {}, 2),
    "entropy": ({"entropy_drift": 1.0}, {"entropy": [1.0, 1.8, 1.975, 5.0]}, {}, 2),
    "truncation": ({"truncation_drift": 0.2}, {"truncated": [0.0, 0.17, 0.195, 0.8]}, {}, 2),
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


def kl_per_token(folder: Path, start: Path, cfg: Config) -> float:
    """KL(model of `folder` || model of `start`) on texts that the former samples, exact per token,
    over the prompts of the run.
    """
    chat = Chat(str(start))
    policy, reference = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, start))
    torch.manual_seed(0)
    values = []
    for prompt in load_prompts(cfg.data.source):
        row = torch.tensor([chat.prompt_ids(prompt.messages)])
        with torch.no_grad():
            whole = policy.generate(row, do_sample=True, max_new_tokens=8, top_k=0)
            logp, logq = (m(whole).logits.double().log_softmax(-1) for m in (policy, reference))
        kl_L = (logp.exp() * (logp - logq)).sum(-1)[0]
        values += kl_L[row.shape[1] - 1 : -1].tolist()
    return sum(values) / len(values)


@pytest.mark.parametrize("lr, restored", [(5e-4, 2), (4e-3, 0)])
def test_restored_weights_are_inside_the_budget(talkers, tmp_path, lr, restored):
    """Measured anew, of the export. The KL of steps 1 to 6 is 0, 0.009, 0.026, 0.054, 0.101, 0.159
    with the smaller lr, and the average is over the budget in step 6 alone; with the larger one it
    is 0, 0.95.
    """
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=8,
        calibration={"mode": "off"},
        guard={"kl_budget": 0.05, "utility_drop": 0.0},
        optim={"lr": lr},
        checkpoint={"interval": 1, "keep_latest_k": 2},
        export={"enable": True, "dtype": "float32"},
        reference={"beta": 0.01},
        rollout={"prompts": 24, "group": 4, "max_tokens": 8},
    )
    run = run_here(cfg, expect=4)
    (stopped,) = (e for e in run.events if e["event"] == "stopped")
    assert stopped["restored_step"] == restored
    assert ("back to those of the start" in stopped["reason"]) == (restored == 0)
    measured = kl_per_token(tmp_path / "run/export", talkers / "policy", cfg)
    assert measured <= cfg.guard.kl_budget
    (next_step,) = (s for s in run.steps if s["step"] == restored + 1)
    assert measured == pytest.approx(next_step["reference_kl"], rel=0.3), "which measured them"
