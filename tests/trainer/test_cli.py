"""The console command `reflux`: each sub-command reaches what does its work, in words and exit
codes; nothing heavy is imported for help. The wheel's own command: tests/install.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from assets import free_port
from runs import config, environment

from reflux.trainer import cli, subcommands
from reflux.trainer.config.loader import to_toml
from reflux.trainer.runs import commands
from reflux.trainer.runs.logger import load_run

ROOT = Path(__file__).parents[2]
REFLUX = [sys.executable, "-m", "reflux.trainer.cli"]


def reflux(*words: str, cwd, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*REFLUX, *words],
        cwd=cwd,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_names_every_sub_command_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from reflux.trainer import cli; cli.main(['--help']);"
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml', 'rich') if m in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    took = time.monotonic() - started
    assert done.stdout.splitlines()[-1] == "[]" and took < 5
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout and command.purpose in done.stdout


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n != "bench"])
def test_every_sub_command_says_what_it_takes(name, capsys):
    """Its options are those that the table gives to the completion."""
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith(f"usage: reflux {name} ")
    for option in cli.COMMANDS[name].options:
        assert option in said, option


def test_version_says_what_a_run_would_stand_on(capsys):
    import torch

    assert cli.main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("reflux-llm ") and f"torch {torch.__version__}" in lines
    assert lines[-1].startswith("device ")


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["chek", "x.toml"]) == 2
    assert "did you mean check?" in capsys.readouterr().err


@pytest.fixture
def file(talkers, tmp_path, monkeypatch):
    """The configuration of one step; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "_command", None)
    cfg = config(talkers, tmp_path / "run", "distill", steps=1)
    (tmp_path / "a.toml").write_text(to_toml(cfg))
    return tmp_path / "a.toml"


def test_run_and_report(file, titan_process, capsys):
    os.environ["MASTER_PORT"] = str(free_port())
    assert cli.main(["run", "a.toml", "--set", "seed=3"]) == 0
    run = load_run(file.with_name("run"))
    assert run.summary["step"] == 1 and run.head["config"]["seed"] == 3
    capsys.readouterr()
    assert cli.main(["report", "run"]) == 0
    told = capsys.readouterr().out
    assert "run: distill, step 1 of 1; has ended" in told
    assert f"  loss {run.steps[-1]['loss']:.5g}" in told and told.endswith("see run/report.html\n")
    assert "Distillation: run" in file.with_name("run").joinpath("report.html").read_text()


def test_a_report_has_the_verdicts_and_no_steps_where_there_are_none(tmp_path, capsys):
    estimate = {"eval/sampled": 0.2, "eval/sampled_low": 0.1, "eval/sampled_high": 0.3}
    for phase, name, fields in (
        ("evaluate", "eval", estimate),
        ("evaluate", "accept", {"accept/least": "violated: sampled 0.200"}),
        ("diagnose", "eval", {"diagnose/tail_noise": 0.9}),
    ):
        folder = tmp_path / phase
        folder.mkdir(exist_ok=True)
        if not (folder / "run.jsonl").exists():
            head = {"schema": 1, "config": {"phase": phase, "steps": 100}}
            (folder / "run.jsonl").write_text(json.dumps(head) + "\n")
        with open(folder / "run.jsonl", "a") as log:
            log.write(json.dumps({"event": name, "step": 0, "wall_s": 1.0, **fields}) + "\n")
        (folder / "summary.json").write_text(json.dumps({"step": 0, "wall_s": 1.0}))
    trap = {"trap": "tail noise", "measure": "ratio", "mean": 0.9, "low": 0.8, "high": 1.0}
    verdict = {"verdict": [trap | {"reference": 1, "present": False, "advice": ""}]}
    (tmp_path / "diagnose" / "diagnosis.json").write_text(json.dumps(verdict))
    assert cli.main(["report", str(tmp_path / "evaluate")]) == 0
    told = capsys.readouterr().out
    assert "evaluate; has ended" in told and " step" not in told
    assert "    sampled  0.200 [0.100, 0.300]\nacceptance:\n    least violated" in told
    assert cli.main(["report", str(tmp_path / "diagnose")]) == 0
    told = capsys.readouterr().out
    assert "diagnosis:\n    diagnose/tail_noise  0.9\n" in told
    assert "  tail noise: not detected; ratio: 0.900 [0.800, 1.000]; healthy 1\n" in told


def test_a_mistake_names_the_command_and_the_way_on_is_the_command(file, titan_process, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "a.toml", "--set", "optim.lr=-1"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("reflux run: error: --set optim.lr=-1:")
    (file.with_name("run")).mkdir()
    (file.with_name("run") / "run.jsonl").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["run", "a.toml", "--set", "seed=3"])
    (hint,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("  "))
    assert hint.endswith(" run a.toml --set seed=3 --set on_existing_run=resume")


