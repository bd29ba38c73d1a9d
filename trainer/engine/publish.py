"""The trained weights for whoever samples elsewhere: one tensor after the other, under the names
and in the layout of a Hugging Face folder.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP

from .lora import adapter_deltas
from .weights import own_weights


@torch.no_grad()
def named_weights(trainer, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor in `dtype`, or what the model keeps in float32 in that) of every weight
    that an export would have. Collective: every rank has to take all of them, in order.

    Shards are cast before they are gathered, as FSDP2 does for a forward, and no rank holds more
    than one gathered tensor that its caller does not keep. Adapters are merged: W + s B A in fp32,
    rounded once.
    """
    spec, model = trainer.config.model_spec, trainer.model_parts[0]
    adapter = spec.state_dict_adapter(spec.model, None)
    weights = adapter.to_hf(own_weights(model))
    deltas = adapter_deltas(model, spec)
    for name in list(weights):
        weight = weights.pop(name).detach()
        if weight.is_floating_point() and not adapter.keeps_float32(name):
            weight = weight.to(TORCH_DTYPE_MAP[dtype])
        weight = weight.to(trainer.device)  # off-loaded shards; nothing for all others
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        layer = name.removesuffix(".weight")
        if layer in deltas:
            whole = (whole.float() + deltas[layer]().to(whole.device)).to(whole.dtype)
        yield name, whole
