"""A time limit for code that a model folder brings along, such as a chat template."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class TooSlow(Exception):
    """The time is up."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow inside after that time. Interrupts Python code, and C code that looks for
    signals. Without effect outside the main thread, which alone receives signals.

    A timer that was running before goes on afterwards, shorter by the time spent inside.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"no end within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    start, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            spent = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - spent, math.ulp(1.0)), interval)
