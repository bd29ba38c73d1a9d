"""Frozen models in 8 or 4 bits, by bitsandbytes: a weight is packed once, when the model is loaded,
and unpacked for each product.

    int8  q = round(127 W / s), s the largest |W| of the row (arXiv:2208.07339, section 2.1)
    nf4   the nearest of 16 quantiles of a normal distribution, times s, the largest |W| of a block
          of 64 (arXiv:2305.14314, section 3)

Head, embeddings, norms and biases keep their dtype: the losses read the head as one matrix.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REQUIREMENT = "bitsandbytes>=0.48"  # as in pyproject.toml
BLOCK = 64  # weights that share a scale in nf4


def check_quantizes(kind: str, device: torch.device) -> None:
    """ValueError on a CPU, and where bitsandbytes is not installed."""
    if device.type == "cpu":
        raise ValueError(
            f"quantization = {kind!r} needs a CUDA device; on a CPU want 'none', which is faster "
            "there, or a smaller model"
        )
    _bitsandbytes(kind)


def _bitsandbytes(kind: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"quantization = {kind!r} needs bitsandbytes, which is not installed ({error}): pip "
            f"install '{REQUIREMENT}'"
        ) from error
    return bitsandbytes.functional


class PackedLinear(nn.Module):
    """A linear layer whose weight [out, in] is packed."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device):
        super().__init__()
        self.kind, self.dtype = kind, layer.weight.dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, self._functional = layer.weight.detach().to(device), _bitsandbytes(kind)
        if kind == "int8":
            # by torch: bitsandbytes rounds the weight to fp16 before it packs it
            scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
            packed = (weight.float() * (127 / scale)).round().to(torch.int8)
        else:
            packed, self._state = self._functional.quantize_4bit(
                weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
            )
            scale = self._state.absmax
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        self.register_buffer("bias", bias)

    def weight_again(self) -> Tensor:
        """[out, in] in the dtype it came in."""
        if self.kind == "int8":
            return (self.packed * (self.scale / 127)).to(self.dtype)
        return cast(Tensor, self._functional.dequantize_4bit(self.packed, self._state))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_again(), self.bias)


@torch.no_grad()
def quantize(model: Any, kind: str, device: torch.device) -> None:
    """Packs every linear layer of the model but the head on `device`, one after another, and moves
    the rest there.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(parent, name, PackedLinear(child, kind, device))
    model.to(device)
