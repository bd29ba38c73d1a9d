"""torchtitan's Trainer as a host: it builds meshes, model, optimizer, schedule and checkpointer.
Data, tokenizer and loss come from elsewhere, so its own are stubs.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.utils import device_type
from torchtitan.trainer import Trainer

from . import optimizer_state, random_state
from .checkpoints import Checkpointer
from .optimizer_state import OptimizerState
from .random_state import RandomState

INPUTS, TO_CLOSE = "inputs", "to_close"  # among the notes
CHECKPOINT_TIMEOUT = timedelta(minutes=60)  # slow file systems, and ranks that write more


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drops torchtitan's remarks about missing lspci, index files and CPU peak flops."""
    return record.levelno >= logging.ERROR or f"{os.sep}torchtitan{os.sep}" not in record.pathname


logging.getLogger().addFilter(_is_worth_logging)  # torchtitan logs through the root logger
warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")


class NoData(BaseDataLoader):
    """Prompts are a pure function of (seed, step), so there is nothing to load."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        pass

    def __iter__(self) -> Iterator:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {"none": 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    """Every model of a run has its own tokenizer (data/chat.py)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the engine has no tokenizer; use Chat")

    decode = encode

    def get_vocab_size(self) -> int:
        return 0


class NoLoss(BaseLoss):
    """The phase brings the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: Any = None):
        pass


def _check_device(config: Trainer.Config) -> None:
    """ValueError for what only an accelerator has; a plan for one may be made without."""
    if device_type != "cpu":
        return
    advice = "wants a GPU, and torch finds none here; leave it out"
    if config.profiler.enable_memory_snapshot:
        raise ValueError(f"profiler.enable_memory_snapshot = true {advice}")
    if config.training.enable_cpu_offload:
        raise ValueError(f"training.enable_cpu_offload = true {advice}")


@dataclass(frozen=True)
class Finished:
    """What a finished step left, beside weights and optimizer. to_close: its numbers, where neither
    evaluation nor guards have seen it yet.
    """

    step: int
    notes: Mapping[str, float]
    random: Mapping[str, Tensor]
    to_close: Mapping[str, float] | None = None


class RefluxTrainer(Trainer):
    """torchtitan's Trainer; `notes`, a dictionary of numbers, and torch's random state survive a
    restart. `inputs`, what the run reads (fingerprints.py), is saved beside them; `loaded_inputs`
    and `to_close` (Finished) are those of the checkpoint.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    checkpointer: Checkpointer

    def __init__(self, config: Config):
        _check_device(config)
        self.notes: dict[str, float] = {}
        self.inputs: dict[str, Any] = {}
        self.loaded_inputs: dict[str, Any] = {}
        self.to_close: Mapping[str, float] | None = None
        self.knows_idle_adapters = False  # whether it was looked for adapters without a gradient
        self._held: Finished | None = None  # what to save instead of the state of now
        super().__init__(config)
        self.random = RandomState(dist.get_rank(), self.device)
        self.checkpointer.states[random_state.KEY] = self.random
        self.checkpointer.states[optimizer_state.KEY] = OptimizerState(self.optimizers)
        if dist.get_world_size() > 1:
            # its own, on CPU: it works while a rank waits in a collective of the training
            self.checkpointer.peers.group = dist.new_group(
                backend="gloo", timeout=CHECKPOINT_TIMEOUT
            )

    def finished(self, to_close: Mapping[str, float] | None = None) -> Finished:
        """The state of now, as the state after this step."""
        return Finished(self.step, dict(self.notes), self.random.read(), to_close)

    @contextlib.contextmanager
    def held(self, finished: Finished) -> Iterator[None]:
        """Inside, a save writes this state: a later step has begun, but moved no weight."""
        self._held, self.random.held = finished, dict(finished.random)
        try:
            yield
        finally:
            self._held, self.random.held = None, None

    def state_dict(self) -> dict[str, Any]:
        state = Trainer.state_dict(self) | {"notes": self._notes(self.notes)}
        if self._held is not None:
            held = self._held
            notes = self._notes(held.notes, held.to_close)
            state |= {"step": held.step, "notes": notes}
        return state

    def _notes(
        self, notes: Mapping[str, float], to_close: Mapping[str, float] | None = None
    ) -> str:
        left = {} if to_close is None else {TO_CLOSE: to_close}
        return json.dumps({**notes, **left, INPUTS: self.inputs})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        Trainer.load_state_dict(self, state_dict)
        notes = json.loads(state_dict["notes"])
        self.loaded_inputs = notes.pop(INPUTS, {})  # checkpoints of older versions have none
        self.to_close = notes.pop(TO_CLOSE, None)
        self.notes = notes
