"""What runs in the sandbox reaches nothing, with every sandbox that this machine allows."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from sandbox_attacks import GOOD, GRADER, LIES, REACHES, WEARS_DOWN, WRITES

from reflux.trainer.data import sandbox, tasks
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.grader_options import Limits
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.tasks import build_task

KINDS = ("bubblewrap", "unshare", "filter")


def rollout(text, **extra):
    prompt = Prompt(0, ({"role": "user", "content": "?"},), "42", None, extra)
    return Rollout(prompt, (1,), (2, 3), (-0.1, -0.2), 0.0, text, True)


def trial(kind):
    path = os.pathsep.join(sys.path)
    return [*kind.command, *sandbox._python(), str(sandbox.WORKER), "try", kind.scratch, path]


def holds(kind):
    done = subprocess.run(trial(kind), env=sandbox._environment(kind.scratch), capture_output=True)
    return done.returncode == 0


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    found = {s.name: s for s in sandbox._candidates()}
    if request.param not in found or not holds(found[request.param]):
        pytest.skip(f"this machine does not allow {request.param}")
    return found[request.param]


@pytest.fixture(scope="module")
def grader(tmp_path_factory, kind):
    """A grader in that sandbox that runs its texts."""
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "runs_texts.py").write_text(GRADER)
    sys.path.append(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "find_sandbox", lambda: kind)
        task = build_task("runs_texts:grade", {"timeout_s": 2.0, "memory_gib": 1.0})
    yield task
    sys.path.remove(str(folder))
    sys.modules.pop("runs_texts", None)


@pytest.fixture
def attack(grader, tmp_path):
    """attack(text) -> the error of its grade, where neither files nor the next text are hurt."""
    victim, made = tmp_path / "victim", tmp_path / "made"
    victim.write_text("whole")
    os.utime(victim, (10, 10))

    def run(text):
        names = {"victim": victim, "made": made, "pid": os.getpid()}
        for key, value in names.items():
            text = text.replace("{" + key + "}", str(value))
        bad, good = grader.grade([rollout(text), rollout("42")])
        assert good == Grade(1.0, True)
        assert not made.exists() and victim.read_text() == "whole"
        assert victim.stat().st_mtime == 10 and victim.stat().st_mode & 0o777 != 0o777
        return bad.error

    return run


@pytest.mark.parametrize("name", WRITES)
def test_no_file_is_written(attack, name):
    assert re.search("not permitted|not implemented|Read-only|No such file", attack(WRITES[name]))


@pytest.mark.parametrize("name", REACHES)
def test_nothing_outside_is_reached(attack, name):
    assert re.search("not permitted|not implemented|not allowed", attack(REACHES[name]))


@pytest.mark.parametrize("name", WEARS_DOWN)
def test_memory_time_and_threads_have_limits(attack, name):
    started = time.monotonic()
    assert attack(WEARS_DOWN[name]) is not None
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("name", LIES)
def test_the_trainer_takes_only_a_grade_from_the_process(attack, name):
    assert attack(GOOD + LIES[name]) is not None


def test_what_is_held_back_is_said_in_words(attack):
    assert "docs/trust.md" in attack(REACHES["inet"])
    assert "docs/trust.md" in attack(WRITES["open"])


def test_the_environment_is_empty(attack):
    allowed = {*sandbox.KEPT_VARIABLES, *sandbox._environment(""), "LC_CTYPE", "PWD"}
    assert attack(f"raise ValueError(set(os.environ) - {allowed!r})") == "ValueError: set()"


def test_namespaces_hide_other_processes(attack, kind):
    if not kind.command:
        pytest.skip("the filter alone hides none")
    error = attack("raise ValueError([int(p) for p in os.listdir('/proc') if p.isdigit()])")
    assert len(json.loads(error.partition(": ")[2])) <= 3


def test_scratch_is_small_and_in_memory(attack, kind):
    fill = "[open(os.environ['TMPDIR'] + f'/{i}', 'wb').write(bytes(1 << 24)) for i in range(9)]"
    error = attack(fill)
    assert ("No space left" if kind.scratch else "not permitted") in error
    use = "import tempfile; tempfile.TemporaryFile().write(b'x')"
    attack("import shutil; [os.unlink(e.path) for e in os.scandir(os.environ['TMPDIR'])]")
    assert (attack(use) is None) == bool(kind.scratch)


def test_limits_of_the_user_that_are_lower_already_stay(kind):
    """`ulimit -f` before a run: no process may raise it again."""
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 8 && exec "$@"', "sh", *trial(kind)],
        env=sandbox._environment(kind.scratch),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_next_text_finds_a_process_of_its_own_after_a_kill(grader):
    bad, *good = grader.grade([rollout(WEARS_DOWN["deaf"]), *map(rollout, ["42"] * 3)])
    assert "killed" in bad.error and good == [Grade(1.0, True)] * 3


def test_no_process_is_left_behind(tmp_path, kind):
    """Neither by a trainer that ends nor by one that is killed, whatever the grader does."""
    (tmp_path / "runs_texts.py").write_text(GRADER)
    program = f"""
