"""Torch's random numbers as a part of the checkpoint, each rank's own."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

KEY = "random"  # of this state in a checkpoint


class RandomState(Stateful):
    """State of the default generators of the CPU and of this rank's device.

    A loaded state waits for `apply`: building frozen models draws from the generators too, after
    the checkpoint was read.
    """

    def __init__(self, rank: int, device: torch.device):
        self._rank, self._device = rank, device
        self._loaded: dict[str, Tensor] | None = None
        self.held: dict[str, Tensor] | None = None  # what to save instead of the state of now

    def read(self) -> dict[str, Tensor]:
        """uint8 tensors, on the CPU."""
        state = {f"cpu-{self._rank}": torch.get_rng_state()}
        if self._device.type != "cpu":
            module = torch.get_device_module(self._device)
            state[f"device-{self._rank}"] = module.get_rng_state(self._device)
        return state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.held or self.read())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = {name: state.clone() for name, state in state_dict.items()}

    def apply(self) -> None:
        """The generators go on where those of the checkpoint were; nothing if none was loaded."""
        if self._loaded is None:
            return
        torch.set_rng_state(self._loaded[f"cpu-{self._rank}"])
        if self._device.type != "cpu":
            module = torch.get_device_module(self._device)
            module.set_rng_state(self._loaded[f"device-{self._rank}"], self._device)
        self._loaded = None
