"""Tasks: graders under limits. A rollout's text -> reward, right or wrong, and what was taken for
the answer.

One bad sample never stops a run: whatever a grader raises, and running out of time, becomes a
failed Grade of that sample with the reason in it. What the time limit guarantees:
  main thread      SIGALRM interrupts Python code, also under `except Exception`, and C code that
                   checks for signals (`re`, big integers, sleeping, waiting). Not interrupted:
                   other C code, and a bare `except:` in a loop.
  other threads,   a worker process grades and is killed when late, whatever it does; it is another
                   process, so the
  isolate = true   grader's globals are its own.
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
from types import NoneType
from typing import Any, get_args, get_type_hints

from .batch import Prompt, Rollout
from .graders import Exact, Function, Grade, Math, MultipleChoice, ReasoningGym, read_grade
from .prompts import load_function, nearest

log = logging.getLogger(__name__)

GRADERS = {
    "exact": Exact,
    "math": Math,
    "multiple_choice": MultipleChoice,
    "reasoning_gym": ReasoningGym,
}
TASKS = (*GRADERS, "reward_model")


@dataclass(frozen=True)
class Limits:
    """Options of every task."""

    timeout_s: float = 10.0  # for one sample
    grade_truncated: bool = False  # False: a text cut at the length limit has reward 0 and is wrong
    isolate: bool = False  # True: always grade in a worker process


class Task:
    """A grader under limits. Made by build_task."""

    def __init__(
        self,
        name: str,
        grader: Callable[[Prompt, str], Grade],
        limits: Limits,
        options: Mapping[str, Any],
    ):
        self.name, self._grader, self._limits = name, grader, limits
        self._worker = _Worker(name, {**options, "isolate": False}, limits.timeout_s)
        self._failures = 0

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One Grade a rollout, in order. Never raises or hangs because of a sample (see the top of
        this file).
        """
        with self._limited() as grader:
            return [
                self._checked(rollout.prompt, self._one(grader, rollout)) for rollout in rollouts
            ]

    def _limited(self) -> AbstractContextManager[Callable[[Prompt, str], Grade]]:
        if getattr(self._grader, "cannot_hang", False) and not self._limits.isolate:
            return nullcontext(self._grader)
        if self._limits.isolate or threading.current_thread() is not threading.main_thread():
            return nullcontext(self._worker.grade)
        return _Alarm(self._limits.timeout_s, self._grader)

    def _one(self, grader: Callable[[Prompt, str], Grade], rollout: Rollout) -> Grade:
        if not rollout.ended and not self._limits.grade_truncated:
            return Grade(0.0, False)
        return _attempt(grader, rollout.prompt, rollout.text)

    def _checked(self, prompt: Prompt, grade: Grade) -> Grade:
        if grade.error is not None:
            self._failures += 1
            # then at 4, 8, 16, ...
            if self._failures <= 3 or self._failures & (self._failures - 1) == 0:
                log.warning(
                    "task %s: grading failed %d times so far, now on prompt %d: %s",
                    self.name,
                    self._failures,
                    prompt.index,
                    grade.error,
                )
        return grade


class RewardModelTask:
    """Grades by a reward model: no time limit, failures as everywhere. A truncated text is scored
    like any other: the reward 0 of a verifier would be above many logits and pay for running on.
    """

    def __init__(self, options: Mapping[str, Any]):
        from .reward_model import RewardModel  # pulls in torch and transformers

        self.name = "reward_model"
        self._model = RewardModel(**_checked_options(self.name, options, RewardModel))

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """One Grade a rollout: the raw logit, `correct` None."""
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


def build_task(name: str, options: Mapping[str, Any]) -> Task | RewardModelTask:
    """name: exact, math, multiple_choice, reasoning_gym, reward_model, or `package.module:function`
    of a user's f(prompt, text) -> bool | float | Grade. Options are the fields of the grader and of
    Limits. ValueError for an unknown name or option, with the nearest one.
    """
    if name == "reward_model":
        return RewardModelTask(options)
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
    grader = kind(function=load_function(name), **own) if kind is Function else kind(**own)
    return Task(name, grader, limits, options)


