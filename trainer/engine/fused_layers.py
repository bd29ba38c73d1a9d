"""liger-kernel's RMSNorm, RoPE and gated MLPs in place of transformers', on CUDA.

Only layers: its losses stay out, because logits are never made here. Functions that liger patches
by name in a transformers module are patched for every later model of that family in the process.
"""

import importlib.util
import logging

import torch
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LAYERS = {"rope": True, "rms_norm": True, "layer_norm": True, "swiglu": True, "geglu": True}
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_liger(wanted: str, path: str) -> None:
    """ValueError where liger = "on" cannot be had at all."""
    if wanted not in ("off", "auto", "on"):
        raise ValueError(f"{path}: liger = {wanted!r}; want 'off', 'auto' or 'on'")
    if wanted == "on" and not torch.cuda.is_available():
        raise ValueError(f"{path}: liger = 'on' needs a CUDA device; want 'off' or 'auto' on a CPU")
    if wanted == "on" and not _is_installed():
        raise ValueError(f"{path}: liger = 'on', and the package liger-kernel is not installed")


def take_fused_layers(model: PreTrainedModel, wanted: str, path: str) -> None:
    """Patches `model` in place. "auto" does nothing without CUDA, without liger-kernel, and for a
    family that it does not know; for "on" the last is a ValueError.
    """
    check_liger(wanted, path)
    if wanted == "off" or not (torch.cuda.is_available() and _is_installed()):
        return
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN or hasattr(
        model.config, "text_config"
    ):
        if wanted == "on":
            raise ValueError(
                f"{path}: liger = 'on', and liger-kernel has no layers for {kind!r}; want 'auto'"
            )
        return
    monkey_patch._apply_liger_kernel_to_instance(model=model, **LAYERS, **LOSSES)
    log.info("%s: layers of liger-kernel", path)


def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
