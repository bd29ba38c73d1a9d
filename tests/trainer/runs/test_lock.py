"""One owner per folder: who holds it is named, a dead owner is taken over, a living one never."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from reflux.trainer.runs import lock
from reflux.trainer.runs.lock import InUse, LockLost, hold, process_start, refuse_if_held

HOLD = (
    "import sys, time; from reflux.trainer.runs.lock import hold\n"
    "with hold(sys.argv[1]): print('held', flush=True); time.sleep(600)"
)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def take(folder: Path, take_over: bool = False) -> None:
    with hold(folder, take_over=take_over):
        pass


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def write_lock(folder: Path, name: str = "lock-other.json", **changes) -> Path:
    """A lock as another process would have left it; by default of this very process, alive."""
    owner = replace(lock._identity(), **({"token": "t", "since": "2026-01-02T03:04:05"} | changes))
    path = folder / name
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_the_lock_says_who_holds_the_folder_and_is_gone_afterwards(tmp_path):
    folder = tmp_path / "runs" / "a"
    with hold(folder) as held:
        (file,) = folder.iterdir()
        table = json.loads(file.read_text())
        assert table["pid"] == os.getpid() and table["process_start"] == process_start(os.getpid())
        assert table["since"].startswith("20") and table["host"] and table["boot_id"]
        held.check()
    assert not folder.exists(), "a folder in which nothing was written is taken away again"


def test_a_folder_with_files_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "run"):
        (tmp_path / "run" / "run.jsonl").write_text("{}\n")
        raise ZeroDivisionError
    assert files(tmp_path / "run") == ["run.jsonl"]


def test_the_same_process_may_enter_again_and_keeps_the_lock_until_the_outer_end(tmp_path):
    with hold(tmp_path) as outer:
        with hold(tmp_path / ".") as inner:
            assert inner is outer
        outer.check()
        refuse_if_held(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("take_over", [False, True])
def test_a_living_owner_is_named_and_never_taken_over(tmp_path, holder, take_over):
    before = files(tmp_path)
    for attempt in (refuse_if_held, take):
        with pytest.raises(InUse, match=f"in use by process {holder.pid} on .*, since 20") as error:
            attempt(tmp_path, take_over=take_over)
        assert error.value.state == "alive" and files(tmp_path) == before
    assert holder.poll() is None


def test_a_killed_owner_is_reported_and_taken_over(tmp_path, holder, caplog):
    """Also before its parent has waited for it: a zombie writes nothing."""
    holder.kill()
    while process_start(holder.pid) is not None:
        time.sleep(0.01)
    assert len(files(tmp_path)) == 1
    with hold(tmp_path) as held:
        assert [owner.pid for owner in held.taken_from] == [holder.pid] and len(
            files(tmp_path)
        ) == 1
    assert f"taken over from process {holder.pid}" in caplog.text
    assert files(tmp_path) == []


def state(path: Path) -> str:
    return lock._state(path, lock._read(path))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "alive"),
        ({"host": "renamed"}, "alive"),  # the boot id says more than a name
        ({"process_start": 1}, "dead"),  # the process id belongs to another one now
        ({"pid": 2**22 + 1}, "dead"),  # above the largest possible
        ({"boot_id": "before"}, "dead"),  # this machine was started again
        ({"boot_id": "x", "machine_id": "y"}, "unknown"),  # another machine of the same name
        ({"boot_id": "x", "host": "other"}, "unknown"),  # a copy of this machine's disk
        ({"boot_id": "x", "machine_id": None}, "unknown"),
        ({"boot_id": None}, "unknown"),
        ({"pid_namespace": "pid:[1]"}, "unknown"),  # another container, no flock to judge by
    ],
)
def test_what_is_known_of_an_owner(tmp_path, monkeypatch, changes, expected):
    me = replace(lock._identity(), machine_id="m")  # not every machine has one
    monkeypatch.setattr(lock, "_identity", lambda: me)
    path = write_lock(tmp_path, **changes)
    assert state(path) == expected


def test_where_nothing_is_known_of_this_machine_nothing_is_dead(tmp_path, monkeypatch):
    path = write_lock(tmp_path, pid=2**22 + 1)
    me = replace(lock._identity(), boot_id=None, machine_id=None, process_start=None)
    monkeypatch.setattr(lock, "_identity", lambda: me)
    assert state(path) == "unknown"


@pytest.mark.parametrize("holds_flock, expected", [(True, "alive"), (False, "dead")])
def test_an_owner_in_another_container_is_judged_by_its_flock(tmp_path, holds_flock, expected):
    path = write_lock(tmp_path, pid_namespace="pid:[1]", flock=True, device=tmp_path.stat().st_dev)
    hold_flock = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); "
    hold_flock += "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", hold_flock, path], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        if not holds_flock:
            process.kill()
            process.wait()
        assert state(path) == expected
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("changes", [{"flock": False}, {"device": -1}])
def test_a_flock_that_proves_nothing_is_no_evidence(tmp_path, changes):
    over = {"flock": True, "device": tmp_path.stat().st_dev} | changes
    assert state(write_lock(tmp_path, pid_namespace="pid:[1]", **over)) == "unknown"


def test_processes_that_proc_hides_are_not_called_dead(tmp_path, monkeypatch):
    def kill(pid, number):
        raise PermissionError

    path = write_lock(tmp_path)
    monkeypatch.setattr(lock, "_stat", lambda pid: None)
    monkeypatch.setattr(os, "kill", kill)
    assert state(path) == "unknown"


def test_an_owner_on_another_host_is_taken_over_on_request_only(tmp_path):
    path = write_lock(tmp_path, host="gpu-07", boot_id="x", machine_id="y", pid=77)
    named = "locked by process 77 on gpu-07, since 2026-01-02T03:04:05.* cannot be told"
    with pytest.raises(InUse, match=named) as error:
        take(tmp_path)
    assert error.value.state == "unknown" and files(tmp_path) == [path.name]
    with hold(tmp_path, take_over=True) as held:
        assert held.taken_from[0].host == "gpu-07" and not path.exists()


def test_who_was_taken_over_by_force_finds_out(tmp_path):
    with hold(tmp_path) as held:
        held.check()
        held.path.unlink()
        other = write_lock(tmp_path, host="gpu-08", boot_id="x")
        with pytest.raises(LockLost, match=f"process {os.getpid()} on gpu-08.* has taken it over"):
            held.check()
    assert files(tmp_path) == [other.name], "the other one's lock is not ours to release"


def test_a_deleted_folder_is_a_lost_lock(tmp_path):
    with hold(tmp_path / "run") as held:
        held.path.unlink()
        (tmp_path / "run").rmdir()
        with pytest.raises(LockLost, match="its lock was deleted"):
            held.check()


def test_waiting_for_an_owner(tmp_path, holder):
    with pytest.raises(InUse):
        with hold(tmp_path, wait_s=0.3):
            pass
    threading.Timer(0.3, holder.kill).start()
    with hold(tmp_path, wait_s=30.0) as held:
        assert held.taken_from[0].pid == holder.pid


def test_a_lock_that_was_never_written_is_waited_for_then_torn(tmp_path, monkeypatch):
    path = tmp_path / "lock-empty.json"
    path.touch()
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with pytest.raises(InUse, match="another process is just taking it"):
        take(tmp_path)
    os.utime(path, (1, 1))
    with hold(tmp_path) as held:
        assert held.taken_from == [] and not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', "\x00"])
def test_torn_locks_of_every_kind(tmp_path, text):
    path = tmp_path / "lock-torn.json"
    path.write_text(text)
    os.utime(path, (1, 1))
    with hold(tmp_path):
        assert not path.exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"{folder}: cannot write there: .*Set folder"):
            take(folder)


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_full_disk_is_told_and_leaves_no_lock(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(ValueError, match="No space left on device"):
        take(tmp_path)
    assert files(tmp_path) == []


def test_a_fork_neither_owns_nor_releases(tmp_path):
    with hold(tmp_path) as held:
        child = os.fork()
        if child == 0:
            held.release()
            try:
                with hold(tmp_path):
                    os._exit(1)
            except InUse:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        held.check()


def contend(folder: Path, rounds: int, results) -> None:
    """Takes the folder as often as it can; whoever finds another inside with it says so."""
    taken = clashes = 0
    for _ in range(rounds):
        try:
            with hold(folder):
                taken += 1
                try:
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                    time.sleep(0.002)
                    (folder / "inside").unlink()
                except (FileExistsError, FileNotFoundError):
                    clashes += 1
                write_lock(folder, f"lock-dead-{os.getpid()}-{taken}.json", pid=2**22 + 1)
        except InUse:
            time.sleep(0.001)
    results.put((taken, clashes))


def test_of_many_that_want_a_dead_owners_folder_one_at_a_time_gets_it(tmp_path):
    """Every holder leaves a dead lock behind, so that each take is a take-over by several."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    (tmp_path / "keep").touch()
    several = [context.Process(target=contend, args=(tmp_path, 60, results)) for _ in range(6)]
    for process in several:
        process.start()
    counts = [results.get(timeout=120) for _ in several]
    for process in several:
        process.join()
    assert sum(clashes for _, clashes in counts) == 0
    assert sum(taken for taken, _ in counts) > 20, "hardly anybody ever got the folder"


def test_two_that_start_in_the_same_moment_do_not_refuse_each_other(tmp_path, monkeypatch):
    """The other's lock appears between the two looks and is withdrawn: the second try gets it."""
    create, other = lock._create, tmp_path / "lock-other.json"
    monkeypatch.setattr(time, "sleep", lambda s: other.unlink(missing_ok=True))

    def create_beside_another(folder):
        if not other.exists() and not tried:
            tried.append(write_lock(folder))
        return create(folder)

    tried: list[Path] = []
    monkeypatch.setattr(lock, "_create", create_beside_another)
    with hold(tmp_path) as held:
        assert tried and held.taken_from == [] and files(tmp_path) == [held.path.name]


@pytest.mark.parametrize("left", [(), ("inputs.json",), ("inputs.json", "run.jsonl")])
@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_failed_leaves_no_folder_that_it_made(tmp_path, left, there):
    """Hashes of what it read are none of a run."""
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    with pytest.raises(RuntimeError), lock.hold(folder):
        for name in left:
            (folder / name).touch()
        raise RuntimeError
    stays = there or "run.jsonl" in left
    assert folder.exists() == stays and (not stays or len(os.listdir(folder)) == len(left))
