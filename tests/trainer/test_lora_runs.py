"""Whole runs with adapters: a calibration resumes to the last digit; its adapter is a teacher,
a student and a model to evaluate; a guard puts the accepted adapter back.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_runs import cut
from engine_cases import edited
from runs import config, numbers, run_here
from torch.distributed.checkpoint import FileSystemReader

from reflux.trainer.adapter_folder import read_adapter
from reflux.trainer.engine.weights import ADAPTERS
from reflux.trainer.runs import run_folder
from reflux.trainer.runs.lock import InUse

pytestmark = pytest.mark.usefixtures("titan_process")
CALIBRATED = {
    "calibration": {"mode": "undistillable", "strength": 0.5, "cal_gate": "none"},
    "lora": {"rank": 4, "targets": ["*_proj"]},
    "optim": {"lr": 0.02},
    "on_existing_run": "resume",
    "checkpoint": {"interval": 2},
}


@pytest.fixture(scope="module")
def calibrated(talkers, tmp_path_factory, titan_process):
    """A run of four steps, with its adapter exported."""
    folder = tmp_path_factory.mktemp("lora") / "whole"
    over = CALIBRATED | {"steps": 4, "export": {"enable": True}}
    return run_here(config(talkers, folder, "calibrate", **over)), folder


def test_a_run_goes_on_to_the_last_digit_from_checkpoints_of_adapters_alone(
    talkers, tmp_path, calibrated
):
    whole, folder = calibrated
    kls = [step["reference_kl"] for step in whole.steps]
    assert kls[0] == 0.0 and min(kls[1:]) > 1e-4, "the anchor is exactly 0 at the start"
    cfg = config(talkers, tmp_path / "cut", "calibrate", **CALIBRATED | {"steps": 2})
    run_here(cfg)
    stored = FileSystemReader(tmp_path / "cut/checkpoint/step-2").read_metadata()
    tensors = {n for n, x in stored.state_dict_metadata.items() if hasattr(x, "size")}
    weights = {n for n in tensors if not n.startswith(("optimizer", "random", "train_state"))}
    assert weights and all(n.endswith(ADAPTERS) for n in weights), sorted(weights)[:5]
    moments = {n for n in tensors if n.startswith("optimizer") and "exp_avg" in n}
    assert len(moments) == 2 * len(weights)
    resumed = run_here(run_folder.settle(replace(cfg, steps=4)))
    assert [numbers(s) for s in resumed.steps] == [numbers(s) for s in whole.steps]


def test_a_damaged_checkpoint_of_adapters_costs_its_own_steps_alone(talkers, calibrated):
    """The newest is half a file: the run names it, goes on from the one before, and ends with the
    same numbers and the same adapter.
    """
    whole, folder = calibrated
    copy = shutil.copytree(folder, folder.with_name("damaged"))  # the same data beside it
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "export")
    cut(max((copy / "checkpoint/step-4").glob("*.distcp")), 0.5)
    over = CALIBRATED | {"steps": 4, "export": {"enable": True}}
    again = run_here(run_folder.settle(config(talkers, copy, "calibrate", **over)))
    assert sorted(p.name for p in (copy / "checkpoint").iterdir()) == [
        "damaged-4",
        "step-2",
        "step-4",
    ]
    (event,) = [e for e in again.events if e["event"] == "checkpoint"]
    assert "step-4" in str(event)
    assert [numbers(s) for s in again.steps] == [numbers(s) for s in whole.steps]
    files = [f / "export/adapter_model.safetensors" for f in (folder, copy)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_of_adapters_owns_its_folder(talkers, tmp_path, calibrated):
    """While another process holds it, a second writer is refused and nothing changes."""
    folder = shutil.copytree(calibrated[1], tmp_path / "held")
    cfg = config(talkers, folder, "calibrate", **CALIBRATED | {"steps": 6})
    code = f"import sys, reflux.trainer.runs.lock as l\nwith l.hold({str(folder)!r}):\n"
    code += "    print('held', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout.readline() == b"held\n"
        before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        with pytest.raises(InUse, match=f"in use by process {holder.pid} on "):
            with run_folder.claim(cfg):
                pass
        after = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        assert after == before
        holder.stdin.close()
        holder.wait()


def test_another_rank_or_base_is_refused_on_resume(talkers, tmp_path, calibrated):
    whole, folder = calibrated
    over = CALIBRATED | {"steps": 4}
    other = config(talkers, folder, "calibrate", **over | {"lora": {"rank": 2}})
    with pytest.raises(ValueError, match="other values of lora.rank .*, lora.targets "):
        run_folder.settle(other)
    copy = shutil.copytree(folder, tmp_path / "copy")
    base = edited(talkers, "policy", tmp_path, lambda t: t["model.norm.weight"].add_(1))
    moved = config(talkers, copy, "calibrate", **over, model={"path": str(base)})
    with pytest.raises(ValueError, match="policy .*model.safetensors has changed"):
        run_here(moved)


@pytest.mark.parametrize("phase", ["evaluate", "distill", "diagnose"])
def test_the_adapter_is_read_wherever_a_model_is(talkers, tmp_path, calibrated, phase):
    export = str(calibrated[1] / "export")
    assert read_adapter(export).base == str(talkers / "policy")
    card = (calibrated[1] / "export/README.md").read_text()
    assert "library_name: peft" in card and "LoRA of rank 4, alpha 32" in card
    data = str(calibrated[1].parent / "data.jsonl")
    over = {
        "evaluate": {"model": {"path": export}, "eval": {"source": data, "limit": 4}},
        "distill": {"teacher": {"path": export}},
        "diagnose": {"teacher": {"path": export}, "diagnose": {"student_texts": 2}},
    }[phase]
    run = run_here(config(talkers, tmp_path / "run", phase, **over))
    assert run.summary is not None
    if phase == "distill":
        # the first step's KL is that of the calibrated model to its own base
        assert run.steps[0]["kl"] > 1e-4


def test_an_adapter_of_other_base_weights_is_refused(talkers, tmp_path, calibrated):
    export = shutil.copytree(calibrated[1] / "export", tmp_path / "export")
    base = edited(talkers, "policy", tmp_path, lambda t: t["model.norm.weight"].add_(1))
    table = json.loads((export / "adapter_config.json").read_text())
    table["base_model_name_or_path"] = str(base)
    (export / "adapter_config.json").write_text(json.dumps(table))
    cfg = config(talkers, tmp_path / "run", "distill", teacher={"path": str(export)})
    with pytest.raises(ValueError, match="was trained on another model.safetensors than its base"):
        run_here(cfg)


def test_a_guard_puts_the_accepted_adapter_back(talkers, tmp_path):
    over = CALIBRATED | {
        "steps": 6,
        "guard": {"kl_budget": 1e-3},
        "export": {"enable": True},
        "checkpoint": {"interval": 1, "keep_latest_k": 9},
    }
    run = run_here(config(talkers, tmp_path / "run", "calibrate", **over), expect=4)
    (stopped,) = [e for e in run.events if e["event"] == "stopped"]
    assert "KL(policy || reference) reached" in stopped["reason"]
    assert read_adapter(str(tmp_path / "run/export")) is not None
    torch.manual_seed(0)


def test_merged_export_is_a_model_folder(talkers, tmp_path):
    over = CALIBRATED | {"steps": 1, "export": {"enable": True, "merge": True}}
    run_here(config(talkers, tmp_path / "run", "calibrate", **over))
    export = Path(tmp_path / "run/export")
    assert (export / "config.json").is_file() and read_adapter(str(export)) is None
    assert "merged into the weights" in (export / "README.md").read_text()
