"""A time limit for code that a model folder brings along, such as a chat template."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

WAIT = 30  # times the limit, in seconds of the clock: ends code that waits instead of computing
LEAST_S = 0.01  # between two looks at the clock


class TooSlow(Exception):
    """The time is up."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow inside after that many CPU seconds of this thread, or WAIT times as many of
    the clock. On a machine with much else to do, seconds of the clock say nothing about the code.
    Interrupts Python code, and C code that looks for signals. Without effect outside the main
    thread, which alone receives signals.

    A timer that was running before goes on afterwards, shorter by the time spent inside.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    cpu_start, start = time.thread_time(), time.monotonic()

    def ring(number: int, frame: FrameType | None) -> None:
        unused = seconds - (time.thread_time() - cpu_start)
        if unused > 0 and time.monotonic() - start < WAIT * seconds:
            signal.setitimer(signal.ITIMER_REAL, max(unused, LEAST_S))
            return
        raise TooSlow(f"no end within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            spent = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - spent, math.ulp(1.0)), interval)