import sys
sys.path.append({str(tmp_path)!r})
from reflux.trainer.data import sandbox, tasks
from reflux.trainer.data.batch import Prompt, Rollout
kind = sandbox.Sandbox(*{(kind.name, kind.command, kind.scratch)!r})
tasks.find_sandbox = lambda: kind
task = tasks.build_task("runs_texts:grade", {{"timeout_s": 60.0}})
def grade(text):
    prompt = Prompt(0, (), "42")
    return task.grade([Rollout(prompt, (1,), (2,), (-0.1,), 0.0, text, True)])
grade("42")
print(task._process._live.process.pid, flush=True)
grade("sum(range(10 ** 13))")
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    group = [pid, *children(pid)]
    time.sleep(0.3)
    trainer.kill()
    trainer.wait()
    late_at = time.monotonic() + 10
    while any(alive(p) for p in group) and time.monotonic() < late_at:
        time.sleep(0.05)
    assert [p for p in group if alive(p)] == []


def children(pid):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(entry), *children(int(entry))]
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- what a user's grader may do


USER = """
from pathlib import Path
import numpy as np
import torch
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import Grade
import neighbour

TABLE = Path(__file__).with_name("table.txt")
TEXT = TABLE.read_text()

def reads(prompt: Prompt):
    return "two" in TEXT and "two" in TABLE.read_text()

def imports_late(prompt):
    import neighbour_of_neighbour
    return neighbour_of_neighbour.value == neighbour.value

def multiplies(prompt):
    a = torch.ones(300, 300) @ torch.ones(300, 300)
    return float(a.mean()) + float(np.linalg.norm(np.eye(400) @ np.eye(400))) * 0

def in_threads(prompt):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(3) as pool:
        return sum(pool.map(float, range(4)))

def sees(prompt):
    return prompt.extra["rows"][0]["x"] == 1 and prompt.messages[0]["content"] == "?"

def numpy_grade(prompt):
    return Grade(np.float32(0.5), np.bool_(True), "x")

def grade(prompt, text):
    return globals()[text](prompt)
"""
REWARDS = {
    "reads": 1.0,
    "imports_late": 1.0,
    "multiplies": 300.0,
    "in_threads": 6.0,
    "sees": 1.0,
    "numpy_grade": 0.5,
}


def test_a_users_grader_imports_reads_and_computes(tmp_path, monkeypatch, kind):
    (tmp_path / "of_user.py").write_text(USER)
    (tmp_path / "table.txt").write_text("one two")
    (tmp_path / "neighbour.py").write_text("value = 3")
    (tmp_path / "neighbour_of_neighbour.py").write_text("value = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tasks, "find_sandbox", lambda: kind)
    task = build_task("of_user:grade", {"timeout_s": 60.0})
    grades = task.grade([rollout(name, rows=[{"x": 1}]) for name in REWARDS])
    sys.modules.pop("of_user")
    assert [g.error for g in grades] == [None] * len(REWARDS)
    assert [g.reward for g in grades] == list(REWARDS.values())


# --- machines without a sandbox


@pytest.fixture
def no_sandbox(monkeypatch):
    monkeypatch.setattr(tasks, "find_sandbox", lambda: "no libseccomp here")


@pytest.mark.parametrize("name", ["math", "reasoning_gym", "json:loads"])
def test_without_a_sandbox_what_may_run_text_is_refused_in_words(no_sandbox, name, caplog):
    with pytest.raises(ValueError, match="no libseccomp here.*trust_model_text = true") as error:
        build_task(name, {})
    assert ("isolate = false" in str(error.value)) == (name == "json:loads")
    build_task(name, {"trust_model_text": True})
    assert "no sandbox (no libseccomp here)" in caplog.text


def test_without_a_sandbox_trusted_text_still_has_limits_of_time_and_memory(
    no_sandbox, tmp_path, monkeypatch
):
    (tmp_path / "trusting.py").write_text(GRADER)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"trust_model_text": True, "timeout_s": 1.0, "memory_gib": 1.0}
    task = build_task("trusting:grade", options)
    texts = (WEARS_DOWN["memory"], WEARS_DOWN["deaf"], "os.environ['HOME2']", "42")
    memory, deaf, environment, good = task.grade([*map(rollout, texts)])
    assert memory.error.startswith("MemoryError") and "killed" in deaf.error
    assert environment.error == "KeyError: 'HOME2'" and good.correct


