"""Runs of the engine for tests of checkpoints: steps, a restart, what is in memory, damage."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from assets import free_port
from engine_cases import likelihood_loss, samples, whole_weights
from runs import config
from torch.distributed.tensor import DTensor

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import pack
from reflux.trainer.engine.engine import Engine


def make_config(talkers: Path, folder: Path, steps: int = 3, **checkpoint) -> Config:
    """A run that saves every step and keeps them all, unless `checkpoint` says otherwise."""
    section = {"interval": 1, "keep_latest_k": 9} | checkpoint
    return config(talkers, folder, "distill", steps=steps, checkpoint=section)


@contextlib.contextmanager
def opened(cfg: Config) -> Iterator[Engine]:
    """The engine of the run, as a process of its own would have it."""
    os.environ["MASTER_PORT"] = str(free_port())
    engine = Engine(cfg)
    try:
        yield engine
    finally:
        engine.close()


def take_steps(engine: Engine, last: int | None = None) -> dict[int, dict]:
    """Trains to the end, or to `last`. Returns what each step left in memory."""
    left = {}
    for step in engine.steps():
        engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
        engine.notes["answer"] = float(step)
        left[step] = memory(engine)
        if step == last:
            engine.asked_to_stop = True
    return left


def memory(engine: Engine) -> dict[str, object]:
    """Weights, optimizer, schedule and notes."""
    trainer = engine._trainer
    optimizer = {
        f"optimizer.{name}": copy(value) for name, value in trainer.optimizers.state_dict().items()
    }
    schedule = {f"lr.{k}": v for k, v in trainer.lr_schedulers.state_dict().items()}
    return whole_weights(engine) | optimizer | schedule | {"notes": dict(engine.notes)}


def copy(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
        for name, x in a.items()
    )


def names(cfg: Config) -> list[str]:
    """What lies in the run's folder checkpoint/, in order."""
    return sorted(p.name for p in (Path(cfg.folder) / "checkpoint").iterdir())


def step_folder(cfg: Config, step: int) -> Path:
    return Path(cfg.folder) / "checkpoint" / f"step-{step}"


def flip(file: Path, where: float, bit: int = 0) -> None:
    """Changes one bit of the file, at this fraction of it."""
    data = bytearray(file.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


def cut(file: Path, where: float) -> None:
    """Leaves this fraction of the file."""
    data = file.read_bytes()
    file.write_bytes(data[: int(where * len(data))])
