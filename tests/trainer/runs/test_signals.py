"""Stop signals: handled inside, as before afterwards, and ignored where they were ignored."""

import os
import signal
import threading

import pytest

from reflux.trainer.runs.signals import STOP_SIGNALS, handled_by, raise_interrupt


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_handled_inside_only(number):
    before, caught = [signal.getsignal(n) for n in STOP_SIGNALS], []
    with handled_by(lambda n, frame: caught.append(n)):
        os.kill(os.getpid(), number)
    assert caught == [number] and [signal.getsignal(n) for n in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_of_them_can_end_a_run_like_ctrl_c(number):
    with pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name):
        with handled_by(raise_interrupt):
            os.kill(os.getpid(), number)
            signal.pause()


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled_by(raise_interrupt):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is raise_interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_that_are_nested_come_back_in_order():
    with handled_by(raise_interrupt):
        with handled_by(lambda n, frame: None):
            pass
        assert all(signal.getsignal(n) is raise_interrupt for n in STOP_SIGNALS)


def test_outside_the_main_thread_nothing_changes():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside():
        with handled_by(raise_interrupt):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
