"""Every hint is a command that works as printed: each is printed by a run, and run.

Hints stand on lines of their own, indented by two spaces, so that they can be copied.
"""

import ast
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fork_server import Background
from packaging.requirements import Requirement
from runs import MAIN, command, config, environment, run_forked, run_here

from reflux.trainer import main, matrix
from reflux.trainer.config.loader import to_toml
from reflux.trainer.evaluation import harness
from reflux.trainer.runs import lock
from reflux.trainer.runs.logger import load_run
from reflux.trainer.studies import real_pair

RESUME = "on_existing_run=resume"
ROOT = Path(__file__).parents[2]
# what looks like a command, or like a way to get one, inside a longer text
LIKE_A_COMMAND = re.compile(
    r"python -m|python trainer|torchrun [^e]|pip install|--(check|dry-run|set) \w|\bmake [a-z]+ to|"
    r"[Ss]ame command|command again"
)
WRITTEN_OUT = {  # texts that hold a command and do not come from runs/commands.py
    "trainer/config/recipes.py": "what a recipe needs first, as its own first line says it",
    "trainer/main.py": "the name of the program, and its exit codes, in --help",
    "trainer/matrix.py": "the name of the program, in --help",
    "trainer/studies/debug_models.py": "the name of the program, in --help",
    "trainer/studies/first_hour.py": "the name of the program, in --help",
    "trainer/studies/real_pair.py": "the name of the program, in --help",
    "trainer/studies/synthetic_task.py": "the name of the program, in --help",
    "trainer/studies/trap_task.py": "the name of the program, in --help",
    "trainer/studies/doge.py": "the name of the program, in --help",
    "trainer/studies/antidistillation.py": "the name of the program, in --help",
    "trainer/studies/chained_sums.py": "the name of the program, in --help",
    "trainer/studies/past_tense.py": "the name of the program, in --help",
    "trainer/studies/cut_layers.py": "the name of the program, in --help",
    "trainer/studies/word_sentences.py": "the name of the program, in --help",
    "trainer/studies/proxy_gate.py": "the name of the program, in --help",
    "trainer/studies/report_command.py": "the name of the program, in --help",
    "trainer/studies/side_by_side.py": "the name of the program, in --help",
    "trainer/engine/trainer_config.py": "how many processes to start: an option of torchrun",
    "trainer/rollouts/serve.py": "the name of the program, in --help",
    "trainer/rollouts/vllm_engine.py": "names an extra to install",
    "trainer/adapter_folder.py": "merging wants a folder to choose; the debug models",
    "trainer/engine/lora.py": "merging wants a folder that only its reader can choose",
    "trainer/engine/quantized.py": "names the package to install",
    "trainer/merge.py": "the name of the program, in --help",
    "trainer/runs/model_card.py": "names a program for the readers of a card",
    "trainer/runs/watch.py": "the name of the program, in --help",
    "trainer/verify.py": "the name of the program, in --help",
    "trainer/reference.py": "the name of the program, in --help and at the head of its page",
    "trainer/data/prepare.py": "the name of the program, in --help",
    "trainer/runs/torchrun_report.py": "names an option of torchrun",
}


def texts(path: Path) -> list[str]:
    """The string literals of a module, docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_commands_in_messages_come_from_one_module():
    """So that interpreter, launcher, arguments and quoting are right in all of them."""
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for text in texts(path) if name not in WRITTEN_OUT else ():
            is_option = re.fullmatch(r"--[a-z-]+", text)
            assert is_option or not LIKE_A_COMMAND.search(text), f"{name}: {text!r}"


# --- printed by a run of trainer/main.py


@pytest.fixture
def world(talkers, tmp_path, monkeypatch, titan_process):
    """A folder to be in, with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def printed(text: str) -> list[str]:
    return [line[2:] for line in text.splitlines() if line.startswith("  ") and "main.py" in line]


def message(capsys, *words: str) -> str:
    """What trainer/main.py says to a mistake."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err


def run(line: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        line, shell=True, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )


def run_in_words(line: str, cwd: Path) -> Background:
    """The command's words as a shell reads them, by a process that has imported everything."""
    python, script, *arguments = shlex.split(line)
    assert python == sys.executable and Path(cwd, script).samefile(MAIN)
    ended = run_forked(arguments, cwd)
    ended.wait()
    return ended


