"""One owner per run folder: a lock file says who writes there.

    with hold(folder) as lock:  # raises InUse where another process holds it
        ...
        lock.check()            # raises LockLost once another process has taken it over

A lock is a file lock-<token>.json with the owner's host, pid, start time of the process, boot id of
the machine and time. Who wants a folder looks for locks, creates its own (O_EXCL), and looks again:
of two that start together at least one sees the other in the second look and steps back, so no two
of them pass it. Tokens are never used twice, so whoever deletes a dead owner's file cannot hit a
living one's. Of a file system this needs only that a file once created is in later listings, which
NFS, Lustre and object stores promise; flock is evidence, where there is some, never the lock.

Whether an owner is alive:

    the same boot, the same pid namespace   the process exists with this start time, or not: exact
    the same boot, another container        by flock on the lock file, if both see one file system
    this machine, before it was restarted   dead
    another host                            unknown: only a person can say (take_over)
"""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

TORN_AFTER_S = 10.0  # a lock without content is of a process that died while it wrote it
TRIES = 20
HASHES = "inputs.json"  # of the files that a run reads (engine/fingerprints.py)

State = Literal["alive", "dead", "unknown"]


class InUse(ValueError):
    """The folder has an owner that is alive, or whose end is not certain."""

    def __init__(self, message: str, state: State):
        super().__init__(message)
        self.state = state


class LockLost(ValueError):
    """This process does not own its folder any more and may not write there."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder."""

    token: str
    host: str
    pid: int
    since: str  # ISO 8601, UTC
    process_start: int | None  # clock ticks after boot; None where there is no /proc
    boot_id: str | None
    machine_id: str | None
    pid_namespace: str | None
    device: int | None = None  # of the file system, as this boot numbers it
    flock: bool = False  # the owner holds a flock on the file while it lives

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """A folder that this process owns."""

    def __init__(self, owner: Owner, path: Path, file: int, taken_from: list[Owner]):
        self.owner, self.path, self.taken_from = owner, path, taken_from
        self._file = file  # open while the lock is held: the flock ends with it

    def check(self) -> None:
        """LockLost where the lock file is gone: the folder was deleted, or taken over by force."""
        try:
            self.path.stat()
        except FileNotFoundError:
            pass
        except OSError:  # a file server that does not answer has given the folder to nobody
            return
        else:
            return
        others = [owner for p in _lock_files(self.path.parent) if (owner := _read(p))]
        reason = f"{others[0].words}, has taken it over" if others else "its lock was deleted"
        raise LockLost(
            f"{self.path.parent}: this run does not own its folder any more: {reason}. It ends "
            "without writing there, so that no two runs mix"
        )

    def release(self) -> None:
        """Never raises: a lock that stays is found dead by the next run."""
        if self.owner.pid != os.getpid():  # a fork of the owner
            return
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.close(self._file)


_HELD: dict[tuple[int, Path], RunLock] = {}  # by (pid, folder): a fork does not own it


@contextlib.contextmanager
def hold(folder: str | Path, *, take_over: bool = False, wait_s: float = 0.0) -> Iterator[RunLock]:
    """Owns the folder inside; a process that owns it already may enter again.

    wait_s: for an owner that may be alive, before InUse is raised. take_over: also from an owner of
    which nobody here can tell whether it is alive; never from one that is. Owners that are
    certainly dead are taken over in any case. Raises InUse, and ValueError for a folder that cannot
    be written to.
    """
    key = (os.getpid(), Path(folder).resolve())
    if key in _HELD:
        yield _HELD[key]
        return
    created = not Path(folder).exists()
    lock = _acquire_within(wait_s, Path(folder), take_over)
    for owner in lock.taken_from:
        log.warning("%s: taken over from %s, which has ended", folder, owner.words)
    _HELD[key] = lock
    try:
        yield lock
    finally:
        del _HELD[key]
        lock.release()
        if created:
            _remove_unused(Path(folder))


def _remove_unused(folder: Path) -> None:
    """Unless a run was here: a start that failed leaves at most the hashes of what it read."""
    with contextlib.suppress(OSError):  # not empty
        if os.listdir(folder) == [HASHES]:
            (folder / HASHES).unlink()
        folder.rmdir()


def refuse_if_held(folder: str | Path, *, take_over: bool = False) -> None:
    """Raises what `hold` would raise now for an owner in the folder. Writes nothing."""
    if (os.getpid(), Path(folder).resolve()) not in _HELD:
        _look(Path(folder), take_over)


def _acquire_within(wait_s: float, folder: Path, take_over: bool) -> RunLock:
    end = time.monotonic() + wait_s
    while True:
        try:
            return _acquire(folder, take_over)
        except InUse:
            if time.monotonic() >= end:
                raise
        time.sleep(0.2)


def _acquire(folder: Path, take_over: bool) -> RunLock:
    error: InUse | None = None
    for _ in range(TRIES):
        _look(folder, take_over)
        lock = _create(folder)
        try:
            dead = _look(folder, take_over, mine=lock.path)
            lock.check()
        except (InUse, LockLost) as caught:  # somebody else came in the same moment
            lock.release()
            error = InUse(str(caught), "alive")
            time.sleep(random.uniform(0.05, 0.5))
            continue
        except BaseException:
            lock.release()
            raise
        for path, owner in dead.items():
            with contextlib.suppress(OSError):  # another user's: it stays and stays dead
                path.unlink(missing_ok=True)
            lock.taken_from.extend([owner] if owner else [])
        return lock
    assert error is not None
    raise error


