"""trainer/main.py with a fault built in, for processes that tests start:

    FAULT=score:3:1:memory torchrun ... tests/faulty_main.py --config FILE

where:step:rank:kind. where: sample, score, log, close, optimizer, save; rank: a number or `all`;
kind: value, key, memory, interrupt, kill.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from reflux.trainer import main
from reflux.trainer.config.phases import PHASES
from reflux.trainer.engine.engine import Engine
from reflux.trainer.engine.last_step import LastStep
from reflux.trainer.runs.logger import Record


def happen(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {
        "value": ValueError("row 17 has no prompt"),
        "key": KeyError("answer"),
        "memory": torch.OutOfMemoryError("CUDA out of memory"),
        "interrupt": KeyboardInterrupt(),
    }[kind]


def build_in(fault: str) -> None:
    where, step, rank, kind = fault.split(":")
    if rank not in ("all", os.environ.get("RANK", "0")):
        return
    phase = PHASES["distill"].load()
    target, name = {
        "sample": (phase, "sample"),
        "score": (phase, "score"),
        "log": (Record, "__call__"),
        "close": (phase, "close_step"),
        "optimizer": (LastStep, "begins_to_move"),
        "save": (Engine, "_save_if_due"),
    }[where]
    count_calls(target, name, int(step), lambda: happen(kind), after=where == "optimizer")


def count_calls(target: Any, name: str, number: int, act: Callable, *, after: bool) -> None:
    """`act` comes before (or after) the call of this number; close_step has one of step 0 too."""
    real, made = getattr(target, name), [-1 if name == "close_step" else 0]

    def method(self, *args, **kwargs):
        made[0] += 1
        if made[0] == number and not after:
            act()
        result = real(self, *args, **kwargs)
        if made[0] == number and after:
            act()
        return result

    setattr(target, name, method)


if __name__ == "__main__":
    build_in(os.environ["FAULT"])
    sys.exit(main.main())