def write(cfg, path: Path) -> list[str]:
    path.write_text(to_toml(cfg))
    return ["--config", path.name]


def test_a_folder_that_holds_a_run(talkers, world, capsys):
    cfg = config(talkers, world / "run", "distill", steps=1)
    run_here(cfg)
    (line,) = printed(message(capsys, *write(replace(cfg, steps=2), world / "my run.toml")))
    done = run(line, world)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [s["step"] for s in load_run(cfg.folder).steps] == [1, 2]


@pytest.mark.parametrize("remembered", [True, False])
def test_a_file_that_has_changed_since(talkers, world, capsys, remembered):
    """remembered: by the run's folder; else by its checkpoint alone."""
    (world / "own.py").write_text("def grade(prompt, text):\n    return 1.0\n")
    task = {"name": "own:grade"}
    every_step = {"interval": 1}
    cfg = config(talkers, world / "run", "calibrate", steps=1, task=task, checkpoint=every_step)
    words = write(cfg, world / "my run.toml")
    assert run_forked(words, world).wait() == 0
    (world / "own.py").write_text("def grade(prompt, text):\n    return 2.0\n")
    if not remembered:
        (world / "run" / "inputs.json").unlink()
    text = message(capsys, *write(replace(cfg, steps=2), world / "my run.toml"), "--set", RESUME)
    (line,) = printed(text)
    assert "own.py has changed" in text and "as they are" in text
    assert not (world / "run" / "comm_traces").exists()
    done = run(line, world)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [s["step"] for s in load_run(cfg.folder).steps] == [1, 2]


def test_a_folder_owned_on_another_host(talkers, world, capsys):
    cfg = config(talkers, world / "run", "distill", steps=1)
    (world / "run").mkdir()
    owner = replace(
        lock._identity(), token="t", since="2026-01-02", host="gpu-07", boot_id="x", machine_id="y"
    )
    (world / "run" / "lock-t.json").write_text(json.dumps(asdict(owner)))
    (line,) = printed(message(capsys, *write(cfg, world / "x.toml")))
    done = run_in_words(line, world)
    assert done.returncode == 0, done.output[-3000:]
    assert "taken over from process" in done.output and load_run(cfg.folder).summary


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_interrupted_run(talkers, world, ranks):
    """Under torchrun the hint is torchrun's command, options and all."""
    task = "import time\nfrom runs import reward_vowels as fast\ndef grade(prompt, text):\n"
    (world / "slow_task.py").write_text(
        task + "    time.sleep(0.1)\n    return fast(prompt, text)\n"
    )
    cfg = config(talkers, world / "run", "calibrate", steps=4, task={"name": "slow_task:grade"})
    words = command(cfg, world / "my run.toml", ranks)
    with open(world / "err.txt", "w") as error:
        process = subprocess.Popen(
            words, cwd=world, env=environment(), stdout=subprocess.DEVNULL, stderr=error
        )
        log, end = world / "run" / "run.jsonl", time.monotonic() + 120
        while not log.exists() or '"loss"' not in log.read_text():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    text = (world / "err.txt").read_text()
    assert f"To go on, in {world}:\n" in text and "Traceback" not in text
    (line,) = printed(text)
    assert len(load_run(cfg.folder).steps) < 4
    done = run(line, world)
    assert done.returncode == 0, done.stderr[-3000:]
    finished = load_run(cfg.folder)
    assert [s["step"] for s in finished.steps] == [1, 2, 3, 4] and finished.summary
    assert finished.head["ranks"] == max(ranks, 1)


def test_texts_that_the_proxy_cannot_spell(talkers, world, capsys, monkeypatch):
    import reflux.trainer.calibration.likelihood_ratio as room

    def without_spans(*args, real=room.align_texts, **options):
        return [dataclasses.replace(a, spans=None) for a in real(*args, **options)]

    monkeypatch.setattr(room, "align_texts", without_spans)
    cfg = config(
        talkers,
        world / "run",
        "calibrate",
        steps=1,
        calibration={"mode": "distillable", "max_unaligned": 0.0},
    )
    (line,) = printed(message(capsys, *write(cfg, world / "x.toml")))
    assert line.endswith(" --check")
    done = run_in_words(line, world)
    assert "finding" in done.output and "Traceback" not in done.output, done.output[-3000:]


