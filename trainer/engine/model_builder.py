"""Models for torchtitan: a Hugging Face folder in, a sharded decoder out whose head is applied
separately.

    build_spec      folder -> ModelSpec: torchtitan's own modules for dense qwen3 and llama,
                    transformers' for the rest
    parallelize     TP (native), activation checkpointing, compile, FSDP2/HSDP; the head is a group
                    of its own
    hidden_states   the forward without the head; packed documents do not see each other
    head_weight, open_head, logit_softcap, logit_scale
                    what a fused loss needs: logits = cap * tanh(z / cap), z = scale * hidden @ head.T  (no
                    cap: z)

Why the head is an FSDP group of its own: torchtitan groups it with the final norm and runs it after
the root's forward. torch 2.11 does not support a group of which only a part ran (the norm's
backward reads freed memory), and a fused loss, which takes the head as a matrix, must gather the
head and nothing else.

Shapes: N rows, L row length, D hidden size, V vocabulary, H query heads, K key heads, C head size.
"""

# ruff: noqa: E402  install() has to run between the imports
from . import compat

compat.install()

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import get_fsdp_reshard_after_forward_policy
from torchtitan.models.common.attention import FlexAttention
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools import utils
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .native_models import MaskedSDPA, native_model, native_obstacle  # noqa: F401  MaskedSDPA for its users

CUDA_ONLY = ("flex", "flash_attention_2")


# Specs


def text_config(path: str) -> PreTrainedConfig:
    """The folder's language-model config (of a multimodal model: its text part)."""
    config = AutoConfig.from_pretrained(path)
    return config if hasattr(config, "num_hidden_layers") else config.text_config


def build_spec(path: str, *, backend: str = "auto", attention: str = "auto") -> ModelSpec:
    """torchtitan's description of the causal language model in the Hugging Face folder `path`.

    backend: "native" (torchtitan's modules: TP, Flex), "hf" (transformers' modules: any dense
    decoder, FSDP2 only), or "auto", native wherever it computes the same function. attention:
    "auto" is "sdpa" ("eager" for the few models of transformers without it, such as Gemma 2);
    "flex" (native) and "flash_attention_2" (hf) need CUDA. ValueError for an unknown or impossible
    choice and for models that neither back end computes exactly.
    """
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
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path}: no config.json there; want a local Hugging Face model folder")
    config = text_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{path}: the weights are quantised; want float32, float16 or bfloat16 safetensors"
        )
    obstacle = native_obstacle(config, attention)
    if backend == "native" and obstacle:
        raise ValueError(f"{path}: backend 'native' {obstacle}; use backend = 'hf' or 'auto'")
    native = backend == "native" or backend == "auto" and not obstacle
    if not native and attention == "flex":
        raise ValueError(
            f"{path}: attention 'flex' is for backend 'native', which "
            f"{obstacle or 'was not chosen'}; use 'sdpa' or 'flash_attention_2'"
        )
    model, adapter = (
        native_model(config, attention)
        if native
        else (
            HFDecoder.Config(path=path, attention=None if attention == "auto" else attention),
            HFAdapter,
        )
    )
    return ModelSpec(
        name="native" if native else "hf",
        flavor=os.path.basename(os.path.normpath(path)),
        model=model,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=adapter,
    )


# Models of transformers


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
        return dict(self.decoder.layers.named_children())

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


# Sharding


def parallelize(
    model, *, parallel_dims, training, parallelism, compile_config, ac_config, dump_folder
):
    """torchtitan's parallelize_fn for every model here: TP (native), activation checkpointing,
    compile, FSDP2/HSDP.

    Gradients are summed over ranks: a loss divides by its global token count, once.
    ValueError for context, pipeline and expert parallelism, and for TP with the Hugging Face
    backend.
    """
    if parallel_dims.cp_enabled or parallel_dims.pp_enabled or parallel_dims.ep_enabled:
        raise ValueError(
            "parallelism: context, pipeline or expert parallel degree above 1; want data and "
            "tensor parallelism only"
        )
    body = model.decoder if isinstance(model, HFDecoder) else model
    if parallel_dims.tp_enabled:
        if isinstance(model, HFDecoder):
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {parallel_dims.tp} with the backend 'hf'; "
                "want 1, or a model that the backend 'native' supports"
            )
        model.parallelize(parallel_dims)
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(body)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(body, compile_config=compile_config, parallel_dims=parallel_dims)
    axes = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    _shard(model, parallel_dims.get_mesh(axes), training, parallelism.fsdp_reshard_after_forward)
    return model


def _shard(model, mesh, training, policy: str) -> None:
    """FSDP2 groups: embedding, each block, head (with a tied embedding); the root keeps the final
    norm.
    """
    options = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            cast_forward_inputs=False,
        ),
    )
    # it pins memory, which CPU builds cannot
    if training.enable_cpu_offload and utils.device_type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    for modules, reshard in _units(model, policy):
        fully_shard(modules, **options, reshard_after_forward=reshard)
    fully_shard(model, **options)
    for unit in fsdp_units(model):
        unit.set_gradient_divide_factor(1.0)
        # a factor of 1.0 alone reduces with PREMUL_SUM; gloo has none
        unit.set_force_sum_reduction_for_comms(True)


