"""The loop as a user meets it: killed, interrupted, resumed, stopped by a guard, fed with bad
numbers and bad graders.
"""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import config, numbers, run_forked, run_here
from safetensors.torch import load_file

from reflux.trainer import loop, losses
from reflux.trainer.calibration import phase as calibrate
from reflux.trainer.config import loader as config_file
from reflux.trainer.data.tokenizer_files import has_template
from reflux.trainer.runs import run_folder
from reflux.trainer.runs.logger import load_run

pytestmark = pytest.mark.usefixtures("titan_process")
CALIBRATED = {
    "calibration": {"mode": "undistillable"},
    "reference": {"beta": 0.2, "dtype": "float32"},
}
EVERY_THIRD = {"checkpoint": {"interval": 3}, "steps": 6}


def weights(folder) -> dict:
    return {
        k: v
        for file in (Path(folder) / "export").glob("*.safetensors")
        for k, v in load_file(file).items()
    }


def test_a_killed_run_goes_on_to_the_last_digit(talkers, tmp_path):
    """T28: the margin guard's average, AdamW's moments, the schedule and the data order all survive
    SIGKILL.
    """
    over = CALIBRATED | EVERY_THIRD | {"policy": {"epochs": 2, "minibatches": 2}}
    whole = run_here(config(talkers, tmp_path / "whole", "calibrate", **over))
    cfg = config(
        talkers,
        tmp_path / "killed",
        "calibrate",
        **over,
        on_existing_run="resume",
        task={"name": "slow_task:reward_vowels"},
    )
    # so that the kill comes in time, after the checkpoint of step 3
    (tmp_path / "slow_task.py").write_text(
        "import time\nfrom runs import reward_vowels as fast\n"
        "def reward_vowels(prompt, text):\n    time.sleep(0.05)\n    return fast(prompt, text)\n"
    )
    (tmp_path / "killed.toml").write_text(config_file.to_toml(cfg))
    process = run_forked(["--config", "killed.toml"], tmp_path)
    wait_until(lambda: (tmp_path / "killed/checkpoint/step-3/.metadata").exists(), process)
    process.kill()
    process.wait()
    assert 3 <= len(load_run(cfg.folder).steps) < 6, "the kill came too late to test anything"
    assert load_run(cfg.folder).summary is None
    resumed = run_here(
        run_folder.settle(
            replace(
                cfg,
                task=config(talkers, tmp_path / "x", "calibrate").task,
                folder=renamed_task(cfg),
                on_changed_input="accept",  # the grader that does not sleep is another file
            )
        )
    )
    assert [s["step"] for s in resumed.steps] == [1, 2, 3, 4, 5, 6]
    assert [numbers(s) for s in resumed.steps] == [numbers(s) for s in whole.steps]
    assert len({s["loss"] for s in whole.steps}) == 6, (
        "steps that are all alike would prove nothing"
    )


def renamed_task(cfg) -> str:
    """The killed run's folder, its saved task put back to the one that does not sleep."""
    saved = Path(cfg.folder) / "config.toml"
    saved.write_text(saved.read_text().replace("slow_task:", "small_tasks:"))
    return cfg.folder


