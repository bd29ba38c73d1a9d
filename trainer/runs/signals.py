"""The signals that ask a process to end: Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP.

One that the process was told to ignore (SIGHUP under nohup) stays ignored.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# a terminal signals every process of a job, and launchers pass the same signal on
SAME_SIGNAL_S = 2.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside, the stop signals call `handler(signal number, frame)`; afterwards, what they called
    before. Outside the main thread nothing changes: whoever embeds the code keeps its handlers.
    """
    before = {}
    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, this thread gets no stop signal, and neither does a process that it starts, for as
    long as that one lives (`let_through`). What comes meanwhile comes afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """In a process that was started with signals held back: the end of that."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_launcher() -> None:
    """A worker of torchrun gets SIGTERM when torchrun ends without a word. Linux only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that treats every stop signal as Ctrl-C: what is open is closed, then the end."""
    raise KeyboardInterrupt(signal.Signals(number).name)
