"""What the first rank decides for all of them before there is a process group.

The ranks meet in the key-value store that torch.distributed starts from anyway.
"""

import functools
import hashlib
import itertools
import json
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.1
WAIT_S = 0.5
TIMEOUT = timedelta(minutes=5)  # between the starts of two ranks
DECIDED = "reflux/folder"  # and the number of the run in this process
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


_runs, _ports = itertools.count(), itertools.count()


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def decide(folder: str | None) -> None:
    """Called once by the first rank; None: the run is refused, in words that are printed."""
    if _several():
        _store().set(f"{DECIDED}/{next(_runs)}", json.dumps(folder))


def wait_for_decision() -> str | None:
    """What the first rank has decided. ValueError when it ended without a decision."""
    key = f"{DECIDED}/{next(_runs)}"
    try:
        while not _store().check([key]):  # a blocking get would not see Ctrl-C
            time.sleep(POLL_S)
        return json.loads(_store().get(key))
    except RuntimeError as error:
        raise ValueError(f"the first rank has ended before the start ({error})") from None


def agree_on_port() -> int:
    """A free port of the first rank's machine, the same on every rank, for a store of its own."""
    port = str(_free_port()) if is_first() else ""
    if _several():
        key = f"reflux/port/{next(_ports)}"
        if is_first():
            _store().set(key, port)
        port = _store().get(key).decode()
    return int(port)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has said the same: one mistake, one message, the first rank's if it has
    it too. Who is not the first waits a moment: launchers end all ranks when one has ended, and the
    first one has to speak before.
    """
    is_open = _store.cache_info().currsize > 0
    # torchrun's own store is always there; another would end with the first rank
    if not _several() or not (is_open or os.environ.get(AGENT_STORE) == "True"):
        return True
    key = f"reflux/said/{hashlib.sha256(message.encode()).hexdigest()}"
    if not is_first():
        time.sleep(WAIT_S)
    try:
        first = _store().add(key, 1) == 1
    except RuntimeError:  # the rank that had the store has ended
        return True
    if not first:
        time.sleep(WAIT_S)
    return first


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@functools.cache
def _store() -> "Store":
    """Stays open: the process group of the engine uses the same server."""
    from torch.distributed import rendezvous

    return next(rendezvous("env://", timeout=TIMEOUT))[0]
