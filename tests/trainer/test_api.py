"""Runs from Python: the numbers of the command line, a process that is afterwards what it was, and
callbacks that can end a run but lose nothing.
"""

import asyncio
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import config, environment, numbers, run_forked

import reflux
from reflux.trainer import api
from reflux.trainer.callbacks import Callback, EvaluationEvent, RolloutsEvent, StepEvent
from reflux.trainer.config.loader import to_toml
from reflux.trainer.data.batch import Rollout
from reflux.trainer.runs import commands
from reflux.trainer.runs.logger import load_run

ROOT = Path(__file__).parents[2]
SINGLE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def plain_process(tmp_path, monkeypatch):
    """As a user's: torchrun's variables are not set. In a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in SINGLE:
        monkeypatch.delenv(name, raising=False)


def state() -> tuple:
    """What a run may not leave changed."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    root = logging.getLogger()
    logs = list(root.handlers), root.level
    random = torch.get_rng_state().tolist()
    environment = {k: v for k, v in os.environ.items() if k in SINGLE}
    return (
        handlers,
        logs,
        random,
        environment,
        gc.isenabled(),
        torch._C._is_multithreading_enabled(),
        sys.excepthook,
    )


class Look(Callback):
    def __init__(self):
        self.events = []

    def on_step(self, event):
        self.events.append(event)

    on_evaluation = on_rollouts = on_step


def test_two_runs_in_one_process_are_two_processes(talkers, tmp_path):
    """A calibration, then a distillation from it, the second inside an event loop, as in a
    notebook.
    """
    over = {"steps": 2, "export": {"enable": True, "dtype": "float32"}}
    first = config(talkers, tmp_path / "teacher", "calibrate", **over)
    before = state()
    teacher = reflux.run(first)
    second = config(talkers, tmp_path / "student", "distill", steps=2)
    overrides = {"teacher.path": teacher.export_folder}

    async def cell():
        return reflux.run(second, overrides)

    student = asyncio.run(cell())
    assert state() == before and not dist.is_initialized()
    for name, made in (("teacher", teacher), ("student", student)):
        saved = (tmp_path / name / "config.toml").read_text()
        (tmp_path / "again.toml").write_text(saved.replace(f'/{name}"', f'/{name}-again"'))
        other = run_forked(["--config", "again.toml"], tmp_path)
        assert other.wait(120) == 0, other.output
        alone = load_run(tmp_path / f"{name}-again")
        assert list(map(numbers, made.steps)) == list(map(numbers, alone.steps))
    assert teacher.exit_code == 0 and teacher.reason is None
    assert teacher.metrics["loss"] == teacher.steps[-1]["loss"]
    assert teacher.export_folder == tmp_path / "teacher" / "export"
    assert student.export_folder is None and student.folder == tmp_path / "student"


def test_callbacks_hear_of_rollouts_steps_and_evaluations(talkers, tmp_path):
    over = {"eval": {"source": str(tmp_path / "data.jsonl"), "limit": 2, "every": 1}}
    look = Look()
    done = reflux.run(config(talkers, tmp_path / "run", "calibrate", **over), callbacks=[look])
    kinds = [type(e) for e in look.events]
    one_step = [RolloutsEvent, StepEvent, EvaluationEvent]
    assert kinds == [EvaluationEvent, *one_step, *one_step]
    rollouts, step, evaluation = look.events[1:4]
    assert len(rollouts.rollouts) == 2 * 4 and isinstance(rollouts.rollouts[0], Rollout)
    assert (step.step, step.total_steps, step.rank) == (1, 2, 0)
    assert step.metrics["loss"] == done.steps[0]["loss"]
    assert evaluation.metrics["eval/greedy"] == done.evaluations[1]["eval/greedy"]
    assert done.metrics["eval/greedy"] == done.evaluations[-1]["eval/greedy"]


def test_a_callback_that_fails_ends_the_run_and_loses_nothing(talkers, tmp_path):
    class Bad(Callback):
        def on_step(self, event):
            if event.step == 2:
                {}["gone"]

    cfg = config(talkers, tmp_path / "run", "distill", steps=3)
    before = state()
    with pytest.raises(
        ValueError, match=r"Bad.on_step failed at step 2: KeyError: 'gone'"
    ) as error:
        reflux.run(cfg, callbacks=[Bad()])
    assert isinstance(error.value.__cause__.__cause__, KeyError) and state() == before
    told = "\n".join(error.value.__notes__)
    assert "step 2 is saved in" in told and "--set on_existing_run=resume" in told
    assert f"--config {tmp_path / 'run' / 'config.toml'}" in told or "run/config.toml" in told
    assert commands._command is None
    with pytest.raises(ValueError, match="holds a run already"):
        reflux.run(cfg)
    done = reflux.run(cfg, {"on_existing_run": "resume"})
    assert [s["step"] for s in done.steps] == [1, 2, 3]


