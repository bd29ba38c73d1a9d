"""The command line: from any folder, as a script, a module or under torchrun; error messages and
exit codes.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from assets import free_port
from runs import MAIN, command, config, environment

from reflux.trainer import main
from reflux.trainer.config import loader as config_file
from reflux.trainer.config.loader import to_toml
from reflux.trainer.diagnosis.phase import DiagnosePhase
from reflux.trainer.runs.logger import load_run


def start(*words: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def file(talkers, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        to_toml(config(talkers, tmp_path / "run", "calibrate", steps=1, log={"quiet": False}))
    )
    return path


def test_a_script_imports_no_module_of_the_working_directory(file, tmp_path):
    """Not even one that is named like one of ours or of the standard library."""
    for name in ("tokenize.py", "kernels.py", "prompts.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    done = start(str(MAIN), "--config", "run.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 1/1" in done.stdout and load_run(tmp_path / "run").summary["step"] == 1
    again = start(str(MAIN), "--config", "run.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr and "Traceback" not in again.stderr


def test_torchrun_from_another_folder(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "distill", steps=1)
    words = command(cfg, tmp_path / "run.toml", ranks=2)
    done = subprocess.run(
        words, cwd="/", env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = load_run(tmp_path / "run")
    assert run.head["ranks"] == 2 and len(run.steps) == 1


def test_as_a_module_it_prints_every_option_and_reads_them_back(file, tmp_path):
    words = ("--config", str(file), "--set", "optim.lr=0.5", "--print-config")
    done = start("-m", "reflux.trainer.main", *words, cwd="/")
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.toml").write_text(done.stdout)
    printed = config_file.load(tmp_path / "printed.toml")
    assert printed == config_file.load(file, ("optim.lr=0.5",)) and printed.optim.lr == 0.5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "calibration.strenght=1"], "did you mean calibration.strength?"),
        (["--set", "calibration.strength=-1"], "want >= 0"),
        (["--set", "nonsense"], "want a.b=value"),
        (["--set", "model.path=/nowhere"], "/nowhere"),
        (["--set", "training.seq_length=3"], "did you mean training.seq_len?"),
        (["--set", "training.steps=3"], "set steps instead"),
        (["--set", "data.source=missing.jsonl"], "missing.jsonl: no such file"),
        (["--set", "task.name=exakt"], "did you mean exact?"),
    ],
)
def test_mistakes_are_named_with_exit_code_2(
    file, capsys, monkeypatch, titan_process, words, message
):
    monkeypatch.delenv("REFLUX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.main(["--config", str(file), *words])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed
    _leave_group()


def test_the_traceback_of_a_mistake_is_shown_with_reflux_traceback(file, monkeypatch):
    monkeypatch.setenv("REFLUX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="want a.b=value"):
        main.main(["--config", str(file), "--set", "nonsense"])


def test_a_missing_file_names_its_neighbour(file, capsys):
    with pytest.raises(SystemExit):
        main.main(["--config", str(file.with_name("rum.toml"))])
    assert "did you mean" in capsys.readouterr().err


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():  # an engine that failed half-way
        dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(free_port())


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_where_nothing_is_trained_stops_at_once(
    talkers, tmp_path, monkeypatch, capsys, titan_process
):
    """There is no step to finish: the first signal counts, and the same command resumes later."""
    over = {
        "task": {"name": "runs:is_even"},
        "data": {"limit": 2},
        "diagnose": {"student_texts": 2, "heatmap_texts": 0},
        "on_existing_run": "resume",
    }
    cfg = config(talkers, tmp_path / "run", "diagnose", **over)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(cfg))
    with monkeypatch.context() as patch:
        patch.setattr(
            DiagnosePhase, "run", lambda self: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5)
        )
        assert main.main(["--config", str(file)]) == 130
    assert "resumes from the last save" in capsys.readouterr().err
    assert (
        load_run(tmp_path / "run").summary is None and not (tmp_path / "run" / "report.md").exists()
    )
    os.environ["MASTER_PORT"] = str(free_port())
    assert main.main(["--config", str(file)]) == 0 and (tmp_path / "run" / "report.md").exists()
