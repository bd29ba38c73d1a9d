"""A limit interrupts what is slow and leaves other timers as they were."""

import signal
import threading
import time

import pytest

from reflux.trainer.data import time_limit as time_limit_module
from reflux.trainer.data.time_limit import TooSlow, time_limit


def test_what_is_slow_is_interrupted_and_what_is_fast_is_not():
    start = time.thread_time()
    with pytest.raises(TooSlow, match="no end within 0.1 s"), time_limit(0.1):
        while True:
            pass
    assert time.thread_time() - start < 2
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_what_gets_no_processor_is_not_slow():
    """On a crowded machine a process may stand for minutes between two lines of Python."""
    start = time.monotonic()
    with time_limit(0.1):
        while time.monotonic() - start < 0.5:
            time.sleep(0.05)  # no CPU time


def test_what_waits_for_ever_is_interrupted(monkeypatch):
    monkeypatch.setattr(time_limit_module, "WAIT", 3)
    start = time.monotonic()
    with pytest.raises(TooSlow), time_limit(0.1):
        time.sleep(20)
    assert 0.3 <= time.monotonic() - start < 10


def test_a_timer_that_was_running_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.3, 0.2)
    try:
        with time_limit(5.0):
            time.sleep(0.1)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 0.2 and interval == pytest.approx(0.2)
        time.sleep(0.3)
        with pytest.raises(TooSlow), time_limit(0.3):  # longer than what is left of the other one
            while True:
                pass
        time.sleep(0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(rung) >= 2 and rung[0] - start == pytest.approx(0.3, abs=0.1)


def test_other_threads_have_no_limit():
    done = []

    def work():
        with time_limit(0.01):
            time.sleep(0.1)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
