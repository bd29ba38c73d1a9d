"""transformers' models behind torchtitan's names: any dense decoder, with FSDP2 only.

Shapes: N rows, L row length, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .head import head_logits


def text_config(path: str) -> PreTrainedConfig:
    """The folder's language-model config (of a multimodal model: its text part)."""
    config = AutoConfig.from_pretrained(path)
    return config if hasattr(config, "num_hidden_layers") else config.text_config


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
            limit, seq_len = text_config(self.path).max_position_embeddings, config.training.seq_len
            if seq_len > limit:
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
        hf_config = text_config(config.path)
        self.hf = AutoModelForCausalLM.from_config(
            hf_config, attn_implementation=config.attention, dtype=torch.get_default_dtype()
        )
        self.enable_weight_tying = bool(hf_config.tie_word_embeddings)
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
        with torch.no_grad():
            self.hf.initialize_weights()  # also recomputes the rotary buffers that to_empty() wiped

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


class HFAdapter(StateDictAdapter):
    """Parameter names are Hugging Face's already; only the prefix and the tied head differ."""

    @property
    def _tied(self) -> bool:
        return bool(text_config(self.model_config.path).tie_word_embeddings)

    def to_hf(self, state_dict):
        out = {name.removeprefix("hf."): value for name, value in state_dict.items()}
        if self._tied:
            out.pop("lm_head.weight", None)
            if self.fqn_to_index_mapping:
                self.fqn_to_index_mapping.pop("lm_head.weight", None)
        return out

    def from_hf(self, hf_state_dict):
        out = {"hf." + name: value for name, value in hf_state_dict.items()}
        if self._tied:
            out.setdefault("hf.lm_head.weight", out["hf.model.embed_tokens.weight"])
        return out
