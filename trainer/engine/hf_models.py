"""transformers' models behind torchtitan's names: any decoder, dense, of experts or hybrid, and the
text part of multimodal ones, with FSDP2 only.

Shapes: N rows, L row length, D hidden size, V vocabulary.
"""

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torchtitan.protocols.model import BaseModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from reflux.trainer.adapter_folder import base_of

from .document_masks import TAKE_MASKS, masks_by_layer_type
from .fused_layers import take_fused_layers
from .head import head_logits
from .hf_init import initialize

log = logging.getLogger(__name__)

# config.json's rates of what makes a training forward random: attention_dropout, resid_pdrop,
# layerdrop, drop_path_rate, router_jitter_noise
RANDOM_RATE = re.compile(r"drop|jitter")

# families that compute another function here, as bench/model_scan.py found
WRONG = {
    "recurrent_gemma": "its logits differ from those of transformers by 8e-3 nats",
    "xlstm": "its logits differ from those of transformers by 1e-2 nats",
}
CACHE_NAMES = ("cache", "cache_params", "past_key_values")  # newer, state spaces, older


def whole_config(path: str) -> PreTrainedConfig:
    """The folder's config. ValueError for a config.json that transformers cannot read."""
    path = base_of(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises what its parsers raise
        raise ValueError(
            f"{path}/config.json: transformers cannot read it ({shortened(error)})"
        ) from error


def text_config(path: str) -> PreTrainedConfig:
    """The folder's language-model config (of a multimodal model: its text part)."""
    config = whole_config(path)
    if not is_multimodal(config):
        return config
    if not hasattr(config, "text_config"):
        raise ValueError(f"{path}/config.json describes no language model")
    return config.text_config


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the language model is a part of it, with a config of its own."""
    return not hasattr(config, "num_hidden_layers") or hasattr(config, "text_config")


def shortened(error: Exception) -> str:
    """Its kind and its first words; some of transformers' list every architecture."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if text[300:] else ''}"


@contextlib.contextmanager
def buildable(path: str) -> Iterator[None]:
    """ValueError for whatever a model's own code says of its config.json."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}/config.json: no model can be built from it ({shortened(error)})"
        ) from error


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest row; None where the architecture sets no limit."""
    return getattr(config, "max_position_embeddings", None)


def switch_off_dropout(config: PreTrainedConfig) -> dict[str, float]:
    """Sets every rate of RANDOM_RATE to 0, in `config` and the configs inside of it. Returns those
    that were not 0.

    They are for pre-training. Here the sampled and the trained model have to be the same function.
    """
    rates: dict[str, float] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            rates |= switch_off_dropout(value)
        elif config.model_type == "phimoe" and name == "router_jitter_noise":
            pass  # it is also a threshold of its routing in evaluation
        elif RANDOM_RATE.search(name) and isinstance(value, float | int) and value:
            if not isinstance(value, bool):
                rates[name] = float(value)
    for name in rates:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return rates


class HFDecoder(BaseModel):
    """A transformers causal LM under the names torchtitan looks for: tok_embeddings, layers,
    lm_head.

    Always enter through this module: FSDP2 takes the first module that runs for the root.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        path: str
        attention: str | None = None  # transformers' choice: sdpa where the model allows it
        liger: str = "off"  # fused_layers.py

        def update_from_config(self, *, config, **_):
            limit, seq_len = positions_of(text_config(self.path)), config.training.seq_len
            if limit is not None and seq_len > limit:
                raise ValueError(
                    f"{self.path}: training.seq_len = {seq_len}; the model has {limit} positions "
                    "(max_position_embeddings). Shorten the rows"
                )

        def get_nparams_and_flops(self, model, seq_len):
            total = sum(p.numel() for p in model.parameters())
            matmul = (
                total if model.enable_weight_tying else total - model.tok_embeddings.weight.numel()
            )
            hf = model.hf.config.get_text_config()
            return total, 6 * matmul + 12 * hf.num_hidden_layers * hf.hidden_size * seq_len

    _skip_lm_head = False  # torchtitan's name; hidden_states sets it on the instance

    def __init__(self, config: Config):
        super().__init__()
        self.path = config.path
        self.hf = build_hf(config.path, config.attention)
        if why := WRONG.get(self.hf.config.model_type):
            raise ValueError(f"{config.path}: {type(self.hf).__name__} is not supported: {why}")
        drop_other_modalities(self.hf)
        take_fused_layers(self.hf, config.liger, config.path)
        hold_float32(self.hf)
        tied = tied_names(self.hf)
        self.enable_weight_tying = bool(tied)
        if shared := [name for name in tied if re.search(r"\.\d+\.", name)]:
            raise ValueError(
                f"{config.path}: {type(self.hf).__name__} is not supported: its blocks share "
                f"weights ({shared[0]}), which FSDP2 cannot"
            )
        # transformers lets flash attention see document bounds only in batches of one row
        self.flattens_packed_rows = config.attention == "flash_attention_2"
        if getattr(self.lm_head, "bias", None) is not None:
            raise ValueError(
                f"{config.path}: {type(self.hf).__name__} is not supported: want an output head "
                "without bias"
            )
        known = inspect.signature(self.decoder.forward).parameters
        self._cache_name = next((n for n in CACHE_NAMES if n in known), CACHE_NAMES[-1])
        self._text = self.hf.config.get_text_config()
        self._blocks = name_of_blocks(self.decoder, config.path)

    @property
    def decoder(self) -> nn.Module:
        return decoder_of(self.hf)

    @property
    def tok_embeddings(self) -> nn.Module:
        return self.hf.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Module:
        return self.hf.get_output_embeddings()

    @property
    def layers(self) -> dict[str, nn.Module]:
        return dict(self.block_list.named_children())

    @property
    def block_list(self) -> nn.Module:
        return self.decoder.get_submodule(self._blocks)

    def verify_module_protocol(self) -> None:
        """The submodules are transformers', not torchtitan's."""

    def init_states(self, *, buffer_device=None) -> None:
        """Random weights; buffers that to_empty() wiped are computed again. buffer_device: where
        they belong while off-loaded shards lie elsewhere.
        """
        if self.enable_weight_tying:
            self.hf.tie_weights()
        initialize(self.hf, list(self.layers.values()))
        for module in self.hf.modules() if buffer_device is not None else ():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(buffer_device)

    def forward(self, tokens, positions=None, attention_masks=None, cache=None, packed=False):
        """Logits, or hidden states with the head skipped. attention_masks: [N, L'] of real tokens
        (decoding only); document bounds are read off `positions` by transformers, also for sliding
        windows, or given as masks where a family does not.
        """
        shape, flat = tokens.shape, packed and self.flattens_packed_rows
        if flat:
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        elif packed and self._text.model_type in TAKE_MASKS:
            # the root holds the final norm in the compute dtype
            dtype = next(self.decoder.get_submodule("norm").parameters()).dtype
            attention_masks = masks_by_layer_type(self._text, positions, dtype)
            if "_vl" in self._text.model_type:  # positions of texts in front
                positions = positions.expand(4, *positions.shape)
        hidden_NLD = self.decoder(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=attention_masks,
            use_cache=cache is not None,
            **{self._cache_name: cache},
        ).last_hidden_state
        if flat:
            hidden_NLD = hidden_NLD.reshape(*shape, -1)
        return hidden_NLD if self._skip_lm_head else head_logits(self, hidden_NLD)


def architecture(path: str, config: PreTrainedConfig) -> Any:
    """transformers' class of the causal language model; of a multimodal folder the class that
    config.json names, or the one that its kind has.
    """
    if is_multimodal(config):
        named = getattr(transformers, (config.architectures or [""])[0], None)
        kind = named or transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
        if kind is not None and hasattr(kind, "get_decoder"):
            return kind
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{path}: transformers has no causal language model {config.model_type!r}")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def build_hf(path: str, attention: str | None = None) -> PreTrainedModel:
    """transformers' model of the folder, every modality of it, with random weights and without
    dropout, in torch's default dtype.
    """
    config = whole_config(path)
    kind = architecture(path, config)
    if not isinstance(config, kind.config_class):  # a text model that reads multimodal folders
        config = config.get_text_config()
    if rates := switch_off_dropout(config):
        log.info("%s: dropout is off, whatever config.json says: %s", path, rates)
    model = kind._from_config(
        config, attn_implementation=attention, dtype=torch.get_default_dtype()
    )
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # some rates are written in the code
    return model


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Embedding, blocks and final norm, without the head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    while any(module is head for module in decoder.modules()) and hasattr(decoder, "model"):
        decoder = decoder.model
    return decoder


def drop_other_modalities(model: PreTrainedModel) -> None:
    """Takes out of the model what is neither its decoder nor its head: no text needs it."""
    kept = {decoder_of(model), model.get_output_embeddings()}

    def prune(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if child in kept:
                continue
            if any(inner in kept for inner in child.modules()):
                prune(child)
            elif any(True for _ in child.parameters()):
                module._modules[name] = None

    prune(model)


def keeps_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers computes with this tensor in float32, whatever the model's dtype."""
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(rf"(^|\.){re.escape(p)}(\.|$)", name) for p in patterns)


def hold_float32(model: PreTrainedModel) -> None:
    """Makes buffers of the weights that nobody trains and that stay in float32: the routing biases
    of some mixtures of experts. FSDP2 would round them for a forward, as every parameter.
    """
    for name, weight in list(model.named_parameters()):
        if not weight.requires_grad and keeps_float32(model, name):
            parent, _, own = name.rpartition(".")
            module = model.get_submodule(parent)
            delattr(module, own)
            module.register_buffer(own, weight.detach())


def name_of_blocks(decoder: nn.Module, path: str) -> str:
    """What the decoder calls the list of its blocks: layers, h, blocks."""
    lists = {n: m for n, m in decoder.named_children() if isinstance(m, nn.ModuleList)}
    for name in ("layers", *lists):
        if name in lists and len(lists[name]):
            return name
    raise ValueError(f"{path}: {type(decoder).__name__} is not supported: want a list of blocks")


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Tensor without weights of its own -> the one whose weights it has, in transformers' names."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
