"""Runs of trainer/main.py in a second instead of six: a process that has imported everything forks
one for each run. A run can be told to die by itself: at the n-th change of a file, or a moment
after it.

`python tests/fork_server.py` is that process: a request a line on stdin, answers on stdout.
"""

import contextlib
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

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# audit events of Python by which a file or folder changes; the first argument is a path
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree", "os.utime")


@dataclass(frozen=True)
class Request:
    """One run. `kill_at`: the number of the change, counted from 1, before which it dies, or 0;
    with `delay` > 0 that many seconds after it. `largest_file`: a limit in bytes, or 0. The run has
    an own cache, the folder cache in `directory`.
    """

    arguments: tuple[str, ...]
    directory: str
    output: str  # a file, for stdout and stderr
    kill_at: int = 0
    delay: float = 0.0
    largest_file: int = 0
    changes: str = ""  # a file for the number of changes, written where the run ends by itself


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
    os.environ["REFLUX_CACHE"] = os.path.join(request.directory, "cache")
    sys.path[:] = [p for p in sys.path if p]  # "" is the directory of the server
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


class ForkServer:
    """The client's side; one run at a time."""

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
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()["pid"]

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
