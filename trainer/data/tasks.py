"""The task reward: graders under limits, rollouts -> grades.

One bad response never stops a run: an exception, or running out of time, becomes a failed Grade of
that response with the reason in it. What the time limit guarantees:

    main thread      SIGALRM interrupts Python code, also under `except Exception`, and C code that
                     checks for signals (`re`, big integers, sleeping, waiting). It does not
                     interrupt other C code, nor a bare `except:` in a loop.
    other threads,   a worker process grades and is killed when late, whatever it does. The grader's
    isolate = true   globals are those of that process.
"""

import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, get_type_hints

from reflux.trainer.config.fit import fit, nearest

from .batch import Prompt, Rollout
from .graders import Exact, Function, Grade, Math, MultipleChoice, ReasoningGym, read_grade
from .prompts import load_function

if TYPE_CHECKING:  # it imports the engine's modules, which a worker process does without
    from reflux.trainer.phase import Grader

log = logging.getLogger(__name__)

GradeText = Callable[[Prompt, str], Grade]
GRADERS: dict[str, type] = {
    "exact": Exact,
    "math": Math,
    "multiple_choice": MultipleChoice,
    "reasoning_gym": ReasoningGym,
}
TASKS = (*GRADERS, "reward_model")


@dataclass(frozen=True)
class Limits:
    """Options of every task."""

    timeout_s: float = 10.0  # for one response
    grade_truncated: bool = False  # False: a truncated response has reward 0 and is not correct
    isolate: bool = False  # True: always grade in a worker process


class LimitedGrader:
    """One of GRADERS, or a user's function, under limits; made by build_task."""

    def __init__(self, name: str, grader: GradeText, limits: Limits, options: Mapping[str, Any]):
        self.name, self._grader, self._limits = name, grader, limits
        self._worker = _Worker(name, {**options, "isolate": False}, limits.timeout_s)
        self._failures = 0

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout, in order. Never raises or hangs because of one response."""
        with self._limited() as grader:
            return [self._counted(r.prompt, self._one(grader, r)) for r in rollouts]

    def _limited(self) -> AbstractContextManager[GradeText]:
        if getattr(self._grader, "cannot_hang", False) and not self._limits.isolate:
            return nullcontext(self._grader)
        if self._limits.isolate or threading.current_thread() is not threading.main_thread():
            return nullcontext(self._worker.grade)
        return _Alarm(self._limits.timeout_s, self._grader)

    def _one(self, grader: GradeText, rollout: Rollout) -> Grade:
        if not rollout.ended and not self._limits.grade_truncated:
            return Grade(0.0, False, graded=False)
        return _attempt(grader, rollout.prompt, rollout.text)

    def _counted(self, prompt: Prompt, grade: Grade) -> Grade:
        if grade.error is not None:
            self._failures += 1
            if self._failures <= 3 or self._failures.bit_count() == 1:  # then at 4, 8, 16, ...
                log.warning(
                    "task %s: grading failed %d times so far, now on prompt %d: %s",
                    self.name,
                    self._failures,
                    prompt.index,
                    grade.error,
                )
        return grade


class RewardModelGrader:
    """Grades by a reward model, without a time limit. A truncated response is scored like any
    other: a reward of 0 would be above many logits.
    """

    def __init__(self, options: Mapping[str, Any]):
        from .reward_model import RewardModel, RewardModelOptions  # here: imports transformers

        checked = _checked_options("reward_model", options, RewardModelOptions)
        self._model = RewardModel(RewardModelOptions(**checked))

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One grade per rollout: the raw logit as the reward, `correct` None."""
        scores = self._model.score([r.prompt for r in rollouts], [r.text for r in rollouts])
        grades = [_attempt(read_grade, score) for score in scores]
        failed = [grade.error for grade in grades if grade.error is not None]
        if failed:
            log.warning(
                "task reward_model: %d of %d texts were not scored, the first: %s",
                len(failed),
                len(grades),
                failed[0],
            )
        return grades


def build_task(name: str, options: Mapping[str, Any]) -> "Grader":
    """The grader of a task.

    name: exact, math, multiple_choice, reasoning_gym, reward_model, or `package.module:function` of
    a user's f(prompt, text) -> bool | float | Grade. options: fields of the grader and of Limits.
    ValueError for an unknown name or option, with the nearest one.
    """
    if name == "reward_model":
        return RewardModelGrader(options)
    grader, limits = _grader_of(name, options)
    return LimitedGrader(name, grader, limits, options)


def _grader_of(name: str, options: Mapping[str, Any]) -> tuple[GradeText, Limits]:
    kind = Function if ":" in name else GRADERS.get(name)
    if kind is None:
        raise ValueError(
            f"unknown task {name!r}{nearest(name, TASKS)} Known: {', '.join(TASKS)}, "
            "package.module:function"
        )
    checked = _checked_options(name, options, kind, Limits)
    common = {f.name for f in fields(Limits)}
    limits = Limits(**{key: value for key, value in checked.items() if key in common})
    if limits.timeout_s <= 0:
        raise ValueError(f"task {name}: timeout_s = {limits.timeout_s}; want more than 0 seconds")
    own = {key: value for key, value in checked.items() if key not in common}
    if kind is Function:
        own["function"] = load_function(name)
    return kind(**own), limits


