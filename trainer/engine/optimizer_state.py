"""The optimizer as a part of the checkpoint: moments of the weights that it has moved, no others.

AdamW makes a weight's moments with its first gradient: never for one that the forward passes by,
and for none before the first step with tokens. torchtitan would make them for a save by a step of
zeros, which counts in the bias correction, or leave them out, and then cannot load the checkpoint.
"""

from collections.abc import Container
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer.base import OPTIMIZER
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)

KEY = OPTIMIZER  # of this state in a checkpoint


class OptimizerState(Stateful):
    """What a save writes: the state as it is, without making any."""

    def __init__(self, optimizers: OptimizersContainer):
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            flat |= get_flat_optim_state_dict(optimizer)
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            load_flat_optim_state_dict(optimizer, state_dict)


class StoredOptimizerState(OptimizerState):
    """What a load reads. Weights that the checkpoint trained and that had no moments have none
    again; all others need theirs. stored: the names in the checkpoint.
    """

    def __init__(self, optimizers: OptimizersContainer, stored: Container[str]):
        super().__init__(optimizers)
        self.stored = stored

    def state_dict(self) -> dict[str, Any]:
        for optimizer in self.optimizers:  # to be read into
            optimizer.state.clear()
            optimizer.zero_grad()
            init_optim_state(optimizer)
        flat = super().state_dict()
        moments: dict[str, list[str]] = {}  # weight -> its keys
        for key in flat:
            if key.startswith("state."):
                moments.setdefault(key.removeprefix("state.").rpartition(".")[0], []).append(key)
        for name, keys in moments.items():
            if self._has(f"param_groups.{name}.lr") and not any(map(self._has, keys)):
                for key in keys:
                    del flat[key]
        return flat

    def _has(self, key: str) -> bool:
        return f"{KEY}.{key}" in self.stored
