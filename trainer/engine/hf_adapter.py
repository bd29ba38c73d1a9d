"""A Hugging Face folder and an HFDecoder: which tensor is which, on the way in and out.

Parameter names are transformers' with a prefix; the names of the files may be others (see
conversions.py). A multimodal folder also holds tensors that the language model lacks: they are
known, not loaded, and go into an export as they are.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .conversions import Assembly, assembled, default_transforms, stored_form
from .hf_models import build_hf, keeps_float32, tied_names
from .weight_files import Stored, opened
from .weights import FolderAdapter


@functools.lru_cache(maxsize=8)
def _built(path: str, config: bytes) -> PreTrainedModel:
    """On the meta device, every modality."""
    with torch.device("meta"):
        return build_hf(path)


def skeleton(path: str) -> PreTrainedModel:
    return _built(path, (Path(path) / "config.json").read_bytes())


class HFAdapter(FolderAdapter):
    """Between an HFDecoder's state and the files of its folder."""

    @property
    def model(self) -> PreTrainedModel:
        return skeleton(self.model_config.path)

    @property
    def tied(self) -> Mapping[str, str]:
        return tied_names(self.model)

    @property
    def ignored(self) -> tuple[str, ...]:
        return (*super().ignored, *(self.model._keys_to_ignore_on_load_unexpected or ()))

    def keeps_float32(self, name: str) -> bool:
        return keeps_float32(self.model, name)

    def to_hf(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """transformers' names, which are not those of the files."""
        out = {name.removeprefix("hf."): value for name, value in state_dict.items()}
        for name in self.tied:
            out.pop(name, None)
        return out

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> dict[str, Any]:
        out = {"hf." + name: value for name, value in hf_state_dict.items()}
        for name, of in self.tied.items():
            out.setdefault("hf." + name, out["hf." + of])
        return out

    def assembly(self, stored: Iterable[str], weights: Iterable[str]) -> Assembly:
        return assembled(self.model, stored, [*self.model.state_dict(), *weights])

    def files(
        self, weights: Mapping[str, Tensor], stored: Mapping[str, Stored], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """As FolderAdapter.files; the conversions that the folder's names needed are undone, and
        the tensors of other modalities come from the folder.
        """
        whole = self.assembly(stored, weights)
        used = whole.used if stored else default_transforms(self.model)
        out: dict[str, Tensor] = {}
        for group in stored_form(self.model, weights, used):
            if group.convert is None:
                out[group.files[0]] = weights[group.names[0]]
                continue
            made = group.convert({name: _whole(weights[name]) for name in group.names})
            out |= {file: _share(made[file], i) for i, file in enumerate(group.files, len(out))}
        own = weights.keys() | self.tied.keys()
        others = {
            name: torch.float32 if any(map(self.keeps_float32, part.targets)) else dtype
            for part in whole.parts
            if not own & set(part.targets)
            for name in part.names
        }
        for i, name in enumerate(sorted(others.keys() - out.keys())):
            out[name] = _share(_read(stored[name], name, others[name]), i)
        return out


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _share(whole: Tensor, number: int) -> Tensor:
    """On the rank that writes this tensor, itself, on the CPU; on the others its shape."""
    if number % dist.get_world_size() != dist.get_rank():
        return torch.empty_like(whole, device="meta")
    return whole.contiguous().cpu()


def _read(stored: Stored, name: str, dtype: torch.dtype) -> Tensor:
    with opened(stored.file) as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