def _checked_options(task: str, options: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    hints = {
        f.name: get_type_hints(kind)[f.name]
        for kind in kinds
        for f in fields(kind)
        if f.name != "function"
    }
    for key, value in options.items():
        if key not in hints:
            raise ValueError(
                f"task {task}: unknown option {key}{nearest(key, hints)} Known: {', '.join(hints)}"
            )
        wanted = get_args(hints[key]) or (hints[key],)
        if type(value) not in wanted and not (float in wanted and type(value) is int):
            names = " or ".join("none" if t is NoneType else t.__name__ for t in wanted)
            raise ValueError(f"task {task}: {key} = {value!r}; want {names}")
    return dict(options)


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

    One timer ticks all the while and looks at the clock, which spares four system calls a sample.
    """

    def __init__(self, seconds: float, grader: Callable[[Prompt, str], Grade]):
        self._seconds, self._grader, self._late_at = seconds, grader, math.inf

    def __enter__(self) -> Callable[[Prompt, str], Grade]:
        self._handler = signal.signal(signal.SIGALRM, self._ring)
        tick = min(self._seconds / 10, 1.0)
        self._timer = signal.setitimer(signal.ITIMER_REAL, tick, tick)
        return self._limited

    def __exit__(self, *_) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._timer)
        signal.signal(signal.SIGALRM, self._handler)

    def _limited(self, prompt: Prompt, text: str) -> Grade:
        self._late_at = time.monotonic() + self._seconds
        try:
            return self._grader(prompt, text)
        finally:
            self._late_at = math.inf

    def _ring(self, signum, frame) -> None:
        now = time.monotonic()
        if now >= self._late_at:
            self._late_at = now + 1.0  # again, should the grader swallow this one
            raise _TimeUp(f"no grade within {self._seconds:g} s")


class _Worker:
    """One process that builds the same task and grades sample after sample; killed when late,
    started again on need.

    A fresh interpreter, never a fork: the parent has threads, and perhaps a GPU.
    """

    START_S = 120.0  # importing the grader's modules does not count as grading

    def __init__(self, name: str, options: Mapping[str, Any], timeout_s: float):
        self._task, self._timeout_s = (name, dict(options)), timeout_s
        self._process, self._link, self._lock = None, None, threading.Lock()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        with self._lock:
            if self._process is None:
                self._start()
            try:
                self._link.send((prompt, text))
                # its own alarm rings first and spares a restart
                return self._receive(self._timeout_s + 1.0)
            except (EOFError, OSError) as error:
                code = self._stop()
                raise RuntimeError(f"the grader's process ended with code {code}") from error
            except KeyboardInterrupt:
                self._stop()  # its answer must not be taken for the next sample's
                raise

    def _start(self) -> None:
        self._link, theirs = multiprocessing.Pipe()
        command = f"from reflux.trainer.data.tasks import _serve; _serve({theirs.fileno()})"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            self._link.send(self._task)
            self._receive(self.START_S)
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"the grader's process did not start (code {self._stop()}); see its output above"
            ) from error

    def _receive(self, seconds: float) -> Any:
        if not self._link.poll(seconds):
            self._stop()
            raise _TimeUp(f"no grade within {seconds:g} s, its process was killed")
        return self._link.recv()

    def _stop(self) -> int:
        self._link.close()
        try:
            code = self._process.wait(0.2)  # it may have ended by itself; its exit code tells how
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        return code


def _serve(descriptor: int) -> None:
    """The worker's side: a task, then samples, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    link = Connection(descriptor)
    task = build_task(*link.recv())
    link.send("ready")
    with _Alarm(task._limits.timeout_s, task._grader) as limited:
        while True:
            try:
                prompt, text = link.recv()
            except EOFError:
                return
            link.send(_attempt(limited, prompt, text))
