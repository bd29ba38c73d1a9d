"""Errors in the middle of a run: the last finished step is saved, the words say so, and the run
goes on from there to the last digit.
"""

import errno
import os
from pathlib import Path

import pytest
from assets import free_port
from full_disk import limited_files
from runs import config, numbers, run_here

from reflux.trainer import main
from reflux.trainer.calibration.phase import CalibratePhase
from reflux.trainer.config.loader import to_toml
from reflux.trainer.disk_space import DiskError
from reflux.trainer.engine.export import export_hf
from reflux.trainer.runs import run_folder
from reflux.trainer.runs.logger import Record, load_run

pytestmark = pytest.mark.usefixtures("titan_process")
OVER = {
    "steps": 5,
    "on_existing_run": "resume",
    "calibration": {"mode": "undistillable"},
    "reference": {"beta": 0.2, "dtype": "float32"},
    "log": {"samples_every": 1},
}
PLACES = {
    "sample": (CalibratePhase, "sample"),
    "score": (CalibratePhase, "score"),
    "log": (Record, "__call__"),
    "close": (CalibratePhase, "close_step"),
}


@pytest.fixture
def cfg(talkers, tmp_path):
    return config(talkers, tmp_path / "run", "calibrate", **OVER)


@pytest.fixture(scope="module")
def whole(talkers, titan_process, tmp_path_factory):
    """The run without an error: what each step logged."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = run_here(config(talkers, folder, "calibrate", **OVER))
    return [numbers(step) for step in run.steps]


def fail(patch, place: str, at: int, error: BaseException) -> None:
    """Makes the method raise at its call of this number."""
    owner, name = PLACES[place]
    real, made = getattr(owner, name), []

    def method(self, *args, **kwargs):
        made.append(1)
        if len(made) == at:
            raise error
        return real(self, *args, **kwargs)

    patch.setattr(owner, name, method)


def saved(cfg) -> list[str]:
    home = Path(cfg.folder) / "checkpoint"
    return sorted(p.name for p in home.iterdir()) if home.exists() else []


@pytest.mark.parametrize(
    "place, at, step",
    [("sample", 3, 2), ("score", 5, 4), ("log", 4, 4), ("close", 4, 3)],  # close counts step 0
)
def test_the_last_finished_step_is_saved(cfg, whole, monkeypatch, place, at, step):
    with monkeypatch.context() as patch:
        fail(patch, place, at, KeyError("answer"))
        with pytest.raises(KeyError) as caught:
            run_here(cfg)
    assert saved(cfg) == [f"step-{step}"]
    notes = caught.value.__notes__
    assert notes[0] == f"step {step} is saved in {cfg.folder}"
    assert notes[1].startswith(f"To go on from step {step}, in ")
    assert load_run(cfg.folder).events[-1]["error"] == "KeyError: 'answer'"
    if place != "log":  # the line of a step that could not be logged is lost, and nothing else
        resumed = run_here(run_folder.settle(cfg))
        assert [numbers(s) for s in resumed.steps] == whole


def test_the_message_names_the_saved_step_and_a_command_that_works(
    cfg, whole, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(cfg).replace('"resume"', '"fail"'))
    with monkeypatch.context() as patch:
        fail(patch, "score", 4, ValueError("row 17 has no prompt"))
        with pytest.raises(SystemExit) as ended:
            main.main(["--config", str(file)])
    words = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in words
    assert "error: row 17 has no prompt\n" in words and "step 3 is saved in" in words
    command = words.split("To go on from step 3, in ")[1].splitlines()[1].split()
    os.environ["MASTER_PORT"] = str(free_port())
    assert main.main(command[command.index("--config") :]) == 0
    assert [numbers(s) for s in load_run(cfg.folder).steps] == whole


def full_at(patch, file: str, at: int) -> None:
    """The line of this number for this file of the log finds the disk full."""
    real, made = Record._write, []

    def write(self, out, line):
        made.extend([1] * out.name.endswith(file))
        if len(made) >= at and out.name.endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device", out.name)
        return real(self, out, line)

    patch.setattr(Record, "_write", write)


@pytest.mark.parametrize("file, at", [("run.jsonl", 4), ("samples.jsonl", 3)])
def test_a_log_without_space_ends_the_run_in_words(cfg, monkeypatch, file, at):
    with monkeypatch.context() as patch:
        full_at(patch, file, at)
        with pytest.raises(DiskError) as caught:
            run_here(cfg)
    words, notes = str(caught.value), caught.value.__notes__
    assert words.startswith(f"no space left in {cfg.folder}: ") and file in words
    assert "Kept: step-" in words and "is saved in" in notes[0] and "To go on" in notes[1]


def test_files_that_may_not_grow_end_the_run_in_words(cfg, whole):
    """The limit lets the log through and no checkpoint, and the export neither."""
    with limited_files(100_000), pytest.raises(DiskError) as caught:
        run_here(cfg)
    assert "the checkpoint of step 5 needs" in str(caught.value)
    assert "Kept: no checkpoint" in str(caught.value) and saved(cfg) == []
    resumed = run_here(run_folder.settle(cfg))
    assert [numbers(s) for s in resumed.steps] == whole


def test_an_export_without_space_keeps_the_one_before(talkers, tmp_path, monkeypatch):
    over = OVER | {"export": {"enable": True, "dtype": "float32"}, "steps": 1}
    cfg = config(talkers, tmp_path / "run", "calibrate", **over)
    run_here(cfg)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/export").iterdir()}
    longer = config(talkers, tmp_path / "run", "calibrate", **over | {"steps": 2})

    def limited(*args, **kwargs):
        with limited_files(100_000):
            export_hf(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("reflux.trainer.engine.engine.export_hf", limited)
        with pytest.raises(DiskError, match="no space left in .*/export: .*Kept: step-1, step-2"):
            run_here(run_folder.settle(longer))
    now = {p.name: p.read_bytes() for p in (tmp_path / "run/export").iterdir()}
    assert now == before and not (tmp_path / "run/export.partial").exists()
    run_here(run_folder.settle(longer))
    assert (tmp_path / "run/export/model-00001-of-00001.safetensors").exists()
