"""One attempt at grading one text: whatever goes wrong becomes a failed Grade, with the reason."""

import math
import signal
import time
from collections.abc import Callable
from typing import Any

from .graders import Grade
from .prompt import Prompt

GradeText = Callable[[Prompt, str], Grade]


class TimeUp(BaseException):
    """No Exception, so that a grader's own `except Exception` does not swallow it."""


def attempt(function: Callable[..., Grade], *args: Any) -> Grade:
    """The grade, or a failed one. Only KeyboardInterrupt passes."""
    try:
        return function(*args)
    except KeyboardInterrupt:
        raise
    except TimeUp as error:
        return Grade(0.0, False, error=f"timeout: {error}")
    except BaseException as error:  # SystemExit too: a grader may not end the run
        return Grade(0.0, False, error=describe(error))


def describe(error: BaseException) -> str:
    """Its type and message in at most 300 characters."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:  # its own __str__ fails
        return type(error).__name__


class GraderAlarm:
    """`with GraderAlarm(seconds, grader) as limited`: limited(prompt, text) raises TimeUp when
    late. Main thread only.

    SIGALRM interrupts Python code, also under `except Exception`, and C code that checks for
    signals (`re`, big integers, sleeping). It does not interrupt other C code, nor a bare `except:`
    in a loop, and a grader can set its own alarm: a limit that holds is that of a process.
    """

    def __init__(self, seconds: float, grader: GradeText):
        self._seconds, self._grader, self._late_at = seconds, grader, math.inf

    def __enter__(self) -> GradeText:
        self._handler = signal.getsignal(signal.SIGALRM)
        self._timer = signal.setitimer(signal.ITIMER_REAL, 0.0)
        return self._limited

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGALRM, self._handler)
        signal.setitimer(signal.ITIMER_REAL, *self._timer)

    def _limited(self, prompt: Prompt, text: str) -> Grade:
        self._late_at = time.monotonic() + self._seconds
        # for every text: a grader may have set an alarm of its own and left it
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self._seconds, min(self._seconds, 1.0))
        try:
            return self._grader(prompt, text)
        finally:
            self._late_at = math.inf
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _ring(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if now >= self._late_at - 1e-3:
            self._late_at = now + 1.0  # again, should the grader swallow this one
            raise TimeUp(f"no grade within {self._seconds:g} s")