def test_without_a_sandbox_comparing_texts_needs_none(no_sandbox):
    assert build_task("exact", {}).grade([rollout("42")])[0].correct
    assert build_task("exact", {"pattern": "is (.*)"}).grade([rollout("is 42")])[0].correct
    assert build_task("multiple_choice", {}) is not None


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """worker(source): what find_sandbox says with this program as the worker."""

    def find(source):
        path = tmp_path / "worker.py"
        path.write_text(source)
        monkeypatch.setattr(sandbox, "WORKER", path)
        return sandbox.find_sandbox.__wrapped__()

    return find


def test_a_machine_without_libseccomp_says_so(worker):
    broken = "raise RuntimeError('Unable to find libseccomp')"
    source = sandbox.WORKER.read_text().replace("import pyseccomp as seccomp", broken)
    assert worker(source) == "RuntimeError: Unable to find libseccomp"


@pytest.mark.parametrize(
    "before, after, part",
    [
        ("    rules.load()\n", "", "the sandbox opens a socket"),
        ('"clone", thread)', '"clone")', "the sandbox starts a process"),
        ("load_filter(writes=bool(scratch))", "load_filter(writes=True)", "writes a file"),
    ],
)
def test_a_sandbox_that_lets_something_through_is_none(worker, monkeypatch, before, after, part):
    monkeypatch.setattr(sandbox, "_candidates", lambda: [sandbox.Sandbox("filter", ())])
    monkeypatch.chdir(os.path.dirname(__file__))
    source = sandbox.WORKER.read_text()
    assert before in source and part in worker(source.replace(before, after))


def test_two_threads_share_one_process(grader):
    grades = {}

    def run(k):
        grades[k] = grader.grade([rollout("42")] * 50)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(grades[k] == [Grade(1.0, True)] * 50 for k in range(4))


def test_a_fork_of_the_trainer_starts_a_process_of_its_own(grader):
    assert grader.grade([rollout("42")])[0].correct
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if grader.grade([rollout("42")] * 3) == [Grade(1.0, True)] * 3 else 2
        finally:
            os._exit(code)
    assert grader.grade([rollout("42")] * 50) == [Grade(1.0, True)] * 50
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_that_does_not_get_ready_is_told_once(monkeypatch, tmp_path):
    (tmp_path / "slow_import.py").write_text(
        "import os, time\nif os.environ.get('HERE') != '1':\n    time.sleep(60)\n"
        "def grade(prompt, text):\n    return True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HERE", "1")
    monkeypatch.setattr(sandbox, "START_S", 0.5)
    started = time.monotonic()
    grades = build_task("slow_import:grade", {}).grade([rollout("42")] * 20)
    assert all("it was not ready within 0.5 s" in g.error for g in grades)
    assert time.monotonic() - started < 10


def test_a_process_that_ends_slowly_is_told_by_its_own_code():
    """On a busy machine a second lies between its closed socket and its exit code."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(["sh", "-c", "sleep 0.9; exit 7"], start_new_session=True)
    grader = sandbox.GraderProcess("exact", {}, Limits(), None)
    grader._live = sandbox._Live(process, ours, None)
    threading.Timer(0.2, theirs.close).start()
    with pytest.raises(RuntimeError, match="ended with code 7"):
        grader.grade(rollout("42").prompt, "42")


def test_an_interrupt_while_it_is_waited_for_leaves_no_process():
    ours, _theirs = socket.socketpair()
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    wait = process.wait

    def interrupted(timeout=None):
        process.wait = wait
        raise KeyboardInterrupt

    process.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        sandbox._Live(process, ours, None).stop()
    assert process.poll() == -9


def test_a_trainer_with_many_open_files_grades(grader):
    import gc
    import resource

    gc.collect()  # what comes free later would be a lower number for the socket
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        bad, *good = grader.grade([rollout("os._exit(1)"), *[rollout("42")] * 3])  # a new socket
        assert "code 1" in bad.error and good == [Grade(1.0, True)] * 3
        if grader._process._live.link.fileno() < 1024:
            pytest.skip("a lower file number came free: not what this test is about")
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
