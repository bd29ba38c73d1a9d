"""Runs that are killed, starved of disk or damaged, and how many of them a test tries.

`make test` tries a few; FAULTS=long (make test-faults) tries many more.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from assets import free_port
from runs import numbers
from safetensors.torch import load_file

from reflux.trainer.config.loader import to_toml
from reflux.trainer.config.schema import Config
from reflux.trainer.runs.logger import load_run

PRELOADED = [  # imported once, in the server that forks the runs
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers",
    "datasets",
    "reflux.trainer.loop",
    "reflux.trainer.calibration.phase",
    "reflux.trainer.distillation.phase",
    "reflux.trainer.evaluation.phase",
    "reflux.trainer.diagnosis.phase",
]


def is_long() -> bool:
    return os.environ.get("FAULTS") == "long"


def extent(short: int, long: int) -> int:
    """How many faults to try."""
    return long if is_long() else short


class Process:
    """A run in a process of its own: exit code and all that it printed."""

    def __init__(self, cfg: Config, file: Path):
        file.write_text(to_toml(cfg))
        self._output = file.with_suffix(".out")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=_main, args=(str(file), str(self._output)))
        self._process.start()

    def kill_when(
        self, happens: Callable[[], bool], delay_s: float, timeout_s: float = 120
    ) -> bool:
        """SIGKILL that long after it first happens. False if the run has ended before."""
        end = time.monotonic() + timeout_s
        while not happens():
            if not self._process.is_alive():
                return False
            assert time.monotonic() < end, f"nothing happened: {self.printed}"
            time.sleep(0.0005)
        time.sleep(delay_s)
        killed = self._process.is_alive()
        self._process.kill()
        self._process.join()
        return killed

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"it hangs: {self.printed}"
        return self._process.exitcode

    @property
    def printed(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""


def _main(file: str, output: str) -> None:
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ["MASTER_PORT"] = str(free_port())
    from reflux.trainer import main

    raise SystemExit(main.main(["--config", file]))


@contextlib.contextmanager
def fails_with_output(process: Process) -> Iterator[None]:
    """An assertion that fails inside shows what the run printed."""
    try:
        yield
    except AssertionError as error:
        error.add_note(process.printed[-3000:])
        raise


def result(folder: str | Path) -> dict[str, object]:
    """What must be the same however often a run was stopped: every step's numbers, the weights that
    were exported, the predictions.
    """
    folder = Path(folder)
    run = load_run(folder)
    found: dict[str, object] = {"steps": [numbers(step) for step in run.steps]}
    for file in sorted(folder.glob("export/*.safetensors")):
        found |= {f"export/{k}": v.numpy().tobytes() for k, v in load_file(file).items()}
    for file in sorted(folder.glob("predictions/*.jsonl")):
        found[f"predictions/{file.name}"] = file.read_text()
    return found


def differences(a: dict, b: dict) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def moved(cfg: Config, folder: Path) -> Config:
    return replace(cfg, folder=str(folder), on_existing_run="resume")
