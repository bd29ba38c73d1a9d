"""torchtitan's own modules for dense qwen3 and llama, built from a Hugging Face config. Their
attention can decode with a KV cache.

Shapes: N rows, L row length, D hidden size, V vocabulary, H query heads, K key heads, C head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3 import Llama3Model
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3 import Qwen3Model
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module
from transformers import PreTrainedConfig

from .weights import FolderAdapter


class NativeAdapter(FolderAdapter):
    @property
    def tied(self) -> Mapping[str, str]:
        head = {"lm_head.weight": "model.embed_tokens.weight"}
        return head if self.model_config.enable_weight_tying else {}


class Qwen3Adapter(NativeAdapter, Qwen3StateDictAdapter):
    pass


class LlamaAdapter(NativeAdapter, Llama3StateDictAdapter):
    pass


NATIVE = {
    "qwen3": (Qwen3Model, Qwen3TransformerBlock, Qwen3Adapter),
    "llama": (Llama3Model, Llama3TransformerBlock, LlamaAdapter),
}


class KVCache:
    """Keys and values of one layer, [N, K, capacity, C], written in place; a full one doubles."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def select(self, rows_N: Tensor) -> None:
        """Goes on with these rows, in this order; a row may be taken more than once."""
        if self._keys is None or self._values is None:
            return
        self._keys, self._values = (self._taken(x, rows_N) for x in (self._keys, self._values))

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Views of everything stored so far."""
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def _taken(self, old_MKLC: Tensor, rows_N: Tensor) -> Tensor:
        room = old_MKLC.new_empty(len(rows_N), *old_MKLC.shape[1:])
        room[:, :, : self.length] = old_MKLC[:, :, : self.length].index_select(0, rows_N)
        return room

    def append(self, k_NKLC: Tensor, v_NKLC: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new positions; returns views of everything stored so far."""
        start, self.length = self.length, self.length + k_NKLC.shape[2]
        keys, values = self._keys, self._values
        if keys is None or values is None or self.length > self.capacity:
            capacity = self.capacity if keys is None else 2 * self.capacity
            self.capacity = max(capacity, self.length)
            keys, values = self._grown(k_NKLC, keys), self._grown(v_NKLC, values)
            self._keys, self._values = keys, values
        keys[:, :, start : self.length] = k_NKLC
        values[:, :, start : self.length] = v_NKLC
        return self.stored

    def _grown(self, new_NKLC: Tensor, old_NKLC: Tensor | None) -> Tensor:
        N, K, _, C = new_NKLC.shape
        room = new_NKLC.new_empty(N, K, self.capacity, C)
        if old_NKLC is not None:
            room[:, :, : old_NKLC.shape[2]] = old_NKLC
        return room


