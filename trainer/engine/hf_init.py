"""Random weights and computed buffers of a sharded transformers model.

transformers' own initialisation fills tensors in place. Where it copies plain tensors into weights
(state-space models do), DTensors refuse; then one block at a time is initialised unsharded, alike
on every rank, and each rank keeps its shards.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .conversions import shard_of


@torch.no_grad()
def initialize(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Every weight and every buffer of `model`; `blocks` are its largest parts."""
    _mark(model.modules(), False)
    try:
        model.initialize_weights()
    except RuntimeError:
        _initialize_in_parts(model, blocks)


def _initialize_in_parts(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    parts = [list(block.modules()) for block in blocks]
    inside = {module for part in parts for module in part}
    parts.append([module for module in model.modules() if module not in inside])
    for part in parts:
        _mark(model.modules(), True)
        _mark(part, False)
        with _unsharded(part):
            model.initialize_weights()


def _mark(modules: Iterable[nn.Module], done: bool) -> None:
    for module in modules:
        module._is_hf_initialized = done  # type: ignore[assignment]  # transformers' own flag


@contextlib.contextmanager
def _unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules hold whole plain weights; their shards of them stay."""
    swapped: list[tuple[dict[str, Any], str, DTensor]] = []
    for module in modules:
        weights: dict[str, Any] = module._parameters
        for name, weight in weights.items():
            if isinstance(weight, DTensor):
                swapped.append((weights, name, weight))
                whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
                weights[name] = nn.Parameter(whole, requires_grad=False)
    yield
    for weights, name, weight in swapped:
        weight.to_local().copy_(shard_of(weights[name], weight))
        weights[name] = weight
