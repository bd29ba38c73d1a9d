"""transformers' models behind torchtitan's names: any dense decoder, with FSDP2 only.

Shapes: N rows, L row length, D hidden size, V vocabulary.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.protocols.model import BaseModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from .head import head_logits
from .weights import FolderAdapter

log = logging.getLogger(__name__)

# config.json's rates of what makes a training forward random: attention_dropout, resid_pdrop,
# layerdrop, drop_path_rate, router_jitter_noise
RANDOM_RATE = re.compile(r"drop|jitter")


def text_config(path: str) -> PreTrainedConfig:
    """The folder's language-model config (of a multimodal model: its text part). ValueError for a
    config.json that transformers cannot read.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises what its parsers raise
        raise ValueError(
            f"{path}/config.json: transformers cannot read it ({shortened(error)})"
        ) from error
    if hasattr(config, "num_hidden_layers"):
        return config
    if not hasattr(config, "text_config"):
        raise ValueError(f"{path}/config.json describes no language model")
    return config.text_config


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

        def update_from_config(self, *, config, **_):
            limit, seq_len = positions_of(text_config(self.path)), config.training.seq_len
            if limit is not None and seq_len > limit:
                raise ValueError(
                    f"{self.path}: training.seq_len = {seq_len}; the model has {limit} positions "
                    "(max_position_embeddings). Shorten the rows"
                )

        def get_nparams_and_flops(self, model, seq_len):
            hf = model.hf.config
            total = sum(p.numel() for p in model.parameters())
            matmul = (
                total if model.enable_weight_tying else total - model.tok_embeddings.weight.numel()
            )
            return total, 6 * matmul + 12 * hf.num_hidden_layers * hf.hidden_size * seq_len

    _skip_lm_head = False  # torchtitan's name; hidden_states sets it on the instance

    def __init__(self, config: Config):
        super().__init__()
        self.path = config.path
        hf_config = text_config(config.path)
        if rates := switch_off_dropout(hf_config):
            log.info("%s: dropout is off, whatever config.json says: %s", config.path, rates)
        if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"{config.path}: transformers has no causal language model {hf_config.model_type!r}"
            )
        self.hf = AutoModelForCausalLM.from_config(
            hf_config,
            attn_implementation=config.attention,
            dtype=torch.get_default_dtype(),
            trust_remote_code=False,  # else transformers asks at a terminal
        )
        for module in self.hf.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0  # some rates are written in the code
        self.enable_weight_tying = bool(tied_names(hf_config))
        # transformers lets flash attention see document bounds only in batches of one row
        self.flattens_packed_rows = config.attention == "flash_attention_2"
        if not hasattr(self.decoder, "layers") or getattr(self.lm_head, "bias", None) is not None:
            raise ValueError(
                f"{config.path}: {type(self.hf).__name__} is not supported: want a decoder with "
                "`layers` and an output head without bias"
            )

    @property
    def decoder(self) -> nn.Module:
        return self.hf.get_decoder()

    @property
    def tok_embeddings(self) -> nn.Module:
        return self.hf.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Module:
        return self.hf.get_output_embeddings()

    @property
    def layers(self) -> dict[str, nn.Module]:
        return dict(self.decoder.get_submodule("layers").named_children())

    def verify_module_protocol(self) -> None:
        """The submodules are transformers', not torchtitan's."""

    def init_states(self, *, buffer_device=None) -> None:
        for module in self.hf.modules():
            module._is_hf_initialized = False
        if self.enable_weight_tying:
            self.hf.tie_weights()
        try:
            with torch.no_grad():
                # also recomputes the rotary buffers that to_empty() wiped
                self.hf.initialize_weights()
        except RuntimeError as error:  # state-space models mix sharded and plain tensors
            raise ValueError(
                f"{self.path}: {type(self.hf).__name__} cannot be initialised in shards ({error}). "
                "Want a transformer with dense attention"
            ) from error

    def forward(self, tokens, positions=None, attention_masks=None, cache=None, packed=False):
        """Logits, or hidden states with the head skipped. attention_masks: [N, L'] of real tokens
        (decoding only); document bounds are read off `positions` by transformers, also for sliding
        windows.
        """
        shape, flat = tokens.shape, packed and self.flattens_packed_rows
        if flat:
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        hidden_NLD = self.decoder(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=attention_masks,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        if flat:
            hidden_NLD = hidden_NLD.reshape(*shape, -1)
        return hidden_NLD if self._skip_lm_head else head_logits(self, hidden_NLD)


def _architecture(config: PreTrainedConfig) -> Any:
    """transformers' class of the causal language model."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def tied_names(config: PreTrainedConfig) -> Mapping[str, str]:
    """Tensor without weights of its own -> the one whose weights it has, in transformers' names."""
    tied = getattr(config, "tie_word_embeddings", False)
    return dict(_architecture(config)._tied_weights_keys or {}) if tied else {}


class HFAdapter(FolderAdapter):
    """Parameter names are Hugging Face's already; only the prefix and the tied head differ."""

    @property
    def tied(self) -> Mapping[str, str]:
        return tied_names(text_config(self.model_config.path))

    @property
    def ignored(self) -> tuple[str, ...]:
        kind = _architecture(text_config(self.model_config.path))
        return (*super().ignored, *(kind._keys_to_ignore_on_load_unexpected or ()))

    def to_hf(self, state_dict):
        out = {name.removeprefix("hf."): value for name, value in state_dict.items()}
        for name in self.tied:
            out.pop(name, None)
            if self.fqn_to_index_mapping:
                self.fqn_to_index_mapping.pop(name, None)
        return out

    def from_hf(self, hf_state_dict):
        out = {"hf." + name: value for name, value in hf_state_dict.items()}
        for name, of in self.tied.items():
            out.setdefault("hf." + name, out["hf." + of])
        return out