def wait_until(is_true, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_the_first_interrupt_ends_the_step_saves_and_exits_with_130(talkers, tmp_path, monkeypatch):
    whole = run_here(config(talkers, tmp_path / "whole", "calibrate", steps=4))
    cfg = config(
        talkers,
        tmp_path / "cut",
        "calibrate",
        steps=4,
        on_existing_run="resume",
        export={"enable": True},
    )
    sample = calibrate.CalibratePhase.sample

    def sample_and_interrupt(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(self, step)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate.CalibratePhase, "sample", sample_and_interrupt)
        run = run_here(cfg, expect=130)
    assert [s["step"] for s in run.steps] == [1, 2] and run.events[-1]["event"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert run.summary is None, "summary.json says that a run ended, this one waits to be continued"
    assert (tmp_path / "cut/checkpoint/step-2/.metadata").exists() and not (
        tmp_path / "cut/export"
    ).exists()
    resumed = run_here(run_folder.settle(cfg))
    assert [numbers(s) for s in resumed.steps] == [numbers(s) for s in whole.steps]
    assert weights(cfg.folder) and resumed.summary["step"] == 4


def test_a_second_interrupt_stops_at_once(talkers, tmp_path, monkeypatch):
    def interrupt_twice(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(calibrate.CalibratePhase, "sample", interrupt_twice)
    monkeypatch.setattr(loop, "SAME_SIGNAL_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_here(config(talkers, tmp_path / "run", "calibrate"))
    assert load_run(tmp_path / "run").steps == []


def test_the_same_ctrl_c_passed_on_by_torchrun_is_not_a_second_one(talkers, tmp_path, monkeypatch):
    real = calibrate.CalibratePhase.sample

    def interrupt_twice(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step)

    monkeypatch.setattr(calibrate.CalibratePhase, "sample", interrupt_twice)
    run = run_here(config(talkers, tmp_path / "run", "calibrate", steps=4), expect=130)
    assert [s["step"] for s in run.steps] == [1, 2] and run.events[-1]["event"] == "interrupted"


def test_a_folder_with_a_run_is_never_mixed_or_overwritten(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "calibrate")
    first = run_here(run_folder.settle(cfg))
    with pytest.raises(ValueError, match="holds a run already.*'resume'.*'new'"):
        run_folder.settle(cfg)
    again = run_folder.settle(replace(cfg, on_existing_run="new"))
    assert again.folder == str(tmp_path / "run-2")
    second = run_here(again)
    assert [numbers(s) for s in second.steps] == [numbers(s) for s in first.steps]
    with pytest.raises(ValueError, match="other values of seed"):
        run_folder.settle(replace(cfg, on_existing_run="resume", seed=1))
    longer = run_here(run_folder.settle(replace(cfg, on_existing_run="resume", steps=3)))
    assert [s["step"] for s in longer.steps] == [1, 2, 3]


def test_a_loss_that_is_not_finite_touches_neither_weights_nor_checkpoint(
    talkers, tmp_path, monkeypatch
):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=3,
        checkpoint={"interval": 1},
        on_existing_run="resume",
    )
    real, calls = losses.policy_gradient, []

    def poisoned(logp_T, *rest):
        calls.append(1)
        total, metrics = real(logp_T, *rest)
        return (total * float("inf") if len(calls) == 2 else total), metrics

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "policy_gradient", poisoned)
        with pytest.raises(
            FloatingPointError, match=r"step 2: .*nonfinite-step-2-rank-0.pt.*optim.lr"
        ):
            run_here(cfg)
    run = load_run(cfg.folder)
    assert (
        [s["step"] for s in run.steps] == [1]
        and run.events[-1]["event"] == "failed"
        and run.summary is None
    )
    assert "nonfinite-step-2" in run.events[-1]["error"]
    dump = torch.load(tmp_path / "run/nonfinite-step-2-rank-0.pt", weights_only=False)
    assert len(dump["batches"][0]["target_T"]) > 0
    assert [p.name for p in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]
    resumed = run_here(run_folder.settle(cfg))
    clean = run_here(replace(cfg, folder=str(tmp_path / "clean")))
    assert [numbers(s) for s in resumed.steps] == [numbers(s) for s in clean.steps]


def test_the_card_of_a_model_without_a_template_shows_plain_prompts(talkers, tmp_path):
    (tmp_path / "none.jinja").touch()
    cfg = config(
        talkers,
        tmp_path / "run",
        "distill",
        steps=1,
        model={"path": str(talkers / "policy"), "template": str(tmp_path / "none.jinja")},
        distill={"source": "dataset", "on_policy": 0.0, "objective": "nll"},
        export={"enable": True},
    )
    run_here(cfg)
    assert "ids = tokenizer(" in (tmp_path / "run/export/README.md").read_text()
    assert not has_template(str(tmp_path / "run/export"))


def test_the_kl_budget_ends_the_run_in_good_order(talkers, tmp_path):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=8,
        guard={"kl_budget": 0.05},
        calibration={"mode": "off"},
        optim={"lr": 5e-4},
        reference={"beta": 0.01},
        rollout={"prompts": 24, "group": 4, "max_tokens": 8},
        checkpoint={"interval": 1, "keep_latest_k": 0},
        export={"enable": True, "dtype": "float32"},
        eval={"source": str(talkers / "data.jsonl"), "limit": 4, "at_start": False},
    )
    run = run_here(cfg, expect=4)
    stopped = next(e for e in run.events if e["event"] == "stopped")
    # the numbers of a step are of the weights before its update
    accepted = max(s["step"] for s in run.steps if s["reference_kl"] <= 0.05) - 1
    (measured,) = (e for e in run.events if e["event"] == "eval")
    assert measured["step"] == accepted, "of the weights that are exported, and of no others"
    assert (tmp_path / f"run/predictions/step-{accepted}.jsonl").exists()
    assert 0 < accepted < 7 and "kl_budget = 0.05" in stopped["reason"]
    assert stopped["restored_step"] == accepted, "the last weights within the budget"
    assert run.summary["step"] == len(run.steps) and run.events[-1]["event"] == "export"
    assert (run.summary["exit_code"], run.summary["stopped"]) == (4, stopped["reason"])
    card = (tmp_path / "run/export/README.md").read_text()
    assert f"the weights of step {accepted}; intervals" in card
    (kl,) = (s["reference_kl"] for s in run.steps if s["step"] == accepted)
    assert f"| reference_kl | {kl:.5g} |" in card, "of the last step that made the export"
    assert f"in {accepted} of 8 planned steps" in card and "A guard ended the run" in card
    short = replace(cfg, folder=str(tmp_path / "short"), steps=accepted)
    run_here(short)
    want, got = weights(short.folder), weights(cfg.folder)
    assert all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize(
    "checkpoint, restored",
    [
        ({"interval": 1, "keep_latest_k": 9}, 2),
        ({"interval": 1, "keep_latest_k": 2}, 2),  # six of later steps were written
        ({"interval": 1000}, 2),  # an evaluation that passes is saved
        ({"enable": False}, 0),
    ],
)
def test_the_utility_gate_restores_what_still_passed(
    talkers, tmp_path, monkeypatch, checkpoint, restored
):
    """Accuracy falls after step 2 and stays low: back to step 2, or to the start where nothing is
    saved. The log and the card say which.
    """
    accuracy = {0: 0.9, 1: 0.9, 2: 0.9, 5: 0.5, 8: 0.5}
    monkeypatch.setattr(
        "reflux.trainer.evaluation.phase.Evaluator.due",
        lambda self, step: {"eval/greedy": accuracy[step]} if step in accuracy else {},
    )
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=9,
        checkpoint=checkpoint,
        export={"enable": True, "dtype": "float32"},
    )
    run = run_here(cfg, expect=4)
    stopped = next(e for e in run.events if e["event"] == "stopped")
    assert len(run.steps) == 8 and stopped["restored_step"] == restored
    short = replace(cfg, folder=str(tmp_path / "short"), steps=2)
    if restored:
        run_here(short)
    want = (
        weights(short.folder) if restored else load_file(talkers / "policy" / "model.safetensors")
    )
    got = weights(cfg.folder)
    assert all(torch.equal(got[name], want[name]) for name in got)
    card = (tmp_path / "run/export/README.md").read_text()
    if restored:
        assert stopped["reason"].endswith("for the second time")
        assert "for the second time. These are the weights of step 2." in card
    else:
        says = "Step 2 is the last that passed, but has no checkpoint: the run is at the weights"
        assert f"{says} that it started from" in stopped["reason"] == run.summary["stopped"]
        assert f"{stopped['reason']}. These are the untrained weights." in card