def grouped_sdpa(
    q_NHLC: Tensor, k_NKLC: Tensor, v_NKLC: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Scaled dot-product attention, H a multiple of K; causal without a mask (bool, broadcastable
    to [N, H, L, L']).
    """
    N, H, L, C = q_NHLC.shape
    group = H // k_NKLC.shape[1]
    # decoding: a group's heads become its queries, and the cache is read without a copy
    if L == 1 and group > 1:
        q_NKGC = q_NHLC.reshape(N, -1, group, C)
        return F.scaled_dot_product_attention(
            q_NKGC, k_NKLC, v_NKLC, attn_mask=mask, scale=scale
        ).reshape(N, H, 1, C)
    # on CUDA only the slow math kernel takes a mask and grouped heads together
    if mask is not None and group > 1:
        k_NKLC, v_NKLC = (x.repeat_interleave(group, dim=1) for x in (k_NKLC, v_NKLC))
        group = 1
    return F.scaled_dot_product_attention(
        q_NHLC,
        k_NKLC,
        v_NKLC,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=group > 1,
    )


class MaskedSDPA(Module):
    """Inner attention with a dense mask and a KV cache, in place of FlexAttention, which has no CPU
    backward.

    torchtitan's tensor-parallel layout is keyed by the forward's argument names.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()
        self.cache: KVCache | None = None

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks=None, scale=None, **_):
        q_NHLC, k_NKLC, v_NKLC = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        if self.cache is not None:
            k_NKLC, v_NKLC = self.cache.append(k_NKLC, v_NKLC)
        return grouped_sdpa(q_NHLC, k_NKLC, v_NKLC, attention_masks, scale).transpose(1, 2)


class CachedFlexAttention(FlexAttention):
    """FlexAttention (CUDA); it decodes like MaskedSDPA when it holds a cache."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def __init__(self, config: Config):
        super().__init__(config)
        self.cache: KVCache | None = None

    def forward(self, q_BLNH, k_BLNH, v_BLNH, **kwargs):
        if self.cache is None:
            return super().forward(q_BLNH, k_BLNH, v_BLNH, **kwargs)
        return MaskedSDPA.forward(self, q_BLNH, k_BLNH, v_BLNH, **kwargs)


def native_obstacle(config: PreTrainedConfig, attention: str) -> str | None:
    """Why torchtitan's own modules would not compute this model exactly, or None."""
    kind, rope = config.model_type, dict(getattr(config, "rope_parameters", None) or {})
    if kind not in NATIVE:
        return f"knows {', '.join(NATIVE)} and not {kind!r}"
    scalings = {"qwen3": ("default",), "llama": ("default", "llama3")}[kind]
    if rope.get("rope_type", "default") not in scalings:
        return f"has no rope type {rope['rope_type']!r} for {kind} (it has {', '.join(scalings)})"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotates whole heads only (partial_rotary_factor is not 1)"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "has no biases in attention and MLP"
    if config.hidden_act != "silu":
        return f"has the activation 'silu' and not {config.hidden_act!r}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "has no sliding-window attention"
    if attention == "flash_attention_2":
        return f"has no attention {attention!r}"
    return None


def _rope(config: PreTrainedConfig, head_dim: int):
    params = config.rope_parameters
    common = dict(
        dim=head_dim, max_seq_len=config.max_position_embeddings, theta=params["rope_theta"]
    )
    if config.model_type == "qwen3":
        return CosSinRoPE.Config(**common)
    if params.get("rope_type", "default") == "default":
        return ComplexRoPE.Config(**common)
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return ComplexRoPE.Config(
        **common,
        scaling="llama",
        scaling_factor=params["factor"],
        **{name: params[name] for name in names},
    )


def native_model(
    config: PreTrainedConfig, attention: str
) -> tuple[BaseModel.Config, type[NativeAdapter]]:
    """torchtitan's model config and state-dict adapter; only where native_obstacle is None."""
    model_class, block_class, adapter = NATIVE[config.model_type]
    D, V, H = config.hidden_size, config.vocab_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or D // H
    init = {
        "weight": partial(nn.init.normal_, std=config.initializer_range),
        "bias": nn.init.zeros_,
    }

    def norm(size: int) -> RMSNorm.Config:
        return RMSNorm.Config(
            normalized_shape=size, eps=config.rms_norm_eps, param_init={"weight": nn.init.ones_}
        )

    inner_attention = CachedFlexAttention.Config if attention == "flex" else MaskedSDPA.Config

    def block():
        inner = make_gqa_config(
            dim=D,
            n_heads=H,
            n_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            wqkv_param_init=init,
            wo_param_init=init,
            rope=_rope(config, head_dim),
            inner_attention=inner_attention(),
            qk_norm=norm(head_dim) if config.model_type == "qwen3" else None,
            # the fused form gathers q, k and v, replicated, inside its state_dict hooks
            fuse_qkv=False,
        )
        ffn = make_ffn_config(
            dim=D, hidden_dim=config.intermediate_size, w1_param_init=init, w2w3_param_init=init
        )
        return block_class.Config(
            attention_norm=norm(D), ffn_norm=norm(D), attention=inner, feed_forward=ffn
        )

    tied = bool(config.tie_word_embeddings)
    embedding = Embedding.Config(
        num_embeddings=V, embedding_dim=D, param_init={"weight": skip_param_init} if tied else init
    )
    return model_class.Config(
        dim=D,
        vocab_size=V,
        norm=norm(D),
        enable_weight_tying=tied,
        tok_embeddings=embedding,
        layers=[block() for _ in range(config.num_hidden_layers)],
        lm_head=Linear.Config(in_features=D, out_features=V, param_init=init),
    ), adapter
