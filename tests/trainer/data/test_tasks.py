"""No response stops a run: raising, hanging, exiting and crashing graders, in every thread."""

import logging
import os
import signal
import sys
import threading
import time

import pytest

from reflux.trainer.config.sections import TaskSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.tasks import build_task, task_grader

USER = """
import os, sys, time

def grade(prompt, text):
    if text == "loop":
        while True:
            pass
    if text == "swallow":
        while True:
            try:
                time.sleep(60)
            except Exception:
                pass
    if text == "deaf":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if text == "raise":
        raise KeyError("no such thing")
    if text == "mute":
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError
        raise Mute
    if text == "recurse":
        return grade(prompt, text)
    if text == "exit":
        sys.exit(3)
    if text == "crash":
        os._exit(7)
    if text == "nan":
        return float("nan")
    return text == prompt.answer
"""


def rollout(text, answer="42", ended=True):
    prompt = Prompt(5, ({"role": "user", "content": "?"},), answer)
    return Rollout(prompt, (1,), (2, 3), (-0.1, -0.2), 0.0, text, ended)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_task.py").write_text(USER)
    sys.path.append(str(folder))
    yield "user_task:grade"
    sys.path.remove(str(folder))


def graded(task, *texts):
    """The grades of bad texts between two good ones, whose grades must not change."""
    started = time.monotonic()
    first, *middle, last = task.grade([rollout(text) for text in ("42", *texts, "42")])
    assert first == last == Grade(1.0, True)
    assert all((g.reward, g.correct, g.extracted) == (0.0, False, None) for g in middle)
    return [g.error for g in middle], time.monotonic() - started


@pytest.mark.parametrize("name", ["exact", "math", "multiple_choice"])
@pytest.mark.parametrize("answer", [None, " "])
def test_a_truncated_text_of_a_row_without_an_answer_is_not_wrong(name, answer):
    cut, known = build_task(name, {}).grade(
        [rollout("so", answer=answer, ended=False), rollout("so", answer="4", ended=False)]
    )
    assert cut.failed and cut.error.startswith("the prompt has no answer") and cut.graded
    assert not known.failed and not known.graded


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    "text, reason",
    [
        ("raise", "KeyError: 'no such thing'"),
        ("mute", "Mute"),
        ("recurse", "RecursionError"),
        ("exit", "SystemExit: 3"),
        ("nan", "ValueError"),
        ("loop", "timeout: no grade within 0.2 s"),
        ("swallow", "timeout"),
    ],
)
def test_a_bad_response_fails_alone(user, text, reason, isolate):
    handler = signal.getsignal(signal.SIGALRM)
    task = build_task(user, {"timeout_s": 0.2, "isolate": isolate})
    graded(task)  # it starts
    (error,), seconds = graded(task, text)
    assert error.startswith(reason) and seconds < 2
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (
        0.0,
        0.0,
    )


@pytest.mark.parametrize("isolate", [True, False])
def test_in_another_thread_a_process_stops_even_what_an_alarm_cannot(user, isolate):
    results = []
    task = build_task(user, {"timeout_s": 0.2, "isolate": isolate})
    thread = threading.Thread(target=lambda: results.append(graded(task, "raise", "loop", "deaf")))
    thread.start()
    thread.join(120)
    (raised, loop, deaf), _ = results[0]
    assert raised.startswith("KeyError") and loop.startswith("timeout") and "killed" in deaf


def test_the_process_outlives_the_thread_that_started_it(user):
    """bubblewrap ends with its parent's thread."""
    task = build_task(user, {})
    pids = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: graded(task, "raise"))
        thread.start()
        thread.join()
        pids.append(task._process._live.process.pid)
    assert len(set(pids)) == 1


def test_a_grader_may_crash(user):
    (error,), _ = graded(build_task(user, {}), "crash")
    assert "ended with code 7" in error


def test_a_process_that_ended_between_two_texts_is_started_again(user):
    task = build_task(user, {})
    graded(task)
    task._process._live.process.kill()
    task._process._live.process.wait()
    graded(task)


def test_a_grader_that_cannot_start_says_why_and_is_not_started_for_every_text(
    user, monkeypatch, tmp_path
):
    (tmp_path / "needs_parent.py").write_text(
        "import os\nif 'SECRET' not in os.environ:\n    raise ImportError('no SECRET here')\n"
        "def grade(prompt, text):\n    return True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SECRET", "1")
    started = time.monotonic()
    grades = build_task("needs_parent:grade", {}).grade([rollout("x")] * 500)
    assert all("did not start" in g.error and "no SECRET here" in g.error for g in grades)
    assert time.monotonic() - started < 10


