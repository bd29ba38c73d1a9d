"""Tiny random models of every family of causal language models that transformers has, for
model_scan.py: a config of 2 to 4 layers of width 64, vocabulary 512.

    make_model(family, folder)   a folder as save_pretrained writes it, with random weights
"""

from pathlib import Path
from typing import Any

import torch

VOCAB = 512
# What many families call the same; a config takes those that it has.
TINY: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    # large, so that a wrong forward moves the logits
    initializer_range=0.2,
    sliding_window=8,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    n_group=1,
    topk_group=1,
    num_expert_group=1,
    first_k_dense_replace=1,
    # latent attention
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    # linear attention and state spaces
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    state_size=8,
    mamba_d_state=8,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=8,
    n_groups=1,
    chunk_size=8,
    mamba_chunk_size=8,
)
# What a family needs beside or instead.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": dict(num_dense_layers=1, global_attn_every_n_layers=2),
    "apertus": {},
    "arcee": {},
    "bamba": dict(attn_layer_indices=[1], mamba_expand=2),
    "biogpt": {},
    "bitnet": {},
    "bloom": dict(n_head=4),
    "codegen": dict(n_embd=64, n_head=4, n_layer=2, rotary_dim=8, n_inner=96, n_positions=256),
    "cohere": {},
    "cohere2": {},
    "cwm": {},
    "dbrx": dict(
        d_model=64,
        n_heads=4,
        n_layers=2,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, hidden_size=64),
    ),
    "deepseek_v2": dict(num_key_value_heads=4, head_dim=8),
    "deepseek_v3": dict(num_hidden_layers=3, num_key_value_heads=4, head_dim=8),
    "diffllama": {},
    "doge": {},
    "dots1": dict(num_hidden_layers=3),
    "ernie4_5": {},
    "ernie4_5_moe": dict(moe_layer_start_index=1, moe_layer_end_index=1),
    "exaone": {},
    "exaone4": dict(num_hidden_layers=4, sliding_window_pattern=4),
    "exaone_moe": {},
    "falcon": dict(num_kv_heads=2, new_decoder_architecture=True),
    "falcon_h1": dict(mamba_d_ssm=128),
    "falcon_mamba": dict(time_step_rank=4),
    "flex_olmo": {},
    "gemma": {},
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": dict(
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
    ),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        altup_num_inputs=2,
        laurel_rank=8,
        intermediate_size=[96] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "glm": {},
    "glm4": {},
    "glm4_moe": dict(num_hidden_layers=3),
    "glm4_moe_lite": dict(num_hidden_layers=3, num_key_value_heads=4),
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": dict(rotary_dim=8),
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"], mamba_expand=2, num_hidden_layers=2
    ),
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=[2, 2]),
    "jais2": {},
    "jamba": dict(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_dt_rank=4,
    ),
    "jetmoe": dict(kv_channels=16, num_key_value_heads=2),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama": {},
    "llama4_text": dict(
        num_hidden_layers=4, intermediate_size_mlp=96, attention_chunk_size=64, moe_layers=[1, 3]
    ),
    "longcat_flash": dict(
        num_layers=2,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=32,
        zero_expert_num=1,
        num_key_value_heads=4,
        head_dim=8,
    ),
    "mamba": dict(time_step_rank=4),
    "mamba2": dict(num_heads=8, head_dim=16),
    "minimax": dict(layer_types=["linear_attention", "full_attention"], block_size=8),
    "minimax_m2": dict(rotary_dim=8),
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "mpt": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=256),
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention", "moe", "attention"],
        num_hidden_layers=4,
        moe_shared_expert_intermediate_size=32,
    ),
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "olmoe": {},
    "openai-gpt": {},
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64),
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": dict(layer_types=["linear_attention", "full_attention"]),
    "qwen3_5_moe_text": dict(layer_types=["linear_attention", "full_attention"]),
    "qwen3_moe": {},
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention"]),
    "recurrent_gemma": dict(
        num_hidden_layers=3, lru_width=64, attention_window_size=16, num_key_value_heads=1
    ),
    "rwkv": dict(attention_hidden_size=64, context_length=256),
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": dict(layer_types=["sliding_attention", "full_attention"]),
    "xglm": dict(d_model=64, ffn_dim=96, num_layers=2, attention_heads=4),
    "xlstm": dict(
        num_heads=4,
        embedding_dim=64,
        qk_dim_factor=1.0,
        v_dim_factor=1.0,
        chunkwise_kernel="chunkwise--native_autograd",
    ),
    "youtu": dict(num_key_value_heads=4, head_dim=8),
    "zamba": dict(
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_hidden_layers=4,
        mamba_dt_rank=4,
        n_mamba_heads=2,
    ),
    "zamba2": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        mamba_ngroups=1,
        n_mamba_heads=8,
        use_long_context=False,
    ),
}
# Folders whose language model is a part: what its text config needs beside TINY.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": FAMILIES["gemma3_text"],
    "llama4": FAMILIES["llama4_text"],
    "mistral3": {},
    "qwen2_vl": dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3])),
    "qwen2_5_vl": dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3])),
    "qwen3_vl": dict(rope_parameters=dict(rope_type="default", mrope_section=[4, 2, 2])),
    "qwen3_5": FAMILIES["qwen3_5_text"],
}
TINY_VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_heads=2,
    depth=1,
    embed_dim=32,
    image_size=28,
    patch_size=14,
    out_hidden_size=64,
    projector_input_dim=32,
    projector_output_dim=32,
    vision_output_dim=32,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
    fullatt_block_indexes=[0],
)


def tiny_config(family: str) -> Any:
    """The family's config: TINY where it has the name, FAMILIES over it."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    if family not in MULTIMODAL:
        return _tiny(kind, TINY, FAMILIES.get(family, {}))
    known = kind()
    text = _tiny(type(known.text_config), TINY, MULTIMODAL[family])
    vision = _tiny(type(known.vision_config), TINY_VISION, {})
    parts = dict(text_config=text.to_dict(), vision_config=vision.to_dict())
    if hasattr(known, "mm_tokens_per_image"):
        parts["mm_tokens_per_image"] = 4
    return kind(**parts)


def _tiny(kind: Any, values: dict[str, Any], more: dict[str, Any]) -> Any:
    known = kind()
    computed = {k for k in values if isinstance(getattr(kind, k, None), property)}
    kept = {k: v for k, v in values.items() if hasattr(known, k) and k not in computed}
    return kind(**kept | more)


def tiny_model(family: str) -> Any:
    """Of a multimodal folder the whole of it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    return auto.from_config(tiny_config(family), dtype=torch.float32)


def make_model(family: str, folder: Path, seed: int = 0) -> None:
    """A random checkpoint. Vectors are moved: norms of ones would hide a norm that is not used."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny_model(family)
        size = sum(w.numel() for w in model.parameters())
        if size > 3e6:
            raise ValueError(f"{family}: {size:,} parameters; want a tiny model")
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