def _look(folder: Path, take_over: bool, mine: Path | None = None) -> dict[Path, Owner | None]:
    """The locks of dead owners; None for a torn file. Raises InUse for any other but `mine`."""
    dead = {}
    for path in _lock_files(folder):
        if path == mine:
            continue
        owner = _read_patiently(path)
        state = _state(path, owner)
        if state == "alive" or (state == "unknown" and not take_over):
            raise InUse(_in_use(folder, owner, state), state)
        dead[path] = owner
    return dead


def _in_use(folder: Path, owner: Owner | None, state: State) -> str:
    if owner is None:
        return f"{folder}: another process is just taking it; try again in a few seconds"
    if state == "alive":
        return (
            f"{folder} is in use by {owner.words}. Two runs in one folder would mix their logs and "
            "checkpoints: wait for its end, stop it, or use another folder"
        )
    return (
        f"{folder} is locked by {owner.words}. Whether it is alive cannot be told from "
        f"{socket.gethostname()}: two runs in one folder would mix their logs and checkpoints. "
        "Use another folder, or take it over once you know that it has ended"
    )


def _state(path: Path, owner: Owner | None) -> State:
    if owner is None:
        return "dead" if _is_torn(path) else "alive"
    me = _identity()
    if owner.boot_id is None or me.boot_id is None:
        return "unknown"
    if owner.boot_id == me.boot_id:
        state = _state_by_pid(owner) if owner.pid_namespace == me.pid_namespace else "unknown"
        return _state_by_flock(path, owner) if state == "unknown" else state
    restarted = owner.machine_id and (owner.machine_id, owner.host) == (me.machine_id, me.host)
    return "dead" if restarted else "unknown"


def _state_by_pid(owner: Owner) -> State:
    """Unknown where /proc hides the processes of other users (hidepid)."""
    if stat := _stat(owner.pid):
        return "alive" if stat == ("alive", owner.process_start) else "dead"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        pass
    return "unknown"


def _state_by_flock(path: Path, owner: Owner) -> State:
    """The kernel gives up a dead process's flock, in whatever container it ran."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # released since
        return "dead"
    except OSError:
        return "unknown"
    try:
        if not owner.flock or os.fstat(file).st_dev != owner.device:
            return "unknown"
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "dead"
    except BlockingIOError:
        return "alive"
    except OSError:
        return "unknown"
    finally:
        os.close(file)


def _is_torn(path: Path) -> bool:
    """Whether its writer died between creating and writing it. One that was only slow looks again
    after it has written, and steps back.
    """
    try:
        return time.time() - path.stat().st_mtime > TORN_AFTER_S
    except FileNotFoundError:
        return True


# --- the files


def _lock_files(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unusable(folder, error) from None
    return [folder / n for n in names if n.startswith("lock-") and n.endswith(".json")]


def _read(path: Path) -> Owner | None:
    try:
        table = json.loads(path.read_text())
        return Owner(**{f.name: table[f.name] for f in fields(Owner)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _read_patiently(path: Path) -> Owner | None:
    """Waits a moment for the content of a file that has just been created."""
    for _ in range(10):
        owner = _read(path)
        if owner or _is_torn(path):
            return owner
        time.sleep(0.1)
    return None


def _create(folder: Path) -> RunLock:
    token = uuid.uuid4().hex[:16]
    path = folder / f"lock-{token}.json"
    try:
        file = _open_new(path)
    except OSError as error:
        raise _unusable(folder, error) from None
    owner = replace(
        _identity(),
        token=token,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        flock=_take_flock(file),
        device=os.fstat(file).st_dev,
    )
    lock = RunLock(owner, path, file, [])
    try:
        os.write(file, (json.dumps(asdict(lock.owner), indent=1) + "\n").encode())
        os.fsync(file)
        if _read(path) != lock.owner:
            raise OSError(errno.EIO, "what was written there is not what is read back")
    except OSError as error:
        lock.release()
        raise _unusable(folder, error) from None
    return lock


def _open_new(path: Path) -> int:
    for last in (False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:  # another process has just removed the folder it had made
            if last:
                raise
    raise AssertionError


def _take_flock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # this file system has none
        return False
    return True


def _unusable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{folder}: cannot write there: {error.strerror}. The log, the checkpoints and the export "
        "go to this folder; want one that exists or can be made, writable, with free space. Set "
        "folder to another one"
    )


# --- this process and others


@functools.cache
def _identity_of(pid: int) -> Owner:
    return Owner(
        token="",
        host=socket.gethostname(),
        pid=pid,
        since="",
        process_start=process_start(pid),
        boot_id=_text("/proc/sys/kernel/random/boot_id"),
        machine_id=_text("/etc/machine-id"),
        pid_namespace=_link("/proc/self/ns/pid"),
    )


def _identity() -> Owner:
    """This process as an owner, without token and time."""
    return _identity_of(os.getpid())


def process_start(pid: int) -> int | None:
    """When a living process of this pid namespace was started, in clock ticks after boot; None for
    one that does not exist or has ended and only waits for its parent.
    """
    state, start = _stat(pid) or ("ended", None)
    return start if state == "alive" else None


def _stat(pid: int) -> tuple[Literal["alive", "ended"], int] | None:
    """(state, start time) of a process that can be seen."""
    stat = _text(f"/proc/{pid}/stat")
    if stat is None:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "ended" if state in "ZX" else "alive", int(rest[18])


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
