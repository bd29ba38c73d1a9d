"""The worked examples of CONTRIBUTING.md, run as they stand there."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from runs import config, run_here

from reflux.trainer.config.calibration_rewards import REWARDS
from reflux.trainer.config.phases import PHASES, PhaseSpec

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
pytestmark = pytest.mark.usefixtures("titan_process")


def example(title: str) -> tuple[str, str]:
    """(the module's source, the line of the table) of a worked example."""
    section = PAGE.split(f"### Worked example: {title}")[1].split("\n### ")[0].split("\n## ")[0]
    source = re.search(r"```python\n(.*?)```", section, re.S)[1]
    line = re.search(r"```\n(    \".*?)```", section, re.S)[1]
    return source, line.strip().rstrip(",")


def load_module(monkeypatch, name: str, source: str) -> None:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_calibration_reward(talkers, tmp_path, monkeypatch):
    source, line = example("a calibration reward")
    ((name, implementation),) = eval(f"{{{line}}}").items()
    load_module(monkeypatch, implementation.partition(":")[0], source)
    monkeypatch.setitem(REWARDS, name, implementation)
    calibration = {"mode": "distillable", "reward": name, "cal_gate": "none"}
    run = run_here(config(talkers, tmp_path / "run", "calibrate", calibration=calibration))
    for step in run.steps:
        assert step["reward/cal"] == pytest.approx(-step["cal/bytes"]) and step["reward/cal"] < 0


def test_a_phase(talkers, tmp_path, monkeypatch):
    source, line = example("a phase")
    ((name, spec),) = eval(f"{{{line}}}", {"PhaseSpec": PhaseSpec}).items()
    load_module(monkeypatch, spec.implementation.partition(":")[0], source)
    monkeypatch.setitem(PHASES, name, spec)
    base = config(talkers, tmp_path / "run", "diagnose")
    run = run_here(replace(base, phase=name))
    assert [e["prompts"] for e in run.events if e["event"] == "eval"] == [24]