def _checked_options(task: str, options: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """Options of these dataclasses, each as its field wants it."""
    hints = {
        f.name: get_type_hints(kind)[f.name]
        for kind in kinds
        for f in fields(kind)
        if f.name != "function"
    }
    for key in options:
        if key not in hints:
            raise ValueError(
                f"task {task}: unknown option {key}{nearest(key, hints)} Known: {', '.join(hints)}"
            )
    return {key: fit(value, hints[key], f"task {task}: {key}") for key, value in options.items()}


# --- time limits


class _TimeUp(BaseException):
    """No Exception, so that a grader's own `except Exception` does not swallow it."""


def _attempt(function: Callable[..., Grade], *args: Any) -> Grade:
    try:
        return function(*args)
    except KeyboardInterrupt:
        raise
    except _TimeUp as error:
        return Grade(0.0, False, error=f"timeout: {error}")
    except BaseException as error:  # SystemExit too: a grader may not end the run
        return Grade(0.0, False, error=_describe(error))


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:  # its own __str__ fails
        return type(error).__name__


class _Alarm:
    """`with _Alarm(seconds, grader) as limited`: limited(prompt, text) raises _TimeUp when late.
    Main thread only.

    One timer ticks all the while and compares the clock; that saves four system calls a response.
    """

    def __init__(self, seconds: float, grader: GradeText):
        self._seconds, self._grader, self._late_at = seconds, grader, math.inf

    def __enter__(self) -> GradeText:
        self._handler = signal.signal(signal.SIGALRM, self._ring)
        tick = min(self._seconds / 10, 1.0)
        self._timer = signal.setitimer(signal.ITIMER_REAL, tick, tick)
        return self._limited

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._timer)
        signal.signal(signal.SIGALRM, self._handler)

    def _limited(self, prompt: Prompt, text: str) -> Grade:
        self._late_at = time.monotonic() + self._seconds
        try:
            return self._grader(prompt, text)
        finally:
            self._late_at = math.inf

    def _ring(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if now >= self._late_at:
            self._late_at = now + 1.0  # again, should the grader swallow this one
            raise _TimeUp(f"no grade within {self._seconds:g} s")


@dataclass(frozen=True)
class _Live:
    """A worker process and the pipe to it."""

    process: subprocess.Popen
    link: Connection

    def receive(self, seconds: float) -> Any:
        """_TimeUp if nothing came; the process is to be stopped then."""
        if not self.link.poll(seconds):
            raise _TimeUp(f"no grade within {seconds:g} s, its process was killed")
        return self.link.recv()

    def stop(self) -> int:
        """The exit code."""
        self.link.close()
        try:
            return self.process.wait(0.2)  # where it ended by itself, its code says how
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class _Worker:
    """One process that builds the same task and grades one response after the other. It is killed
    when late, and started again on need.

    A new interpreter, never a fork: the parent has threads, and perhaps a GPU.
    """

    START_S = 120.0  # importing the grader's modules does not count as grading

    def __init__(self, name: str, options: Mapping[str, Any], timeout_s: float):
        self._task, self._timeout_s = (name, dict(options)), timeout_s
        self._live: _Live | None = None
        self._lock = threading.Lock()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        with self._lock:
            live = self._live = self._live or self._started()
            try:
                live.link.send((prompt, text))
                # its own alarm rings first and saves a restart
                return live.receive(self._timeout_s + 1.0)
            except (EOFError, OSError) as error:
                code = self._stop(live)
                raise RuntimeError(f"the grader's process ended with code {code}") from error
            except (_TimeUp, KeyboardInterrupt):
                self._stop(live)  # its answer must not be taken for that of the next response
                raise

    def _started(self) -> _Live:
        link, theirs = multiprocessing.Pipe()
        command = f"from reflux.trainer.data.tasks import _serve; _serve({theirs.fileno()})"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        live = _Live(process, link)
        try:
            link.send(self._task)
            live.receive(self.START_S)
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"the grader's process did not start (code {live.stop()}); see its output above"
            ) from error
        except (_TimeUp, KeyboardInterrupt):
            live.stop()
            raise
        return live

    def _stop(self, live: _Live) -> int:
        self._live = None
        return live.stop()


def _serve(descriptor: int) -> None:
    """The worker's side: a task, then responses, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    link: Connection = Connection(descriptor)
    grader, limits = _grader_of(*link.recv())
    link.send("ready")
    with _Alarm(limits.timeout_s, grader) as limited:
        while True:
            try:
                prompt, text = link.recv()
            except EOFError:
                return
            link.send(_attempt(limited, prompt, text))