def _units(model, policy: str) -> list[tuple[nn.Module | list[nn.Module], bool]]:
    """FSDP groups below the root, each with its reshard_after_forward under torchtitan's policy
    word.
    """
    blocks = get_fsdp_reshard_after_forward_policy(policy, pp_enabled=False)
    head = policy == "always"  # otherwise the backward follows at once and would gather it again
    if model.enable_weight_tying:
        ends = [([model.tok_embeddings, model.lm_head], head)]
    else:
        ends = [(model.tok_embeddings, blocks), (model.lm_head, head)]
    return ends + [(block, blocks) for block in model.layers.values()]


def restore_reshard(model, policy: str) -> None:
    """Set every group's reshard_after_forward as `parallelize` did; FSDP2 has a setter and no
    getter.
    """
    model.set_reshard_after_forward(False, recurse=False)
    for modules, reshard in _units(model, policy):
        for module in modules if isinstance(modules, list) else [modules]:
            module.set_reshard_after_forward(reshard, recurse=False)


def fsdp_units(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# Forward without the head, and the head


def document_mask(positions_NL: Tensor, *, packed: bool) -> Tensor | None:
    """bool [N, 1, L, L], true where query i may see key j: j <= i and both in one document. None
    unless packed.

    A document starts wherever a position is 0. Padding with position 0 makes one-token documents,
    so that no softmax row is empty. `packed` is the caller's knowledge: looking would be a host
    sync.
    """
    if not packed:
        return None
    document_NL = (positions_NL == 0).cumsum(1)
    L = positions_NL.shape[1]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=positions_NL.device).tril()
    return ((document_NL[:, :, None] == document_NL[:, None, :]) & causal_LL)[:, None]


def _plain(x: Tensor) -> Tensor:
    """The whole of a tensor-parallel tensor; the gradient goes back to its shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextlib.contextmanager
def head_skipped(model):
    before, model._skip_lm_head = model._skip_lm_head, True
    try:
        yield
    finally:
        model._skip_lm_head = before


def hidden_states(
    model,
    ids_NL: Tensor,
    positions_NL: Tensor,
    *,
    packed: bool = False,
    mask_NL: Tensor | None = None,
) -> Tensor:
    """The last hidden states [N, L, D], after the final norm and before the head, in the compute
    dtype. Collective.

    positions_NL: int64, 0, 1, ... within each document. packed: some row holds more than one
    document. mask_NL: bool, false for padding (on either side, of any position); its hidden states
    mean nothing.
    """
    if mask_NL is not None:
        # padding: documents of one token
        positions_NL, packed = positions_NL.masked_fill(~mask_NL, 0), True
    with head_skipped(model):
        if isinstance(model, HFDecoder):
            return model(ids_NL, positions=positions_NL, packed=packed)
        flex = isinstance(model.config.first_attention.inner_attention, FlexAttention.Config)
        masks = (
            model.get_attention_masks(positions_NL)
            if flex
            else document_mask(positions_NL, packed=packed)
        )
        return _plain(model(ids_NL, positions=positions_NL, attention_masks=masks))


def head_weight(model) -> Tensor:
    """Gather the head's FSDP group; its plain [V, D] weight, for a fused loss. Collective.

    The backward frees it again (see open_head for a forward alone). Under tensor parallelism the
    vocabulary shards are gathered too: every rank of a tensor-parallel group computes the same loss
    on the same rows.
    """
    if isinstance(model.lm_head, FSDPModule):
        model.lm_head.unshard()
    return _plain(model.lm_head.weight)


@contextlib.contextmanager
def open_head(model):
    """The plain [V, D] head weight, without gradient, held gathered inside. Collective on entry."""
    weight_VD = head_weight(model).detach()
    try:
        yield weight_VD
    finally:
        if isinstance(model.lm_head, FSDPModule):
            model.lm_head.reshard()


def logit_softcap(model) -> float | None:
    """The cap of cap * tanh(z / cap) on the logits (Gemma 2), or None."""
    return (
        getattr(model.hf.config, "final_logit_softcapping", None)
        if isinstance(model, HFDecoder)
        else None
    )


def logit_scale(model) -> float:
    """The factor on hidden @ head.T: Cohere's logit_scale, 1 / Granite's logits_scaling,
    Falcon-H1's lm_head_multiplier.
    """
    config = model.hf.config if isinstance(model, HFDecoder) else None
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def head_logits(model, hidden_NLD: Tensor) -> Tensor:
    """Logits [N, L, V] in the compute dtype, by the model's own head module, scale and cap."""
    logits_NLV = _plain(model.lm_head(hidden_NLD))
    scale, cap = logit_scale(model), logit_softcap(model)
    if scale != 1.0:
        logits_NLV = logits_NLV * scale
    return logits_NLV if cap is None else torch.tanh(logits_NLV / cap) * cap