def test_hostile_mathematics_ends_in_time():
    task = build_task("math", {"timeout_s": 0.5})
    started = time.monotonic()
    grades = task.grade(
        [
            rollout(r"\boxed{9^{9^{9^{9}}}}"),
            rollout(r"$\boxed{(x+1)^{99999} - 10^{10^{10}}}$", "x"),
            rollout(r"\boxed{42}"),
        ]
    )
    assert [g.correct for g in grades] == [False, False, True]
    assert time.monotonic() - started < 10


def test_a_catastrophic_pattern_ends_in_time():
    task = build_task("exact", {"pattern": r"((?:a|a)*)b", "timeout_s": 0.2})
    grades = task.grade([rollout("a" * 60), rollout("aab", answer="aa")])
    assert [g.correct for g in grades] == [False, True] and grades[0].error.startswith("timeout")


def test_ctrl_c_is_not_a_failed_response(user, monkeypatch):
    import user_task

    def interrupted(prompt, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(user_task, "grade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_task(user, {"isolate": False}).grade([rollout("42")])


def test_ctrl_c_ends_the_wait_for_a_process_and_the_process(user):
    task = build_task(user, {"timeout_s": 60})
    graded(task)
    process = task._process._live.process
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        task.grade([rollout("deaf")])
    assert process.poll() is not None
    graded(task)


def test_an_outer_alarm_is_put_back(user):
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        build_task(user, {"isolate": False}).grade([rollout("42")])
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60 and not rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_truncated_texts_are_not_correct_unless_graded():
    truncated = rollout("42", ended=False)
    assert build_task("exact", {}).grade([truncated]) == [Grade(0.0, False, graded=False)]
    assert build_task("exact", {"grade_truncated": True}).grade([truncated]) == [
        Grade(1.0, True, "42")
    ]


def test_warnings_thin_out(user, caplog):
    with caplog.at_level(logging.WARNING):
        build_task(user, {}).grade([rollout("raise")] * 1000)
    assert len(caplog.records) == 3 + 8  # the first three, then 4, 8, ..., 512
    assert "failed 512 times so far, now on prompt 5: KeyError" in caplog.records[-1].getMessage()


def test_two_thousand_short_texts_take_under_50_ms():
    task = build_task("exact", {"marker": "####"})
    rollouts = [rollout(f"{i} + 1 = {i + 1} #### {i + 1}", str(i + 1)) for i in range(2000)]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert all(grade.correct for grade in task.grade(rollouts))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05, f"fastest of 5: {min(seconds) * 1e3:.1f} ms"


@pytest.mark.parametrize(
    "name, options, part",
    [
        ("exat", {}, "unknown task 'exat', did you mean exact?"),
        ("exact", {"makrer": "#"}, "unknown option makrer, did you mean marker?"),
        ("exact", {"marker": 3}, "marker = 3; want str | none (leave it out)"),
        ("exact", {"ignore_case": 1}, "ignore_case = 1; want bool"),
        ("exact", {"timeout_s": 0}, "want more than 0 seconds"),
        ("exact", {"memory_gib": 0}, "want more than 0 GiB"),
        ("math", {"isolate": False}, "isolate = false is for graders of your own"),
        ("reasoning_gym", {"isolate": False}, "trust_model_text = true"),
        ("exact", {"marker": "#", "pattern": "(a)"}, "want a marker, a pattern or neither"),
        ("exact", {"pattern": "a"}, "no group"),
        ("exact", {"pattern": "(a"}, "unterminated"),
        ("multiple_choice", {"answer_is": "number"}, "want letter, index or text"),
        ("user_task:grad", {}, "no function 'grad', did you mean grade?"),
        ("no_such_module:grade", {}, "cannot import no_such_module"),
        ("user_task:grade", {"function": "x"}, "unknown option function"),
    ],
)
def test_a_wrong_name_or_option_is_explained(user, name, options, part):
    with pytest.raises(ValueError) as error:
        build_task(name, options)
    assert part in str(error.value)


@pytest.mark.parametrize(
    "text, correct",
    [
        ("3? No, 5.</think>4", True),
        ("4</think>5", False),
        ("<think>a</think>b</think>\n4", True),
        ("4", True),
        ("</think>", False),
    ],
)
def test_only_the_answer_behind_the_thoughts_is_graded(text, correct):
    task = TaskSection("exact", thinking_end="</think>")
    rollout = Rollout(Prompt(0, (), "4"), (1,), (2,), (0.0,), 0.0, text, True)
    assert task_grader(task).grade([rollout])[0].correct is correct