def test_a_check_that_cannot_load_the_models(talkers, world, monkeypatch, capsys):
    import reflux.trainer.preflight.check as check

    def broken(*_):
        raise ValueError("no such memory")

    monkeypatch.setattr(check, "_scratch_engine", broken)
    cfg = config(talkers, world / "run", "calibrate", steps=1)
    assert main.main([*write(cfg, world / "x.toml"), "--check"]) == 1
    dry, with_traceback = printed(capsys.readouterr().out)
    assert "memory" in run_in_words(dry, world).output
    assert with_traceback.startswith("REFLUX_TRACEBACK=1 ") and run(with_traceback, world).stdout


def test_a_distillation_that_has_not_ended(talkers, world, capsys):
    cfg = config(talkers, world / "student", "distill", steps=2)
    run_here(cfg)
    (world / "student" / "summary.json").unlink()
    diagnosis = config(
        talkers,
        world / "diagnosis",
        "diagnose",
        task={"name": "runs:is_even"},
        diagnose={"runs": ["student"]},
    )
    (line,) = printed(message(capsys, *write(diagnosis, world / "x.toml")))
    done = run_in_words(line, world)
    assert done.returncode == 0, done.output[-3000:]
    assert load_run(cfg.folder).summary["step"] == 2


# --- printed by others


def test_the_cells_of_a_matrix(world, capsys):
    (world / "m.toml").write_text(
        'folder = "my runs"\nseeds = [0]\n[[cell]]\nname = "data"\n'
        'module = "reflux.trainer.studies.synthetic_task"\narguments = ["--seed", "{seed}"]\n'
    )
    assert matrix.main(["m.toml", "--dry-run"]) == 0
    done = run(capsys.readouterr().out.strip(), world)
    assert done.returncode == 0, done.stderr
    assert (world / "my runs" / "seed-0" / "data").is_dir()


def test_text_that_two_tokenizers_do_not_share(talkers, world):
    from reflux.trainer.diagnosis.phase import DiagnosePhase

    class Text:
        class rollout:
            text = "-- it's \ufffd"

    phase = DiagnosePhase.__new__(DiagnosePhase)
    phase.cfg = config(talkers, world / "run", "diagnose", task={"name": "runs:is_even"})
    phase.cfg = replace(phase.cfg, teacher=replace(phase.cfg.teacher, path=str(talkers / "proxy")))
    with pytest.raises(ValueError) as error, phase._shows_unaligned([Text()]):
        raise ValueError("none could be aligned")
    (note,) = error.value.__notes__
    done = run(note.splitlines()[1].strip(), world)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    assert done.stdout or done.stderr


def test_packages_to_install(monkeypatch):
    """Nothing is installed here: the words are this pip's, and the packages are the extra's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert harness.REQUIREMENT in extras["optional-dependencies"]["harness"]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(real_pair.importlib.util, "find_spec", lambda name: None)
    hints = []
    for missing in (harness.load_harness, real_pair.require_packages):
        with pytest.raises(ValueError) as error:
            missing()
        hints += [x[2:] for x in str(error.value).splitlines() if x.startswith("  ")]
    assert len(hints) == 3
    for hint in hints:
        words = shlex.split(hint)
        assert words[1:4] == ["-m", "pip", "install"]
        assert [Requirement(w) for w in words[4:] if w != "--no-deps"]
        version = subprocess.run([*words[:3], "--version"], capture_output=True, text=True)
        assert version.returncode == 0 and os.path.dirname(os.path.dirname(sys.executable)) in (
            version.stdout
        )


def test_a_hub_id_that_has_to_be_downloaded():
    from reflux.trainer.adapter_folder import model_folder

    with pytest.raises(ValueError) as error:
        model_folder("someone/some-model", "model.path")
    words = re.search(r"hf download .*", str(error.value))[0].rstrip(".").split()
    assert words == ["hf", "download", "someone/some-model", "--local-dir", "someone/some-model"]
    tool = Path(sys.executable).with_name(words[0])
    usage = subprocess.run([tool, "download", "--help"], capture_output=True, text=True)
    assert "--local-dir" in re.sub(r"\x1b\[[0-9;]*m", "", usage.stdout)
