"""Cells of a matrix: none outlives its runner, no folder has two writers, another start goes on.

The cells are toys: they say when they begin and end, and find out whether they are alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from reflux.trainer import cells
from reflux.trainer.runs import commands, lock

TOY = """
import os, pathlib, signal, time

def main(arguments):
    kind, out = arguments[0], pathlib.Path(arguments[-1])
    def log(word):
        with open(out / "log.txt", "a") as f:
            f.write(f"{word} {os.getpid()}\\n")
    os.close(os.open(out / "inside", os.O_CREAT | os.O_EXCL))  # fails where another one is inside
    if kind == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    log("begin")
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (out.parent.parent / "go").exists():
            time.sleep(0.02)
        if kind == "wrong":
            return 3
        log("done")
    finally:
        if kind == "slow":  # a step that takes its time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(4)
        log("end")
        (out / "inside").unlink()
"""
# a runner that starts fast; the first word is how long it waits for cells
RUNNER = (
    "import sys; from reflux.trainer import cells, matrix; cells.PRELOAD = ['preloaded']; "
    "cells.STOP_S = float(sys.argv.pop(1)); cells.LOOK_S = 0.2; sys.exit(matrix.main())"
)


class World:
    """A matrix of toy cells in a folder, and its runners."""

    def __init__(self, folder: Path, kinds: dict[str, str]):
        self.folder, self.kinds, self._runners = folder, kinds, []
        (folder / "toy.py").write_text(TOY)
        rows = [
            f'[[cell]]\nname = "{n}"\nmodule = "toy"\narguments = ["{k}"]\n'
            for n, k in kinds.items()
        ]
        head = f'folder = "{folder / "out"}"\nseeds = [0]\nparallel = 2\n'
        (folder / "m.toml").write_text(head + "".join(rows))

    def cell(self, name: str) -> Path:
        return self.folder / "out" / "seed-0" / name

    def log(self, name: str) -> list[str]:
        path = self.cell(name) / "log.txt"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def preload(self, seconds: float) -> None:
        """How long the server imports before it forks a cell."""
        (self.folder / "preloaded.py").write_text(
            f"import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep({seconds})\n"
        )

    def start(self, *words: str, wait_s: float = 30.0) -> subprocess.Popen:
        runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(wait_s), "m.toml", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._runners.append(runner)
        return runner

    def go(self) -> None:
        (self.folder / "out" / "go").touch()

    def begun(self, *names: str) -> None:
        wait_until(lambda: all("begin" in self.log(name) for name in names))

    def processes(self, state: str = "") -> list[int]:
        """What runs in the session of any runner, the runners and their helpers included."""
        leaders, out = {r.pid for r in self._runners}, []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) in leaders and fields[0] != "Z":
                    out.append(int(path.parent.name))
        return out

    def nothing_runs(self) -> None:
        for runner in self._runners:
            runner.poll()
        wait_until(lambda: not self.processes())

    def nothing_is_locked(self) -> None:
        assert not list(self.folder.rglob("lock-*"))

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for runner in self._runners:
            runner.wait()
            runner.stdout.close()


def wait_until(is_true, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    world = World(tmp_path, {"a": "good", "b": "good"})
    yield world
    world.kill_all()


STOP = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOP)
def test_every_signal_reaches_the_cells_and_the_printed_command_goes_on(world, number):
    runner = world.start()
    world.begun("a", "b")
    runner.send_signal(number)
    text, _ = runner.communicate(timeout=60)
    assert runner.returncode == 130 and "stopping: the running cells finish" in text
    world.nothing_runs()
    world.nothing_is_locked()
    assert world.log("a") == world.log("b") == ["begin", "end"]
    assert f"To go on, in {world.folder}:\n  {sys.executable} -c " in text
    world.go()
    again = subprocess.run(
        text.rstrip().splitlines()[-1],
        shell=True,
        cwd=world.folder,
        env=os.environ | {"PYTHONPATH": str(world.folder)},
    )
    assert again.returncode == 0 and world.log("a")[2:] == ["begin", "done", "end"]


def test_a_cell_that_does_not_listen_is_killed_after_a_while(tmp_path):
    world = World(tmp_path, {"a": "deaf", "b": "good"})
    try:
        runner = world.start(wait_s=1.0)
        world.begun("a", "b")
        runner.terminate()
        assert runner.wait(30) == 130
        world.nothing_runs()
        assert world.log("a") == ["begin"] and world.log("b") == ["begin", "end"]
    finally:
        world.kill_all()


def test_a_second_signal_does_not_wait(tmp_path):
    world = World(tmp_path, {"a": "deaf"})
    try:
        runner = world.start(wait_s=600.0)
        world.begun("a")
        runner.send_signal(signal.SIGINT)
        time.sleep(2.5)
        assert runner.poll() is None
        runner.send_signal(signal.SIGINT)
        assert runner.wait(30) == 130
        world.nothing_runs()
    finally:
        world.kill_all()


@pytest.mark.parametrize("number", STOP)
@pytest.mark.parametrize("again", [False, True])
def test_a_signal_to_all_while_the_server_still_imports_ends_it(world, number, again):
    world.preload(600)
    runner = world.start()
    wait_until((world.folder / "importing").exists)
    os.killpg(runner.pid, number)
    if again:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, number)
    text, _ = runner.communicate(timeout=60)
    assert "Traceback" not in text and "To go on, in " in text, text
    assert runner.returncode in (130, *[-number] * again)  # the second one while it ends
    world.nothing_runs()
    world.nothing_is_locked()
    assert not world.log("a")


@pytest.mark.parametrize("tenth", range(10))
def test_a_signal_to_all_at_any_moment_of_the_start_gives_the_same_end(world, tenth):
    """Before, while and after the server imports, forks cells and these begin."""
    world.preload(0.3)
    runner = world.start()
    wait_until((world.folder / "out" / "matrix.json").exists)
    time.sleep(tenth / 10)
    os.killpg(runner.pid, STOP[tenth % 3])
    text, _ = runner.communicate(timeout=60)
    assert "Traceback" not in text and "To go on, in " in text, text
    assert runner.returncode == 130
    world.nothing_runs()
    assert world.log("a") in ([], ["begin", "end"])


def test_a_killed_server_fails_the_cell_in_words_or_is_started_anew(world):
    world.preload(600)
    runner = world.start()
    wait_until((world.folder / "importing").exists)
    (world.folder / "importing").unlink()
    os.kill(server_of(world, runner), signal.SIGKILL)
    wait_until((world.folder / "importing").exists)  # the next one, for cell a
    os.kill(server_of(world, runner), signal.SIGKILL)
    world.preload(0)
    world.go()
    text, _ = runner.communicate(timeout=60)
    assert "a@0: not started: the process that forks cells was killed" in text, text
    assert runner.returncode == 1 and "Traceback" not in text


def test_cells_miss_a_runner_that_was_killed(world):
    runner = world.start()
    world.begun("a", "b")
    runner.kill()
    world.nothing_runs()
    world.nothing_is_locked()
    assert world.log("a") == world.log("b") == ["begin", "end"]


def test_after_a_killed_runner_the_same_command_waits_for_its_cells(tmp_path):
    """A cell that finishes a long step is neither doubled nor lost."""
    world = World(tmp_path, {"a": "slow", "b": "slow"})
    try:
        first = world.start()
        world.begun("a", "b")
        first.kill()
        second = world.start()
        lines = [second.stdout.readline() for _ in range(2)]
        assert all("waits: " in line and "is in use by process" in line for line in lines)
        world.go()
        text, _ = second.communicate(timeout=60)
        assert "2 of 2 cells done" in text, text
        for name in ("a", "b"):
            assert world.log(name) == ["begin", "end", "begin", "done", "end"]
        world.nothing_is_locked()
    finally:
        world.kill_all()


def test_two_runners_share_the_cells(tmp_path):
    names = {name: "good" for name in "abcdef"}
    world = World(tmp_path, names)
    try:
        (tmp_path / "out").mkdir()
        world.go()
        runners = [world.start() for _ in range(2)]
        texts = [runner.communicate(timeout=60)[0] for runner in runners]
        assert all("6 of 6 cells done" in text for text in texts), texts
        assert all(world.log(name) == ["begin", "done", "end"] for name in names)
    finally:
        world.kill_all()


def server_of(world: World, runner: subprocess.Popen) -> int:
    """The process that forks the cells."""
    for pid in world.processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"forkserver" in command and int(status(pid, "PPid")) == runner.pid:
                return pid
    raise AssertionError("no server")


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_fork_server_hides_no_cell(world, number):
    """SIGTERM reaches it too when a scheduler signals every process of a job."""
    runner = world.start()
    world.begun("a", "b")
    os.kill(server_of(world, runner), number)
    time.sleep(0.5)
    assert runner.poll() is None and world.log("a") == ["begin"]
    runner.terminate()
    assert runner.wait(60) == 130
    world.nothing_runs()
    assert world.log("a") == ["begin", "end"]


def test_a_runner_that_fails_leaves_no_cell(world):
    """Its own output file is on a full disk, say."""
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, "30", "m.toml"],
        cwd=world.folder,
        env=os.environ | {"PYTHONPATH": str(world.folder)},
        stdout=open("/dev/full", "w"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    world._runners.append(runner)
    runner.stdout = runner.stderr
    world.begun("a", "b")
    (world.cell("a") / "stop").touch()
    os.kill(int((world.cell("a") / "log.txt").read_text().split()[1]), signal.SIGKILL)
    assert runner.wait(60) not in (0, None)
    world.nothing_runs()
    assert world.log("b") == ["begin", "end"]


def test_a_failed_cell_is_reported_and_its_folder_is_free(tmp_path):
    world = World(tmp_path, {"a": "wrong"})
    (tmp_path / "out").mkdir()
    world.go()
    runner = world.start()
    text, _ = runner.communicate(timeout=60)
    assert runner.returncode == 1 and "a@0: failed (exit 3), see " in text
    world.nothing_is_locked()
    world.kill_all()


def test_a_runner_says_what_is_done_and_what_was_begun(tmp_path):
    names = "abcdef"
    out = [cells.Cell(f"{n}@0", tmp_path / n, (), "toy", ()) for n in names]
    assert cells._told_before(out) == ""
    for name in names:
        (tmp_path / name).mkdir()
    for name in names[:5]:
        head = {"schema": 1, "config": {"steps": 9}}
        log = [head, {"step": 3}, {"event": "interrupted", "step": 3}]
        (tmp_path / name / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    begun = "begun before: {}@0 (step 3), {}@0 (step 3), {}@0 (step 3)"
    assert cells._told_before(out) == begun.format(*"abc") + " and 2 more"
    for name in "ab":
        (tmp_path / name / "summary.json").write_text("{}")
    assert cells._told_before(out) == "2 of 6 cells are done; " + begun.format(*"cde")
    for name in "cdef":
        (tmp_path / name / "summary.json").write_text("{}")
    assert cells._told_before(out) == "all 6 cells are done"


def test_what_is_done_is_said_at_the_start(world):
    (world.folder / "out").mkdir()
    world.go()
    assert "cells are done" not in world.start().communicate(timeout=60)[0]
    text, _ = world.start().communicate(timeout=60)
    assert "[2/2] all 2 cells are done" in text, text


def test_a_summary_that_is_not_whole_says_nothing_is_done(world):
    """Its writer was killed between opening and writing; the file was taken for the end."""
    summary = world.cell("a") / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.touch()
    cell = cells.Cell("a@0", summary.parent, (), "toy", ())
    assert not cell.done and cell.exit_code == 0 and cell.stopped is None
    world.go()
    text, _ = world.start().communicate(timeout=60)
    assert world.log("a") == ["begin", "done", "end"] and cell.done
    assert "a/summary.json is not whole" in " ".join(text.split()), text


def elsewhere(folder: Path) -> Path:
    """A lock of a process on another host."""
    folder.mkdir(parents=True)
    owner = replace(
        lock._identity(), token="t", since="2026-01-02", host="gpu-07", boot_id="x", machine_id="y"
    )
    (folder / "lock-t.json").write_text(json.dumps(asdict(owner)))
    return folder / "lock-t.json"


def test_a_folder_owned_on_another_host_is_left_alone_and_taken_over_on_request(world):
    path = elsewhere(world.cell("a"))
    world.go()
    text, _ = world.start().communicate(timeout=60)
    assert "1 of 2 cells done" in text and path.exists() and not world.log("a")
    printed = next(line for line in text.splitlines() if line.endswith("--take-over-lock"))
    again = subprocess.run(
        printed, shell=True, cwd=world.folder, env=os.environ | {"PYTHONPATH": str(world.folder)}
    )
    assert again.returncode == 0 and world.log("a") == ["begin", "done", "end"]


def test_the_command_of_a_cell_runs_the_same_thing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = cells.Cell("x@0", tmp_path, ("--config", "a b.toml"), "", ())
    assert cell.command == commands.script("--config", "a b.toml")
    module = cells.Cell("x@0", tmp_path, ("w",), "reflux.trainer.studies.synthetic_task", ())
    assert module.command.endswith(" -m reflux.trainer.studies.synthetic_task w")
