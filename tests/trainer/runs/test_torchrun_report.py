"""torchrun at the end of trainer/main.py: no traceback of its own, and the worker's exit code."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from reflux.trainer.runs import torchrun_report

MAIN = torchrun_report.MAIN


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run([*start, *words], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_it_is_installed_where_torchrun_looks():
    (entry,) = [
        e for e in importlib.metadata.entry_points(group="torchrun.handlers") if e.name == "reflux"
    ]
    assert entry.load() is torchrun_report.handler
    with pytest.raises(ValueError, match="want c10d or static"):
        entry.load()()(None)


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path):
    done = torchrun(str(MAIN), "--config", "no-such.toml", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    assert done.stderr.count("no-such.toml: no such file") == 1, "each rank said it"


def test_another_script_is_reported_as_ever(tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit(2)\n")
    done = torchrun("main.py", cwd=tmp_path)
    assert done.returncode == 1 and "ChildFailedError" in done.stderr


@pytest.mark.parametrize(
    "words, ours",
    [
        (["torchrun", str(MAIN)], True),
        (["torchrun", "-m", "reflux.trainer.main"], True),
        (["torchrun", "main.py"], False),
        (["torchrun", "-m", "other.main"], False),
    ],
)
def test_only_our_own_runs_change(monkeypatch, tmp_path, words, ours):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    torchrun_report.handler()
    assert (sys.excepthook is torchrun_report.report) == ours


@pytest.mark.parametrize(
    "code, passed_on", [(2, 2), (3, 3), (4, 4), (130, 130), (1, 1), (-9, None)]
)
def test_exit_codes(capsys, code, passed_on):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="")
    error = ChildFailedError("main.py", {0: failure})
    if passed_on is None:
        torchrun_report.report(ChildFailedError, error, None)
        assert "ChildFailedError" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as ended:
        torchrun_report.report(ChildFailedError, error, None)
    assert ended.value.code == passed_on and capsys.readouterr().err == ""


def test_a_signal_to_torchrun_is_an_interrupted_run():
    from torch.distributed.elastic.multiprocessing.api import SignalException

    with pytest.raises(SystemExit) as ended:
        torchrun_report.report(SignalException, SignalException("got 2", 2), None)
    assert ended.value.code == 130