@pytest.mark.parametrize(
    "overrides, callbacks, says",
    [
        ({}, [Look], "want instances of subclasses of reflux.Callback"),
        ({"optim.lr": -1.0}, [], r"overrides\['optim.lr'\]: optim.lr = -1.0"),
        ({"model.path": "nowhere"}, [], "nowhere"),
    ],
)
def test_mistakes_are_value_errors(talkers, tmp_path, overrides, callbacks, says):
    (tmp_path / "a.toml").write_text(to_toml(config(talkers, tmp_path / "run", "distill")))
    before = state()
    with pytest.raises(ValueError, match=says):
        reflux.run("a.toml", overrides, callbacks)
    assert state() == before and not (tmp_path / "run").exists()


def test_a_process_group_of_the_callers_is_left_alone(talkers, tmp_path, titan_process):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with pytest.raises(ValueError, match="has a process group already"):
        reflux.run(config(talkers, tmp_path / "run", "distill"))
    assert dist.is_initialized()
    dist.destroy_process_group()


def test_a_second_run_of_the_process_is_refused_and_the_first_goes_on(talkers, tmp_path):
    """As from two threads of a notebook, or from a callback."""
    found: list[Exception] = []

    def second() -> None:
        try:
            reflux.run(config(talkers, tmp_path / "second", "distill"))
        except ValueError as error:
            found.append(error)

    class Nested(Callback):
        def on_step(self, event: StepEvent) -> None:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    run = reflux.run(config(talkers, tmp_path / "first", "distill"), callbacks=[Nested()])
    assert run.exit_code == 0 and len(run.steps) == len(found) == 2
    assert all("another run or check goes on in this process" in str(e) for e in found)
    assert not (tmp_path / "second").exists() and not dist.is_initialized()


def test_an_evaluation_and_a_check(talkers, tmp_path):
    over = {"eval": {"source": str(tmp_path / "data.jsonl"), "limit": 2}}
    cfg = config(talkers, tmp_path / "run", "distill", **over)
    report = reflux.check(cfg)
    assert report.findings and not [f for f in report.findings if f.level == "error"]
    assert not (tmp_path / "run").exists()
    accept = {"rule": {"metric": "greedy", "min": 2.0}}
    evaluated = reflux.run(config(talkers, tmp_path / "e", "evaluate", accept=accept, **over))
    assert evaluated.exit_code == 3 and evaluated.steps == () and "eval/greedy" in evaluated.metrics


SCRIPT = """
import reflux

class Bad(reflux.Callback):
    def on_step(self, event):
        if event.rank == 1:
            raise RuntimeError("only here")

first = reflux.run("a.toml")
second = reflux.run("a.toml", {"folder": "b"})
same = [s["loss"] for s in first.steps] == [s["loss"] for s in second.steps]
try:
    reflux.run("a.toml", {"folder": "c"}, callbacks=[Bad()])
except ValueError as error:
    print(f"said: {same} {len(second.steps)} {error}", flush=True)
"""


def test_under_torchrun_runs_follow_each_other_and_ranks_end_together(talkers, tmp_path):
    (tmp_path / "a.toml").write_text(to_toml(config(talkers, tmp_path / "a", "distill", steps=1)))
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = "said: True 1 Bad.on_step failed at step 1: RuntimeError: only here"
    assert done.stdout.count(said) == 2, done.stdout


def test_the_example_of_the_page(talkers, tmp_path, capsys):
    """docs/python.md: calibrate, then distil from what came of it."""
    page = (ROOT / "docs" / "python.md").read_text()
    example, check = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    lines = [line for line in example.splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 10
    evaluated = {"eval": {"source": str(tmp_path / "data.jsonl"), "limit": 2}}
    over = evaluated | {"export": {"enable": True}, "steps": 2}
    for phase in ("calibrate", "distill"):
        cfg = config(talkers, tmp_path / phase, phase, **over)
        Path(f"{phase}.toml").write_text(to_toml(cfg))
    names: dict = {}
    exec(compile(check, "docs/python.md", "exec"), names)
    exec(compile(example, "docs/python.md", "exec"), names)
    assert names["student"].exit_code == 0 and len(names["student"].steps) == 2
    printed = load_run("distill").head["config"]
    assert printed["teacher"]["path"] == str(tmp_path / "calibrate" / "export")
    assert "after 2 steps in" in capsys.readouterr().out


# --- the names


def test_every_public_name_is_there_and_costs_nothing_before_it_is_asked_for():
    for name in reflux.__all__:
        assert getattr(reflux, name) is not None and name in dir(reflux)
    assert reflux.run is api.run and re.fullmatch(r"\d+\.\d+\..*", reflux.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        reflux.nothing  # noqa: B018
    code = "import sys, reflux; dir(reflux); reflux.__version__; reflux.Callback\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