def test_the_gate_compares_with_the_start_and_forgives_one_bad_reading(
    talkers, tmp_path, monkeypatch
):
    accuracy = {0: 0.9, 1: 0.5, 2: 0.9, 3: 0.5, 4: 0.89}
    monkeypatch.setattr(
        "reflux.trainer.evaluation.phase.Evaluator.due",
        lambda self, step: {"eval/greedy": accuracy[step]},
    )
    run = run_here(config(talkers, tmp_path / "run", "calibrate", steps=4))
    assert len(run.steps) == 4 and not any(e["event"] == "stopped" for e in run.events)


def test_a_grader_that_raises_costs_its_sample_and_nothing_else(talkers, tmp_path):
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "calibrate",
            task={"name": "runs:raise_sometimes", "max_failed": 1.0},
            rollout={"max_tokens": 24},
        )
    )
    assert 0 < run.steps[0]["grader_error"] <= 1 and len(run.steps) == 2 and run.summary is not None


def test_a_grader_that_always_raises_ends_the_run(talkers, tmp_path):
    """Nothing is learned from failed grades, and no export pretends so."""
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        task={"name": "runs:raise_sometimes"},
        rollout={"max_tokens": 24},
        export={"enable": True},
    )
    with pytest.raises(ValueError, match="runs:raise_sometimes.*more than task.max_failed = 0.05"):
        run_here(cfg)
    assert not (tmp_path / "run" / "export").exists()


