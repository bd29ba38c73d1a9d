"""Commands in messages: what was started, quoted for a shell; that they run is tested in
tests/trainer/test_hints.py.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.runs import commands

MAIN = ["python", "trainer/main.py"]
WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(commands, "_command", None)
    monkeypatch.setattr(commands, "_folder", None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize(
    "given_words, expected",
    [
        ([], ["--set", "on_existing_run=resume"]),
        (["--set", "seed=1"], ["--set", "seed=1", "--set", "on_existing_run=resume"]),
        (["--set", "on_existing_run=fail"], ["--set", "on_existing_run=resume"]),
        (["--set=on_existing_run=new"], ["--set", "on_existing_run=resume"]),
        (
            ["--set", "on_existing_run=resume", "--set", "take_over_lock=true"],
            ["--set", "on_existing_run=resume"],
        ),
        (["--set", "folder=x y"], ["--set", "folder=x y", "--set", "on_existing_run=resume"]),
    ],
)
def test_resuming_replaces_what_was_said_about_it(given_words, expected):
    commands.remember(["--config", "a b.toml", *given_words])
    words = shlex.split(commands.resume())
    assert words[2:] == ["--config", "a b.toml", *expected]
    assert Path(words[1]).resolve() == commands.MAIN


def test_resuming_names_the_folder_that_the_same_words_would_not_settle_on():
    commands.remember(["--config", "a", "--set", "folder=run"], run_folder="run-2")
    assert commands.resume().endswith("--set on_existing_run=resume --set folder=run-2")


def test_taking_over_is_said_where_it_is_meant():
    commands.remember(["--config", "a"])
    assert commands.resume(take_over=True).endswith("resume --set take_over_lock=true")
    accepted = "resume --set on_changed_input=accept"
    assert commands.resume(changed_inputs=True).endswith(accepted)


@given(WORDS)
def test_every_argument_survives_the_shell(words):
    commands.remember(words)
    assert shlex.split(commands.check())[2:] == [*words, "--check"]


def test_the_words_of_the_command_line_are_kept_with_the_interpreters_own_options(tmp_path):
    code = "from reflux.trainer.runs import commands; print(commands.again('b c'))"
    (tmp_path / "x.py").write_text(code)
    words = [sys.executable, "-W", "ignore", "x.py", "a's"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout) == [*words, "b c"]


def test_under_torchrun_it_is_torchruns_own_command(tmp_path):
    """With all its options; the worker sees only its own words."""
    (tmp_path / "x.py").write_text(
        "from reflux.trainer.runs import commands, first_rank\n"
        "if first_rank.is_first(): print(commands.again('b'))\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run"]
    words = ["--standalone", "--nproc-per-node", "2", "x.py", "a c"]
    done = subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True)
    assert shlex.split(done.stdout) == [*start, *words, "b"], done.stderr


def test_under_torchrun_that_cannot_be_seen_it_is_an_equal_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "getppid", lambda: 2**22 + 1)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "x"])
    _, *words = shlex.split(commands.again())
    assert words == "-m torch.distributed.run --nproc-per-node 4 main.py --config x".split()


def test_names_are_relative_where_that_is_shorter(monkeypatch, tmp_path):
    monkeypatch.chdir(commands.MAIN.parents[1])
    monkeypatch.setenv("PATH", "")
    assert commands.script("--config", "x").endswith(" trainer/main.py --config x")
    monkeypatch.chdir(tmp_path)
    assert commands.script() == f"{sys.executable} {commands.MAIN}"
    assert commands.module("a.b", "c d") == f"{sys.executable} -m a.b 'c d'"


def test_python_is_called_python_only_where_that_is_this_one(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands.module("m").split()[0] != "python"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert commands.module("m") == "python -m m"


def test_check_and_plan_are_sub_commands_of_what_was_typed():
    try:
        commands.remember(["--config", "a.toml"], typed=["run", "a.toml", "--set", "steps=3"])
        typed = shlex.split(commands.again())
        at = typed.index("run")
        for made, word in ((commands.check(), "check"), (commands.plan(), "plan")):
            assert shlex.split(made) == [*typed[:at], word, *typed[at + 1 :]]
        commands.remember(["--config", "a.toml", "--check"])
        assert shlex.split(commands.plan())[-3:] == ["--config", "a.toml", "--dry-run"]
        assert shlex.split(commands.check())[-3:] == ["--config", "a.toml", "--check"]
    finally:
        commands.forget()
