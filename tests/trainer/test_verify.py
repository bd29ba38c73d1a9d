"""python -m reflux.trainer.verify FOLDER: a line for each checkpoint, and an exit code."""

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_runs import cut, flip

from reflux.trainer import verify
from reflux.trainer.engine.manifest import Manifest, data_files, digest_and_sync, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def run(tmp_path):
    """A run's folder with three checkpoints; the last one has the weights alone."""
    for step in (1, 20, 3):
        folder = tmp_path / "checkpoint" / f"step-{step}"
        state = {"weight": torch.arange(1000.0)} | ({"train_state.step": step} if step < 20 else {})
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        files = {name: digest_and_sync(folder / name) for name in data_files(folder)}
        write_manifest(folder, Manifest(step, files))
    return tmp_path


def test_whole_checkpoints(run, capsys):
    assert verify.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step-1", "step-3", "step-20"]
    assert lines[0].startswith("step-1: whole; weights, optimizer and state, ")
    assert "step-20: whole; weights alone" in lines[2]


@pytest.mark.parametrize("damage", [lambda f: flip(f, 0.6), lambda f: cut(f, 0.5)])
def test_damage_is_named_with_exit_code_2(run, capsys, damage):
    damage(run / "checkpoint" / "step-3" / "__0_0.distcp")
    assert verify.main([str(run / "checkpoint")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("step-3: damaged: __0_0.distcp ") and "whole" in lines[0]
    assert verify.main([str(run / "checkpoint" / "step-3")]) == 2
    assert verify.main([str(run / "checkpoint" / "step-1")]) == 0
    assert (run / "checkpoint" / "step-3").exists(), "it only looks"


def test_without_a_manifest_it_says_what_it_cannot_know(run, capsys):
    (run / "checkpoint" / "step-3" / "manifest.json").unlink()
    assert verify.main([str(run)]) == 0
    assert "step-3: no manifest" in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [("", "holds no checkpoint"), ("x", "no such folder")])
def test_a_folder_without_checkpoints_is_a_mistake_in_words(tmp_path, capsys, name, words):
    with pytest.raises(SystemExit) as ended:
        verify.main([str(tmp_path / name)])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_as_a_command(run):
    words = [sys.executable, "-m", "reflux.trainer.verify", str(run)]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("whole") == 3, done.stderr
