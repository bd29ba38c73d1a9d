"""When one rank fails, the others wait for it in a collective. Here they hear of it from the store
of the process group, save the last finished step together, and end.

    failed rank                         every other rank
    announce "failed" in the store      a thread sees it within POLL_S
    tell the store what it could save   the same, once its own step has ended
    save, if all ranks tell the same    save, in that thread
    raise the error                     raise at the next collective, or exit after END_S

The save has a process group of its own; the collective in which the main thread waits stays open.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

log = logging.getLogger(__name__)

POLL_S = 1.0
JOIN_S = 30.0  # until every rank has to have told what it could save
SILENT_S = 3.0  # after a lost connection: until the other side has to have announced its error
END_S = 20.0  # until the main thread has to have left its collective
NOTHING = "nothing"


@dataclass(frozen=True)
class Announcement:
    """Which rank failed, and what it says about it."""

    rank: int
    message: str


class Rescue:
    """Of one rank.

    unsaved: the finished step that only memory has, or None; ValueError while a step moves weights.
    save: writes it, collective over the ranks, in whatever thread.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        unsaved: Callable[[], int | None],
        save: Callable[[], None],
    ):
        self._store, self._rank, self._world = store, rank, world
        self._unsaved, self._save = unsaved, save
        self._begun, self._ended, self._closed = (threading.Event() for _ in range(3))
        self._lock = threading.Lock()
        self._saved: int | None = None
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._watch, name="rescue", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> tuple[Announcement | None, int | None, str | None]:
        """Called by the main thread of a rank that ends by `error`. Returns which rank failed
        first, or None if a process ended without a word; the step that was saved, if one was; and
        why one was not, if it could not be.
        """
        if _is_lost_connection(error) and not self._begun.wait(SILENT_S):
            return None, None, None
        if self._take_over():
            self._announce(error)
            self._together()
        self._ended.wait()
        first = Announcement(**json.loads(self._store.get("failed")))
        return first, self._saved, self._problem

    def _announce(self, error: BaseException) -> None:
        mine = json.dumps(asdict(Announcement(self._rank, first_line(error))))
        self._store.compare_set("failed", "", mine)  # the first one counts

    def close(self) -> None:
        """Ends the thread. One that is inside the store while the interpreter ends would abort the
        process: torch takes the lock of Python again where C++ allows no exit of a thread.
        """
        self._closed.set()
        self._thread.join(JOIN_S)

    # --- the thread

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                if self._store.check(["failed"]) and self._take_over():
                    self._together()
                    self._end()
                    return
            except RuntimeError:  # the store is gone, and with it the process that held it
                return

    def _end(self) -> None:
        if not self._closed.wait(END_S):
            log.error("rank %d ends, because %s", self._rank, self._store.get("failed").decode())
            os._exit(1)

    # --- both

    def _take_over(self) -> bool:
        """Whether this thread is the one of its rank that saves."""
        with self._lock:
            mine = not self._begun.is_set()
            self._begun.set()
        return mine

    def _together(self) -> None:
        """Saves if every rank has the same step to save."""
        step = None
        try:
            try:
                step = self._could_save()
            finally:
                self._store.set(f"could-save-{self._rank}", str(step or NOTHING))
            if step is not None:
                if not self._others_agree(str(step)):
                    raise ValueError(f"not every rank could save step {step}")
                self._save()
                self._saved = step
        except Exception as error:
            self._problem = f"the last finished step is not saved: {error}"
        finally:
            self._ended.set()

    def _could_save(self) -> int | None:
        end = time.monotonic() + JOIN_S
        while True:
            try:
                return self._unsaved()
            except ValueError:
                if time.monotonic() > end or threading.current_thread() is not self._thread:
                    raise
            time.sleep(0.05)

    def _others_agree(self, mine: str) -> bool:
        keys = [f"could-save-{rank}" for rank in range(self._world)]
        end = time.monotonic() + JOIN_S
        while not self._store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return all(self._store.get(key).decode() == mine for key in keys)


def first_line(error: BaseException) -> str:
    """Of its message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_lost_connection(error: BaseException) -> bool:
    """Whether the error is only the sign of another rank's end."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
