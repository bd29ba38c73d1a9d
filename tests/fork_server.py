"""Runs of trainer/main.py in a second instead of six: a process that has imported everything forks
one for each run. A run can be told to die by itself: at the n-th change of a file, or a moment
after it. A run may also be several ranks, processes of their own as under torchrun.

`python tests/fork_server.py` is that process: a request a line on stdin, answers on stdout. It
waits for one run at a time; those with a `status` file end in the background.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# audit events of Python by which a file or folder changes; the first argument is a path
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree", "os.utime")


@dataclass(frozen=True)
class Request:
    """One run. `kill_at`: the number of the change, counted from 1, before which it dies, or 0;
    with `delay` > 0 that many seconds after it. `largest_file`: a limit in bytes, or 0. The run has
    an own cache, the folder cache in `directory`, unless `cache` names another.
    """

    arguments: tuple[str, ...]
    directory: str
    output: str  # a file, for stdout and stderr
    kill_at: int = 0
    delay: float = 0.0
    largest_file: int = 0
    changes: str = ""  # a file for the number of changes, written where the run ends by itself
    cache: str = ""
    status: str = ""  # a file for the exit code; then nobody waits, and several may run
    ranks: int = 0  # 0: plain python
    port: int = 0  # where ranks meet


# --- in the process of a run


class _Changes:
    """Counts the changes of files below a folder, and ends the process at one of them."""

    def __init__(self, request: Request):
        self.below = os.path.realpath(request.directory)
        self.kill_at, self.delay, self.count = request.kill_at, request.delay, 0
        self.main = os.getpid()

    def __call__(self, event: str, args: tuple) -> None:
        if not self._is_change(event, args) or os.getpid() != self.main:
            return
        self.count += 1
        if self.count != self.kill_at:
            return
        if not self.delay:
            os.kill(self.main, signal.SIGKILL)
        words = ["/bin/sh", "-c", f"sleep {self.delay:.4f}; kill -9 {self.main}"]
        os.posix_spawn("/bin/sh", words, os.environ)

    def _is_change(self, event: str, args: tuple) -> bool:
        if event == "open":
            path, mode, flags = args
            writes = flags & WRITE_FLAGS if mode is None else set(mode) & set("wax+")
            return bool(writes) and self._is_below(path)
        return event in CHANGES and self._is_below(args[0])

    def _is_below(self, path: object) -> bool:
        if isinstance(path, bytes | str | Path):
            return os.path.abspath(os.fsdecode(path)).startswith(self.below + os.sep)
        return False


def _run(request: Request) -> int:
    os.setsid()
    out = os.open(request.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for file, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(file, number)
    os.chdir(request.directory)
    os.environ["REFLUX_CACHE"] = request.cache or os.path.join(request.directory, "cache")
    sys.path[:] = [p for p in sys.path if p]  # "" is the directory of the server
    sys.argv[:] = ["main.py", *request.arguments]
    if request.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.largest_file,) * 2)
    changes = _Changes(request)
    sys.addaudithook(changes)
    from reflux.trainer import main

    try:
        code = main.main(list(request.arguments))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    if request.changes:
        Path(request.changes).write_text(str(changes.count))
    return code


def _child(request: Request) -> None:
    code = 1
    try:
        code = _run(request)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- between the server and runs that nobody waits for


def _supervise(request: Request) -> list[int]:
    """Starts the run, all ranks of it, below a process that writes down how it ended. Returns the
    process ids of the ranks.
    """
    read, write = os.pipe()
    if not os.fork():
        _end_with_parent()
        pids = [_fork_rank(request, rank) for rank in range(max(request.ranks, 1))]
        os.write(write, json.dumps(pids).encode() + b"\n")
        _write_status(request.status, _wait_for_all(pids))
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        return json.loads(pipe.readline())  # not to its end: the ranks have it open too


def _end_with_parent() -> None:
    """A test that is killed leaves no run behind."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _fork_rank(request: Request, rank: int) -> int:
    pid = os.fork()
    if not pid:
        _end_with_parent()
        if request.ranks:
            world = {"WORLD_SIZE": request.ranks, "LOCAL_WORLD_SIZE": request.ranks}
            world |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": request.port}
            os.environ.update({name: str(value) for name, value in world.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        _child(request)
    return pid


def _wait_for_all(pids: list[int]) -> int:
    """The first exit code that is not 0; the others have a minute then."""
    left, code, end = set(pids), 0, float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            if time.monotonic() > end:
                for other in left:
                    os.kill(other, signal.SIGKILL)
                end = float("inf")
            time.sleep(0.01)
            continue
        left.discard(pid)
        if not code:
            code = os.waitstatus_to_exitcode(status)
            end = time.monotonic() + 60 if code else end
    return code


def _write_status(path: str, code: int) -> None:
    Path(path + ".new").write_text(str(code))
    os.rename(path + ".new", path)


# --- in the server


def _import_everything() -> None:
    import importlib

    from reflux.trainer.config.phases import PHASES

    names = ("loop", "engine.engine", "engine.hf_models", "data.tasks", "rollouts.generate")
    for name in names:
        importlib.import_module(f"reflux.trainer.{name}")
    for spec in PHASES.values():
        spec.load()
    for name in ("qwen3", "gemma3"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_everything()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        table = json.loads(line)
        request = Request(**table | {"arguments": tuple(table["arguments"])})
        if request.status:
            print(json.dumps({"pids": _supervise(request)}), file=answers, flush=True)
            continue
        pid = os.fork()
        if not pid:
            _child(request)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


# --- in the test


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, -9 where it was killed; its output; its duration."""

    code: int
    output: str
    seconds: float


class Background:
    """A run that nobody waits for, all ranks of it. As a subprocess.Popen."""

    def __init__(self, request: Request, pids: list[int]):
        self._request, self.pids, self.pid = request, pids, pids[0]
        self.returncode: int | None = None

    @property
    def output(self) -> str:
        """Of both streams and all ranks."""
        return _read(self._request.output)

    def poll(self) -> int | None:
        if self.returncode is None and os.path.exists(self._request.status):
            self.returncode = int(_read(self._request.status))
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"a run took over {timeout} s: {self.output[-3000:]}")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The client's side; one run at a time, and any number in the background."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._unread = b""
        assert self._answer()["ready"]

    def run(self, request: Request, kill_after: float | None = None, limit: float = 120) -> Ended:
        """Waits for the end of the run, or kills it after `kill_after` seconds. AssertionError for
        one that takes longer than `limit`.
        """
        start = time.monotonic()
        pid = self.start(request)
        wait = limit if kill_after is None else kill_after
        ended = self.poll(wait)
        if ended is None:
            with contextlib.suppress(ProcessLookupError):  # ended just now
                os.kill(pid, signal.SIGKILL)
            ended = self.poll(60)
            assert kill_after is not None, f"a run took over {limit} s: {_read(request.output)}"
        assert ended is not None
        return Ended(ended, _read(request.output), time.monotonic() - start)

    def start(self, request: Request) -> int:
        self._send(request)
        return self._answer()["pid"]

    def start_in_background(self, request: Request) -> Background:
        """A request with a `status` file; nothing else may be running in the foreground."""
        self._send(request)
        return Background(request, self._answer()["pids"])

    def _send(self, request: Request) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        self._process.stdin.flush()

    def poll(self, seconds: float) -> int | None:
        """The exit code, once the run has ended; None where it has not in that time."""
        if (
            b"\n" not in self._unread
            and not select.select([self._process.stdout], [], [], seconds)[0]
        ):
            return None
        return self._answer()["code"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict:
        assert self._process.stdout
        while b"\n" not in self._unread:
            part = os.read(self._process.stdout.fileno(), 4096)
            assert part, f"the fork server ended with {self._process.wait(10)}"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""


if __name__ == "__main__":
    serve()
