"""The command line: from any folder, as a script, a module or under torchrun; error messages and
exit codes.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from assets import free_port
from fork_server import Background
from runs import MAIN, command, config, environment, run_forked

from reflux.trainer import main
from reflux.trainer.config import loader as config_file
from reflux.trainer.config.loader import to_toml
from reflux.trainer.diagnosis.phase import DiagnosePhase
from reflux.trainer.runs.logger import load_run

ROOT = Path(__file__).parents[2]


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
    first = done.stdout.splitlines()[0]
    assert first.startswith("calibrate, 1 steps, in ") and ": loads " in first
    assert "step 1/1" in done.stdout and load_run(tmp_path / "run").summary["step"] == 1
    again = start(str(MAIN), "--config", "run.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "phase, words, loaded",
    [
        ("distill", {"distill.more_teachers": ["a", "b"]}, "and a and b"),
        (
            "distill",
            {
                "teacher.source": "server",
                "teacher.servers": ["http://h:1"],
                "distill.tail": "bucket",
                "distill.top_k": 4,
            },
            None,
        ),
        ("calibrate", {"calibration.proxies": ["c"]}, "and c"),
        ("calibrate", {"calibration.mode": "off"}, None),
    ],
)
def test_the_start_names_every_model_that_is_loaded(phase, words, loaded, capsys):
    sets = [f"{name}={config_file.toml_value(value)}" for name, value in words.items()]
    cfg = config_file.load(ROOT / f"configs/debug_cpu_{phase}.toml", tuple(sets))
    main._say_start(replace(cfg, log=replace(cfg.log, quiet=False)))
    said = capsys.readouterr().out
    assert said.startswith(phase) and f"loads {cfg.model.path}" in said
    assert said.endswith(f"{loaded or cfg.model.path}\n")


@pytest.mark.parametrize("every, told", [(0, True), (1, False)])
def test_the_start_tells_of_a_guard_that_cannot_act(every, told, capsys):
    sets = (f"eval.every={every}", "eval.source='x.jsonl'", "guard.utility_drop=0.02")
    cfg = config_file.load(ROOT / "configs/debug_cpu_calibrate.toml", sets)
    main._say_start(replace(cfg, log=replace(cfg.log, quiet=False)))
    said = capsys.readouterr().err
    assert said.startswith("warning: guard.utility_drop = 0.02 cannot end this run") is told
    assert ("Set eval.every = 1, or" in said) is told


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
    given = config_file.load(file, ("optim.lr=0.5",))
    assert replace(printed, titan=given.titan) == given and printed.optim.lr == 0.5
    assert printed.titan["lr_scheduler"]["decay_type"] == "linear", "torchtitan's default too"
    assert printed.titan["training"]["seq_len"] == given.titan["training"]["seq_len"]
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_where_nothing_is_trained_stops_at_once(
    talkers, tmp_path, monkeypatch, capsys, titan_process, number
):
    """There is no step to finish: the first signal counts, and the same command resumes later."""
    over = {
        "task": {"name": "small_tasks:is_even"},
        "data": {"limit": 2},
        "diagnose": {"student_texts": 2, "heatmap_texts": 0},
        "on_existing_run": "resume",
    }
    cfg = config(talkers, tmp_path / "run", "diagnose", **over)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(cfg))
    with monkeypatch.context() as patch:
        patch.setattr(
            DiagnosePhase, "run", lambda self: os.kill(os.getpid(), number) or time.sleep(5)
        )
        assert main.main(["--config", str(file)]) == 130
    assert f"To go on, in {os.getcwd()}:\n  " in capsys.readouterr().err
    assert (
        load_run(tmp_path / "run").summary is None and not (tmp_path / "run" / "report.md").exists()
    )
    os.environ["MASTER_PORT"] = str(free_port())
    assert main.main(["--config", str(file)]) == 0 and (tmp_path / "run" / "report.md").exists()


# --- one owner


SLOW_TASK = "import time\nfrom runs import reward_vowels as fast\n"
SLOW_TASK += "def grade(prompt, text):\n    time.sleep(0.2)\n    return fast(prompt, text)\n"


@pytest.fixture
def slow(talkers, tmp_path):
    """A configuration of a run that takes its time; start it in tmp_path."""
    (tmp_path / "slow_task.py").write_text(SLOW_TASK)
    over = {"steps": 1000, "task": {"name": "slow_task:grade"}, "on_existing_run": "resume"}
    return config(talkers, tmp_path / "run", "calibrate", **over)


def begin(cfg, cwd) -> Background:
    (cwd / "a.toml").write_text(to_toml(cfg))
    return run_forked(["--config", "a.toml"], cwd)


def wait_for_steps(cfg, count: int, process: Background) -> None:
    end, log = time.monotonic() + 120, Path(cfg.folder) / "run.jsonl"
    while not log.exists() or log.read_text().count('"loss"') < count:
        assert process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def wrote(folder) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def turned_away(cfg, cwd, ranks: int) -> tuple[int, str]:
    """Exit code and words of a second start; of ranks under torchrun, whose store they meet in."""
    if not ranks:
        second = run_forked(["--config", "a.toml"], cwd)
        return second.wait(120), second.output
    words = command(cfg, cwd / "b.toml", ranks)
    done = subprocess.run(
        words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_second_writer_is_turned_away_on_every_rank(slow, tmp_path, ranks):
    first = begin(slow, tmp_path)
    try:
        wait_for_steps(slow, 1, first)
        code, said = turned_away(slow, tmp_path, ranks)
        assert code == 2 and "Traceback" not in said, said
        assert said.count(f"run is in use by process {first.pid} on ") == 1
        before = len(load_run(slow.folder).steps)
        wait_for_steps(slow, before + 1, first)
    finally:
        first.kill()
        first.wait()
    steps = [s["step"] for s in load_run(slow.folder).steps]
    assert steps == list(range(1, len(steps) + 1))


def test_two_ranks_take_over_a_dead_owner_and_leave_no_lock(slow, tmp_path):
    """`new` beside it: the ranks go where the first one goes."""
    first = begin(slow, tmp_path)
    wait_for_steps(slow, 1, first)
    first.kill()
    first.wait()
    (left,) = Path(slow.folder).glob("lock-*")
    short = replace(slow, steps=2, task=replace(slow.task))
    done = subprocess.run(
        command(short, tmp_path / "b.toml", ranks=2),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"taken over from process {first.pid} " in done.stderr and not left.exists()
    words = ["--config", "b.toml", "--set", "on_existing_run=new"]
    beside = run_forked(words, tmp_path, ranks=2)
    assert beside.wait() == 0 and len(load_run(tmp_path / "run-2").steps) == 2
    assert not (tmp_path / "run-3").exists() and not list(tmp_path.glob("run*/lock-*"))


def test_whose_folder_is_taken_by_force_ends_without_another_line(slow, tmp_path):
    first = begin(slow, tmp_path)
    wait_for_steps(slow, 1, first)
    (lock,) = Path(slow.folder).glob("lock-*")
    lock.unlink()
    before = wrote(slow.folder)
    assert first.wait(60) == 2
    told = first.output
    assert "does not own its folder any more" in told and "Traceback" not in told
    grown = {p for p, t in wrote(slow.folder).items() if before.get(p) != t}
    assert grown <= {f"{slow.folder}/run.jsonl"}, "the step that was being logged, at most"
    assert load_run(slow.folder).events == []


@pytest.mark.parametrize("phase", ["evaluate", "diagnose"])
def test_phases_without_steps_own_their_folder_too(talkers, tmp_path, monkeypatch, capsys, phase):
    """Asked from inside: the lock is there before the engine is."""
    seen = []

    def look(cfg, lock):
        lock.check()
        seen.append([p.name for p in Path(cfg.folder).iterdir()])
        return 0

    asked = {"eval": {"source": str(talkers / "data.jsonl")}}
    over = {"data": {"limit": 2}} if phase == "diagnose" else asked
    cfg = config(talkers, tmp_path / "run", phase, task={"name": "small_tasks:is_even"}, **over)
    (tmp_path / "run.toml").write_text(to_toml(cfg))
    monkeypatch.setattr("reflux.trainer.loop.train", look)
    assert main.main(["--config", str(tmp_path / "run.toml")]) == 0
    assert len(seen[0]) == 1 and seen[0][0].startswith("lock-")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_or_a_closed_terminal_ends_a_run_with_a_saved_step(slow, tmp_path, number):
    run = begin(slow, tmp_path)
    wait_for_steps(slow, 1, run)
    run.send_signal(number)
    assert run.wait(60) == 130
    told = run.output
    assert "finishing this step" in told and "Traceback" not in told
    log = load_run(slow.folder)
    saved = tmp_path / "run" / "checkpoint" / f"step-{log.steps[-1]['step']}"
    assert saved.exists() and log.events[-1]["event"] == "interrupted"
    assert f"  {log.events[-1]['resume']}\n" in told, "log and console print the same command"
    assert not list(Path(slow.folder).glob("lock-*"))


@pytest.mark.parametrize("words", [[], ["--print-config"], ["--dry-run"]])
def test_head_ends_nothing(talkers, tmp_path, words):
    cfg = config(talkers, tmp_path / "run", "calibrate", steps=3, log={"quiet": False})
    run = subprocess.Popen(
        [*command(cfg, tmp_path / "a.toml"), *words],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait(120) == 0 and "Traceback" not in error and "BrokenPipe" not in error
    if not words:
        assert load_run(cfg.folder).summary["step"] == 3
        assert error.count("nobody reads the standard output any more") == 1
