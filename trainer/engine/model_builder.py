"""A Hugging Face folder in, torchtitan's ModelSpec out: its own modules for dense qwen3 and llama
(native_models.py), transformers' for the rest (hf_models.py).
"""

import os

import torch
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from reflux.trainer.adapter_folder import base_of

from .fused_layers import check_liger
from .hf_adapter import HFAdapter
from .hf_models import HFDecoder, buildable, is_multimodal, text_config, whole_config
from .native_models import native_model, native_obstacle
from .sharding import parallelize

CUDA_ONLY = ("flex", "flash_attention_2")


def build_spec(
    path: str, *, backend: str = "auto", attention: str = "auto", liger: str = "off"
) -> ModelSpec:
    """torchtitan's description of the causal language model in the Hugging Face folder `path`.

    backend: "native" (torchtitan's modules: TP, Flex), "hf" (transformers' modules: any dense
    decoder, FSDP2 only), or "auto", native wherever it computes the same function. attention:
    "auto" is "sdpa" ("eager" for the few models of transformers without it, such as Gemma 2);
    "flex" (native) and "flash_attention_2" (hf) need CUDA. ValueError for an unknown or impossible
    choice, and for a model that the chosen backend does not compute exactly.
    """
    _check_choice(path, backend, attention)
    check_liger(liger, path)
    path = base_of(path)  # of an adapter's folder
    config, whole = text_config(path), whole_config(path)
    if any(getattr(c, "quantization_config", None) is not None for c in (config, whole)):
        raise ValueError(
            f"{path}: the weights are quantised; want float32, float16 or bfloat16 safetensors"
        )
    if named := getattr(whole, "transformers_weights", None):
        raise ValueError(
            f"{path}/config.json names its weights, transformers_weights = {named!r}; want them in "
            "model.safetensors, or in shards with an index"
        )
    obstacle = native_obstacle(config, attention)
    if is_multimodal(whole):
        obstacle = "knows no multimodal folders"
    if backend == "native" and obstacle:
        raise ValueError(f"{path}: backend 'native' {obstacle}; use backend = 'hf' or 'auto'")
    native = backend == "native" or backend == "auto" and not obstacle
    if not native and attention == "flex":
        raise ValueError(
            f"{path}: attention 'flex' is for backend 'native', which "
            f"{obstacle or 'was not chosen'}; use 'sdpa' or 'flash_attention_2'"
        )
    if native and liger == "on":
        raise ValueError(
            f"{path}: liger = 'on' is for backend 'hf'; want 'auto', or backend = 'hf'"
        )
    model: BaseModel.Config
    adapter: type[StateDictAdapter]
    if native:
        with buildable(path):
            model, adapter = native_model(config, attention)
    else:
        own_choice = None if attention == "auto" else attention
        model, adapter = HFDecoder.Config(path=path, attention=own_choice, liger=liger), HFAdapter
    return ModelSpec(
        name="native" if native else "hf",
        flavor=os.path.basename(os.path.normpath(path)),
        model=model,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=adapter,
    )


def _check_choice(path: str, backend: str, attention: str) -> None:
    if backend not in ("auto", "native", "hf"):
        raise ValueError(f"{path}: backend = {backend!r}; want 'auto', 'native' or 'hf'")
    if attention not in ("auto", "sdpa", *CUDA_ONLY):
        raise ValueError(
            f"{path}: attention = {attention!r}; want 'auto', 'sdpa', 'flex' or 'flash_attention_2'"
        )
    if attention in CUDA_ONLY and not torch.cuda.is_available():
        raise ValueError(
            f"{path}: attention = {attention!r} needs a CUDA device; want 'auto' or 'sdpa' on CPU"
        )
    if not os.path.isfile(os.path.join(base_of(path), "config.json")):
        raise ValueError(f"{path}: no config.json there; want a local Hugging Face model folder")