def test_ranks_are_started_by_the_command_itself(file, tmp_path):
    """With the exit code and the words of one rank that finds a mistake."""
    done = reflux("run", "a.toml", "--ranks", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_run(tmp_path / "run").head["ranks"] == 2
    again = reflux("run", "a.toml", "--ranks", "2", cwd=tmp_path)
    assert again.returncode == 2 and "Traceback" not in again.stderr, again.stderr
    (hint,) = (x for x in again.stderr.splitlines() if x.startswith("  "))
    assert " run a.toml --ranks 2 --set on_existing_run=resume" in hint


def test_several_gpus_are_pointed_out(tmp_path, monkeypatch, capsys):
    for name in ("0", "1", "2"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(subcommands, "GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    subcommands._say_ranks(["a.toml"])
    assert "--ranks 3" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    subcommands._say_ranks(["a.toml"])
    assert capsys.readouterr().err == ""


def test_plan_is_made_for_the_ranks_it_is_asked_for(file, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["plan", "a.toml", "--ranks", "2"]) == 0
    assert "memory of one of 2 ranks" in capsys.readouterr().out
    assert not file.with_name("run").exists()


def test_a_mistake_is_told_by_the_command_that_was_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text('phase = "calibrate"\nfolder = "run"\n')
    for command in ("run", "check", "plan"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "a.toml"])
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert told.startswith(f"reflux {command}: error: a.toml: model.path is missing")


def test_a_table_of_runs_is_known_by_its_cells(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "quickstart", "--set", 'folder="x"']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(
        subcommands.run_table.read_matrix(ROOT / "configs/quickstart.toml", {}).cells
    )
    for words in (["check", "quickstart"], ["run", "quickstart", "--ranks", "2"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2 and "is a table of runs" in capsys.readouterr().err


def test_a_report_begins_with_what_is_trained_for_and_says_what_ended_the_run(tmp_path, capsys):
    head = {"schema": 1, "config": {"phase": "calibrate", "steps": 9}}
    step = {"step": 3, "wall_s": 1.0} | dict.fromkeys("abcdefghijkl", 1.0)
    lines = [head, step | {"reward/cal": -2.0, "loss": 0.5}, {"event": "interrupted", "step": 3}]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "step 3 of 9; interrupted; its last step is saved" in told
    assert told.index("loss 0.5") < told.index("reward/cal -2") < told.index("  a 1")


def test_a_matrix_reports_once_more(tmp_path, monkeypatch, capsys):
    from reflux.trainer import matrix

    (tmp_path / "a").mkdir()
    cells = [{"name": "a@0", "folder": "a", "command": "", "labels": {"mine": "x"}}]
    (tmp_path / "matrix.json").write_text(json.dumps({"cells": cells}))
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert "none of its 1 cells is done" in capsys.readouterr().err
    (tmp_path / "a" / "summary.json").write_text("{}")
    monkeypatch.setitem(matrix.REPORTS, "mine", f"{__name__}:told")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    assert cli.main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out == f"told of {tmp_path.name}\nsee {page}\n"
    assert "a@0" in page.read_text()


def told(folder: Path) -> str:
    return f"told of {folder.name}"


def test_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    assert ended.value.code == 2 and "want the folder of a run" in capsys.readouterr().err


def test_align_two_tokenizers(assets, capsys):
    a, b = str(assets / "qwen3"), str(assets / "gemma3")
    assert cli.main(["align", a, b, "--text", "so 12 remain"]) == 0
    assert "spans" in capsys.readouterr().out


def test_bench_works_in_a_checkout_and_says_so_elsewhere(monkeypatch, tmp_path, capsys):
    started = []
    monkeypatch.setattr(
        subcommands.subprocess,
        "run",
        lambda words, cwd: started.append((words[1:], cwd)) or subprocess.CompletedProcess([], 7),
    )
    assert cli.main(["bench", "linear_kl"]) == 7
    assert started == [(["-m", "bench", "linear_kl"], ROOT)]
    monkeypatch.setattr(subcommands, "ROOT", tmp_path)
    assert cli.main(["bench", "linear_kl"]) == 2
    assert "a checkout only" in capsys.readouterr().err


COMPLETE = """
source <("$0" -m reflux.trainer.cli completion bash)
complete_it() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _reflux
  echo "${COMPREPLY[*]}"
}
complete_it reflux ch
complete_it reflux run debug_cpu_cal
complete_it reflux run x.toml --ra
complete_it reflux completion z
"""


def test_bash_completes_commands_recipes_and_options(tmp_path):
    done = subprocess.run(
        ["bash", "-c", COMPLETE, sys.executable], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["check", "debug_cpu_calibrate", "--ranks", "zsh"], done


@pytest.mark.parametrize("shell, mark", [("zsh", "bashcompinit"), ("fish", "complete -c reflux")])
def test_other_shells_get_every_sub_command(shell, mark, capsys):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert mark in text and all(name in text for name in cli.COMMANDS)
