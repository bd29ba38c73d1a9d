"""A saved adapter onto the weights of its base: W + s B A, computed in fp32 and rounded once, to
the dtype of W.

Names are PEFT's, base_model.model.NAME.lora_A.weight, where NAME.weight is the base's tensor.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from reflux.trainer.adapter_folder import AdapterFolder

from .weight_files import opened

PREFIX = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class SavedAdapter:
    """The tensors of an adapter folder, open for reading. names: of the layers, sorted."""

    folder: AdapterFolder
    names: Sequence[str]
    _tensors: Any

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], fp32."""
        A, B = (self._tensors.get_tensor(f"{PREFIX}{name}{end}").float() for end in ENDS)
        return A, B

    def shapes(self, name: str) -> tuple[list[int], list[int]]:
        a, b = (self._tensors.get_slice(f"{PREFIX}{name}{end}").get_shape() for end in ENDS)
        return a, b

    def delta(self, name: str) -> Tensor:
        """s B A [out, in], fp32."""
        A, B = self.pair(name)
        return self.folder.scale(A.shape[0]) * (B @ A)


@contextlib.contextmanager
def saved_adapter(folder: AdapterFolder) -> Iterator[SavedAdapter]:
    """ValueError for a file that is torn, or holds anything but pairs of A and B."""
    with opened(folder.weights) as tensors:
        keys = set(tensors.keys())
        names = {k.removeprefix(PREFIX).removesuffix(end) for k in keys for end in ENDS}
        names = {n for n in names if f"{PREFIX}{n}{ENDS[0]}" in keys}
        strange = sorted(keys - {f"{PREFIX}{n}{end}" for n in names for end in ENDS})
        missing = sorted({f"{PREFIX}{n}{end}" for n in names for end in ENDS} - keys)
        if strange or missing or not names:
            what = f"has {strange[0]!r}" if strange else f"lacks {(missing or ['any tensor'])[0]!r}"
            raise ValueError(
                f"{folder.weights}: {what}; want pairs of {PREFIX}NAME.lora_A.weight and "
                "lora_B.weight, as PEFT saves a LoRA adapter of linear layers"
            )
        yield SavedAdapter(folder, sorted(names), tensors)


def check_adapter(weights: Mapping[str, Tensor], adapter: SavedAdapter) -> None:
    """ValueError where it does not fit a model of these weights (transformers' name -> tensor)."""
    file = adapter.folder.weights
    for name in adapter.names:
        weight = weights.get(f"{name}.weight")
        if weight is None:
            raise ValueError(
                f"{file}: an adapter of {name!r}, which {adapter.folder.base} does not have. Take "
                "the base it was trained on (base_model_name_or_path)"
            )
        (rank, size), (out, other) = adapter.shapes(name)
        if (out, size) != tuple(weight.shape) or rank != other:
            raise ValueError(
                f"{file}: A [{rank}, {size}] and B [{out}, {other}] of {name!r} do not fit its "
                f"weight {list(weight.shape)}. Take the base it was trained on"
            )


@torch.no_grad()
def add_adapter(weights: Mapping[str, Tensor], adapter: SavedAdapter) -> None:
    """Adds s B A to the weights, in place; sharded ones take their part. Not collective."""
    for name in adapter.names:
        weight, delta = weights[f"{name}.weight"], adapter.delta(name)
        if not bool(delta.isfinite().all()):
            raise ValueError(f"{adapter.folder.weights}: the adapter of {name!r} holds NaN or inf")
        if isinstance(weight, DTensor):
            local = weight.to_local()
            part = _shard_like(weight, delta).to_local().to(local.device)
        else:
            local, part = weight, delta.to(weight.device)
        local.copy_(local.float() + part)


def _shard_like(weight: DTensor, whole: Tensor) -> DTensor:
    """The same whole tensor on every rank, cut as `weight` is."""
    mesh = weight.device_mesh
    whole = whole.to(mesh.device_type)  # off-loaded shards lie elsewhere
    everywhere = distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return everywhere.redistribute(placements=weight.placements)
