"""torchtitan's Trainer as a host: it builds meshes, model, optimizer, schedule and checkpointer.
Data, tokenizer and loss come from elsewhere, so its own are stubs.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.trainer import Trainer


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


class RefluxTrainer(Trainer):
    """torchtitan's Trainer and `notes`, a dictionary of numbers that survives a restart."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config):
        self.notes: dict[str, float] = {}
        super().__init__(config)

    def state_dict(self) -> dict[str, Any]:
        return Trainer.state_dict(self) | {"notes": json.dumps(self.notes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        Trainer.load_state_dict(self, state_dict)
        self.notes = json.loads(state_dict["notes"])
