"""Decoding with a KV cache on the sharded training model itself: no second copy, no transfer of
weights.

    with gathered(model, policy), kv_decoder(model, max_length=...) as step:
        logits_NV = step(ids_NL, positions_NL, real_NL, True)   # the prompts, padded on the left
        logits_NV = step(ids_N1, positions_N1, real_NL, False)  # then one token a row
        logits_MV = step(ids_M1, positions_M1, real_ML, False, rows_M)  # of some of the rows

Inside `gathered` decoding needs no collective: ranks may sample different numbers of texts of
different lengths. Shapes: N rows, L length so far (padding included), V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torchtitan.tools import utils
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reflux.trainer.phase import Decode, DecodeStep

from .head import head_logits, head_skipped
from .hf_models import HFDecoder
from .native_models import CachedFlexAttention, KVCache, MaskedSDPA
from .sharding import fsdp_units, restore_reshard


def run_root(model) -> None:
    """A forward of one token: only the root's first forward makes the streams that gathering needs
    on CUDA. Collective.
    """
    # offloaded parameters live elsewhere
    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=utils.device_type)
    with torch.no_grad(), head_skipped(model):
        model(ids_11, positions=ids_11)
    model.reflux_root_ran = True


@contextlib.contextmanager
def gathered(model, policy: str = "default") -> Iterator[None]:
    """Hold all parameters unsharded, in the compute dtype, and the model in eval mode. Collective
    on entry.

    policy: parallelism.fsdp_reshard_after_forward, put back on exit. Every rank enters and leaves
    together; inside, ranks may do different amounts of work. Costs the whole model in the compute
    dtype on every device.
    """
    if not getattr(model, "reflux_root_ran", False):
        run_root(model)
    training, units = model.training, fsdp_units(model)
    model.eval()
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
        # The next backward prefetches along the forwards FSDP2 has seen. A rank that decoded
        # nothing would prefetch another group than the others, and its collectives would not match
        # theirs: all end on the same forward.
        run_root(model)
    finally:
        model.train(training)
        for unit in units:
            unit.reshard()
        if units:
            restore_reshard(model, policy)


@contextlib.contextmanager
def kv_decoder(model, *, max_length: int = 0) -> Iterator[DecodeStep]:
    """Yields step(ids_NL, positions_NL, real_NL, first, rows_N) -> logits_NV of the last position,
    in the compute dtype; see phase.DecodeStep.

    The first call takes the prompts padded on the left, every later one a single token a row.
    max_length: tokens to reserve room for in the cache (it doubles when exceeded). Only the last
    position goes through the head.
    """
    cached = (MaskedSDPA, CachedFlexAttention)
    layers = [module for module in model.modules() if isinstance(module, cached)]
    caches = [KVCache(max_length) for _ in layers]
    for layer, cache in zip(layers, caches):
        layer.cache = cache
    if isinstance(model, HFDecoder):
        hidden_of = _hf_hidden(model, max_length)
    else:
        hidden_of = _native_hidden(model, caches)

    @torch.no_grad()
    def step(
        ids_NL: Tensor,
        positions_NL: Tensor,
        real_NL: Tensor,
        first: bool,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        with head_skipped(model):
            hidden_N1D = hidden_of(ids_NL, positions_NL, real_NL, first, rows_N)[:, -1:]
        return head_logits(model, hidden_N1D)[:, 0]

    try:
        yield step
    finally:
        for layer in layers:
            layer.cache = None


def decoder_of(model, device: torch.device) -> Decode:
    """decode(rows, max_length) -> context of (step, device), each with a cache of its own."""

    @contextlib.contextmanager
    def decode(rows: int, max_length: int) -> Iterator[tuple[DecodeStep, torch.device]]:
        with kv_decoder(model, max_length=max_length) as step:
            yield step, device

    return decode


class RoomyLayer(DynamicLayer):
    """transformers' cache of a layer, written in place: theirs is copied for every token."""

    def __init__(self, capacity: int):
        super().__init__()
        self._cache = KVCache(capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._cache.append(key_states, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._cache.select(beam_idx)
        self.keys, self.values = self._cache.stored


def _hf_hidden(model, max_length: int) -> DecodeStep:
    """Hidden states [N, L, D] of the new tokens, by transformers' own cache."""
    cache = DynamicCache(config=model.hf.config)
    # sliding windows keep theirs, which forgets
    cache.layers = [RoomyLayer(max_length) if type(x) is DynamicLayer else x for x in cache.layers]

    def hidden_of(
        ids_NL: Tensor,
        positions_NL: Tensor,
        real_NL: Tensor,
        first: bool,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        if rows_N is not None:
            cache.reorder_cache(cast(torch.LongTensor, rows_N))
        return model(ids_NL, positions=positions_NL, attention_masks=real_NL.long(), cache=cache)

    return hidden_of


def _native_hidden(model, caches: Sequence[KVCache]) -> DecodeStep:
    """Hidden states [N, L, D] of the new tokens, by the caches in the attention layers."""

    def hidden_of(
        ids_NL: Tensor,
        positions_NL: Tensor,
        real_NL: Tensor,
        first: bool,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        if rows_N is not None:
            for cache in caches:
                cache.select(rows_N)
        mask = real_NL[:, None, None, :]
        # causal within the prompt; a padding token sees itself, so that no softmax row is empty
        if first:
            L = ids_NL.shape[1]
            eye_LL = torch.eye(L, dtype=torch.bool, device=ids_NL.device)
            mask = mask & torch.ones_like(eye_LL).tril() | eye_LL
        return model(ids_NL, positions=positions_NL, attention_masks=mask)

    return hidden_of
