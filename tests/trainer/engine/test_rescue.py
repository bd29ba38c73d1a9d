"""Ranks as threads around one store: one fails, all save the same step and end."""

import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from reflux.trainer.engine import rescue as module
from reflux.trainer.engine.rescue import Announcement, Rescue


class Rank:
    """A rank whose last finished step is `step`; None: moving its weights for ever."""

    def __init__(self, store, rank: int, world: int, step: int | None):
        self.step, self.saves = step, []
        self.rescue = Rescue(store, rank, world, self.unsaved, self.save)

    def unsaved(self) -> int | None:
        if self.step is None:
            raise ValueError("moving")
        return self.step or None

    def save(self) -> None:
        self.saves.append((self.step, threading.current_thread().name))


@pytest.fixture
def ranks(monkeypatch):
    """Makes ranks; afterwards no thread of theirs is left that could end the process."""
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(module, "JOIN_S", 1.0)
    monkeypatch.setattr(module, "SILENT_S", 0.3)
    made: list[Rank] = []

    def make(*steps: int | None) -> list[Rank]:
        store = dist.HashStore()
        made.extend(Rank(store, i, len(steps), step) for i, step in enumerate(steps))
        return made

    yield make
    for rank in made:
        rank.rescue.close()


def test_the_others_save_in_their_thread_the_failed_rank_in_its_own(ranks):
    one, two, three = ranks(7, 7, 7)
    failed, saved, problem = two.rescue.fail(KeyError("row 5"))
    assert (failed, saved, problem) == (Announcement(1, "'row 5'"), 7, None)
    assert two.saves == [(7, "MainThread")]
    for other in (one, three):
        # what the main thread of a waiting rank meets later: the connection to the failed one
        heard, step, _ = other.rescue.fail(RuntimeError("gloo: Connection closed by peer"))
        assert (heard, step) == (failed, 7) and other.saves == [(7, "rescue")]


def test_ranks_that_all_fail_save_once_each(ranks):
    made, results = ranks(3, 3), []
    threads = [
        threading.Thread(target=lambda r=r: results.append(r.rescue.fail(ValueError("bad row"))))
        for r in made
    ]
    [t.start() for t in threads]
    [t.join(10) for t in threads]
    assert [len(r.saves) for r in made] == [1, 1] and {r[1] for r in results} == {3}
    assert len({r[0] for r in results}) == 1, "all name the same rank"


@pytest.mark.parametrize("steps", [(7, 6), (7, None), (None, 7), (0, 0), (7, 0)])
def test_nothing_is_saved_where_the_ranks_differ_or_have_nothing(ranks, steps):
    one, two = ranks(*steps)
    _, saved, problem = two.rescue.fail(ValueError("bad row"))
    assert saved is None and (problem is None or "not saved" in problem)
    one.rescue._ended.wait(5)
    assert one.saves == two.saves == []


def test_a_rank_whose_step_is_just_ending_is_waited_for(ranks):
    one, two = ranks(None, 7)
    threading.Timer(0.3, setattr, (one, "step", 7)).start()
    assert two.rescue.fail(ValueError("bad row"))[1] == 7
    one.rescue._ended.wait(5)
    assert one.saves == [(7, "rescue")]


def test_a_process_that_died_without_a_word_is_not_waited_for(ranks):
    one, _ = ranks(7, 7)
    assert one.rescue.fail(RuntimeError("[gloo] Connection reset by peer")) == (None, None, None)
    assert one.saves == []


def test_a_save_that_fails_is_not_called_saved(ranks):
    one, two = ranks(7, 7)

    def fails():
        raise OSError(28, "No space left on device")

    two.rescue._save = fails
    failed, saved, problem = two.rescue.fail(ValueError("bad row"))
    assert saved is None and problem.endswith("No space left on device")


def test_a_main_thread_that_stays_in_its_collective_is_ended(ranks, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(module, "END_S", 0.05)
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set() if code == 1 else None)
    _, two = ranks(7, 7)
    two.rescue.fail(ValueError("bad row"))
    assert ended.wait(5)


AT_EXIT = """
import threading, time
from datetime import timedelta
import torch.distributed as dist
from reflux.trainer.engine import rescue

class SlowStore:  # answers after a second, in which it gives the lock of Python away and takes it
    def __init__(self):
        self.store = dist.HashStore()
    def check(self, keys):
        asked.set()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            try:
                self.store.wait(keys, timedelta(milliseconds=1))
            except dist.DistStoreError:
                pass
        return False

asked, rescue.POLL_S = threading.Event(), 0.01
rank = rescue.Rescue(SlowStore(), 0, 2, lambda: None, lambda: None)
asked.wait()
rank.close()
"""


def test_a_process_ends_well_while_its_thread_asks_the_store():
    """Seen as exit code 134 of a run that had done all its work."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
