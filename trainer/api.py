"""Runs from Python: `reflux.run`, in a plain process, in a notebook, or under torchrun.

    teacher = reflux.run("miniature/calibrate", overrides={"model.path": "m", ...})
    student = reflux.run("student.toml", overrides={"teacher.path": teacher.export_folder})

No environment variable has to be set: a process that torchrun did not start becomes the only rank
of a run, and is afterwards what it was before (environment, signal handlers, logging, random
states, garbage collection). Errors are ValueError in the words of the command line.
"""

import contextlib
import gc
import logging
import os
import random
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .callbacks import Callback, check_callbacks
from .config.loader import lay_over, layers_of, load_over
from .config.origins import with_origins
from .config.schema import Config
from .runs import commands, first_rank, hub, limits, run_folder, signals
from .runs.logger import RESERVED, load_run

if TYPE_CHECKING:
    from .preflight.report import PreflightReport

INTERRUPTED = 130
_INSIDE = threading.Lock()
SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class Run:
    """A run that has ended, read from its folder.

    metrics: of the last step and the last evaluation, by their names in run.jsonl. steps: one
    mapping a step; evaluations: one an evaluation. exit_code: as of the command line (0, 3: an
    [accept] rule does not hold, 4: a guard, 130: a signal); reason: why it ended early, or None.
    """

    folder: Path
    export_folder: Path | None
    metrics: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    exit_code: int
    reason: str | None


def load_config(config: str | Path | Config, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a file, a recipe's name or a Config, with overrides laid on top:
    {"optim.lr": 1e-5} or {"optim": {"lr": 1e-5}}. ValueError with the key that is wrong.
    """
    if isinstance(config, Config):
        return lay_over(config, layers_of(overrides or {}))
    return load_over(config, overrides or {})


def run(
    config: str | Path | Config,
    overrides: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Runs a configuration and returns what came of it. Under torchrun, on every rank of it.

    ValueError for a mistake in the configuration, the data or a callback, after the last finished
    step is saved; a guard or a signal is no error (Run.exit_code, Run.reason).
    """
    check_callbacks(callbacks)
    cfg = load_config(config, overrides)
    with _own_process(), with_origins(cfg):
        cfg = hub.with_local_models(cfg)
        _remember(cfg.folder)
        with run_folder.claimed(cfg) as (settled, lock):
            _remember(settled.folder)
            from .loop import train

            code = train(settled, lock, callbacks)
            if code != INTERRUPTED:
                hub.push_export(settled)
    return _ended(Path(settled.folder), code)


def check(
    config: str | Path | Config, overrides: Mapping[str, Any] | None = None
) -> "PreflightReport":
    """Tries models, tokenizers, data and grader of a configuration; writes nothing to its folder.
    The findings are in `.findings`, those with level "error" stop a run.
    """
    cfg = load_config(config, overrides)
    with _own_process(), with_origins(cfg):
        from .preflight.check import examine

        return examine(hub.with_local_models(cfg))


def _remember(folder: str) -> None:
    """For messages: the command that goes on with this run."""
    commands.remember_run(folder, int(os.environ["WORLD_SIZE"]))


def _ended(folder: Path, code: int) -> Run:
    loaded = load_run(folder)
    evaluations = [e for e in loaded.events if e["event"] == "eval"]
    last = [*loaded.steps[-1:], *evaluations[-1:]]
    exports = [Path(e["folder"]) for e in loaded.events if e["event"] == "export"]
    stopped = (loaded.summary or {}).get("stopped")
    reason = "stopped by a signal" if code == INTERRUPTED else stopped
    return Run(
        folder=folder,
        export_folder=exports[-1] if exports else None,
        metrics={k: v for line in last for k, v in line.items() if k not in RESERVED},
        steps=tuple(loaded.steps),
        evaluations=tuple(evaluations),
        exit_code=code,
        reason=reason,
    )


@contextlib.contextmanager
def _own_process() -> Iterator[None]:
    """What a run changes in its process, put back afterwards. ValueError while another one is
    inside: two would share process group, environment and random states.
    """
    if not _INSIDE.acquire(blocking=False):
        raise ValueError(
            "reflux: another run or check goes on in this process; want one at a time. Wait for "
            "it, or start this one in a process of its own"
        )
    try:
        with _changed_process():
            yield
    finally:
        _INSIDE.release()


@contextlib.contextmanager
def _changed_process() -> Iterator[None]:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        raise ValueError(
            "reflux: this process has a process group already; a run makes its own. Close it with "
            "torch.distributed.destroy_process_group() first"
        )
    limits.raise_descriptor_limit()
    signals.end_with_launcher()
    collects, threads = gc.isenabled(), torch._C._is_multithreading_enabled()
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, sys.excepthook
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment())
        stack.enter_context(_random_states())
        try:
            yield
        finally:
            if dist.is_initialized():  # an engine that could not be built to its end
                dist.destroy_process_group()
            commands.forget()
            sys.excepthook = hook  # torch.distributed wraps it, once a process group
            gc.enable() if collects else gc.disable()
            torch.autograd.set_multithreading_enabled(threads)
            root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """RANK and the like of a single rank where there are none, and a store of this run's own: in
    torchrun's, the keys of an earlier process group would be taken for those of the next.
    """
    ranks = {} if "RANK" in os.environ else SINGLE_RANK
    ours = ranks | {"MASTER_PORT": str(first_rank.agree_on_port()), first_rank.AGENT_STORE: "False"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Python's, numpy's and torch's generators go on afterwards where they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