def test_a_saved_config_repeats_the_run(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "distill", export={"enable": True, "dtype": "float32"})
    run = run_here(cfg)
    again = run_here(
        config_file.load(tmp_path / "run" / "config.toml", (f"folder={tmp_path / 'again'}",))
    )
    assert [numbers(s) for s in again.steps] == [numbers(s) for s in run.steps]
    a, b = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert again.summary["step"] == 2 and a


def scalars(folder):
    """Name -> [(step, value)] of TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in folder.rglob("events.out.tfevents*"):
        board = EventAccumulator(str(file)).Reload()
        for name in board.Tags()["scalars"]:
            found.setdefault(name, []).extend((e.step, e.value) for e in board.Scalars(name))
    return found


def test_tensorboard_gets_the_numbers_of_steps_and_evaluations(talkers, tmp_path):
    asked = {"eval": {"source": str(talkers / "data.jsonl"), "every": 1, "limit": 3}}
    asked |= {"task": {"name": "small_tasks:is_even"}, "log": {"tensorboard": True}}
    run = run_here(config(talkers, tmp_path / "run", "distill", steps=2, **asked))
    seen = scalars(tmp_path / "run")
    assert seen["loss"] == [(s["step"], pytest.approx(s["loss"])) for s in run.steps]
    told = [e for e in run.events if e["event"] == "eval"]
    assert [e["step"] for e in told] == [0, 1, 2]
    assert told[0].keys() - {"event", "wall_s", "step"} <= seen.keys(), "means and intervals"
    name = next(key for key in told[0] if key.startswith("eval/"))
    assert seen[name] == [(e["step"], pytest.approx(e[name])) for e in told]
    assert "wall_s" not in seen


def test_tensorboard_gets_the_numbers_of_a_run_without_steps(talkers, tmp_path):
    asked = {"eval": {"source": str(talkers / "data.jsonl"), "limit": 3}}
    asked |= {"task": {"name": "small_tasks:is_even"}, "log": {"tensorboard": True}}
    run = run_here(config(talkers, tmp_path / "run", "evaluate", **asked))
    (told,) = (e for e in run.events if e["event"] == "eval")
    measured = {k: v for k, v in told.items() if k.startswith("eval/") and isinstance(v, float)}
    assert measured, told
    expected = {k: [(0, pytest.approx(v, nan_ok=True))] for k, v in measured.items()}
    seen = scalars(tmp_path / "run")
    assert {k: seen[k] for k in expected} == expected
