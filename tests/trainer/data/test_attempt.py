"""Alarms: what they interrupt, and what they leave behind."""

import signal
import time

import pytest

from reflux.trainer.data.attempt import GraderAlarm, TimeUp, attempt, describe
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.prompt import Prompt

PROMPT = Prompt(0, ())


def fine(prompt, text):
    return Grade(1.0, True)


def sleeps(prompt, text):
    try:
        time.sleep(30)
    except Exception:
        pass
    return Grade(1.0, True)


def switches_off(prompt, text):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return Grade(1.0, True)


def graded(grader, text=""):
    return attempt(grader, PROMPT, text)


def test_a_late_grader_is_interrupted_and_the_next_text_is_graded():
    def grader(prompt, text):
        return sleeps(prompt, text) if text == "late" else fine(prompt, text)

    started = time.monotonic()
    with GraderAlarm(0.1, grader) as limited:
        grades = [graded(limited, text) for text in ("", "late", "")]
    assert [g.reward for g in grades] == [1.0, 0.0, 1.0]
    assert grades[1].error == "timeout: no grade within 0.1 s" and time.monotonic() - started < 5


def test_a_grader_that_switches_the_alarm_off_does_so_for_one_text():
    def grader(prompt, text):
        return switches_off(prompt, text) if text == "off" else sleeps(prompt, text)

    with GraderAlarm(0.1, grader) as limited:
        off, late = graded(limited, "off"), graded(limited, "late")
    assert off.reward == 1.0 and late.error.startswith("timeout")


def test_handlers_and_timers_of_others_are_put_back():
    def theirs(*_):
        raise AssertionError("rang")

    before = signal.signal(signal.SIGALRM, theirs)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        with GraderAlarm(0.1, fine) as limited:
            assert graded(limited) == Grade(1.0, True)
        assert signal.getsignal(signal.SIGALRM) is theirs
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_only_ctrl_c_passes():
    def raises(error):
        raise error

    assert attempt(raises, SystemExit(3)).error == "SystemExit: 3"
    assert attempt(raises, TimeUp("late")).error == "timeout: late"
    assert attempt(raises, MemoryError()).failed
    with pytest.raises(KeyboardInterrupt):
        attempt(raises, KeyboardInterrupt())


def test_a_description_is_short_and_never_fails():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert describe(Mute()) == "Mute" and len(describe(ValueError("x" * 999))) == 300
