"""What a run will hold on one rank, from config.json alone: models on the meta device, then bytes
by role and moment.

A plan, not a measurement: exact for weights, gradients and moments, an upper estimate for the rest.
Shapes: D hidden, V vocabulary, H query heads, K key heads, C head size, F inner size of the MLP.
"""

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reflux.kernels.linear_kl import linear_kl
from reflux.trainer.config.schema import Config
from reflux.trainer.engine.hf_models import text_config
from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.engine.native_models import native_obstacle

from .checks import Role

BYTES = {"float32": 4, "bfloat16": 2}
# [rows, V] fp32 buffers of the hungriest fused loss (linear_kl without its row kernel)
WORKSPACE_BUFFERS = 8
# per row and vocabulary entry: fp32 logits and log-probabilities, fp64 probabilities and their sums
SAMPLER_BYTES = 24


# Shapes, without weights


@dataclass(frozen=True, eq=False)
class Shape:
    """A role's model on the meta device. `why` says why this back end."""

    role: Role
    spec: Any
    config: Any  # transformers' config of the language model
    sizes: tuple[tuple[int, ...], ...]  # of every parameter; a tied head counts once
    block: int  # parameters of the largest block
    ends: int  # parameters of embedding and head
    why: str

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.sizes))

    @property
    def head_dim(self) -> int:
        c = self.config
        return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def layer_bytes(self, dtype: str) -> int:
        """What the backward of one block keeps per token, at most: inputs of every matmul and gate
        in the compute dtype; RoPE and query/key norms in fp32, and transformers' other norms too.
        Fitted to five architectures, within 1 to 2.
        """
        c, native = self.config, self.spec.name == "native"
        heads = (c.num_attention_heads + c.num_key_value_heads) * self.head_dim
        narrow = 4 * c.intermediate_size + (3 if native else 5) * c.hidden_size + 2 * heads
        return BYTES[dtype] * narrow + 4 * (5 * heads if native else 3 * heads + 8 * c.hidden_size)

    @property
    def cache_values(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.head_dim


def build_shape(role: Role) -> Shape:
    """ValueError as from build_spec. An attention that needs CUDA is replaced where there is none:
    shapes are the same.
    """
    path, backend, attention = (
        os.path.expanduser(role.model.path),
        role.model.backend,
        role.model.attention,
    )
    config = text_config(path)
    obstacle = native_obstacle(config, attention)
    if attention in ("flex", "flash_attention_2") and not torch.cuda.is_available():
        backend, attention = "hf" if obstacle and backend == "auto" else backend, "auto"
    spec = build_spec(path, backend=backend, attention=attention)
    with torch.device("meta"):
        model = spec.model.build()
    sizes = tuple(tuple(p.shape) for p in model.parameters())
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers.values())
    ends = sum(
        p.numel()
        for p in {
            id(p): p for m in (model.tok_embeddings, model.lm_head) for p in m.parameters()
        }.values()
    )
    why = (
        f"backend = {role.model.backend!r}"
        if role.model.backend != "auto"
        else (
            "computes it exactly"
            if spec.name == "native"
            else f"native {obstacle or 'was not chosen'}"
        )
    )
    return Shape(role, spec, config, sizes, block, ends, why)


# Memory per rank


@dataclass(frozen=True)
class Ranks:
    """Degrees of the meshes; data = ranks that see different prompts."""

    shard: int
    replicate: int
    tensor: int
    world: int

    @property
    def data(self) -> int:
        return self.shard * self.replicate


def plan_ranks(parallelism: Any, world: int) -> Ranks:
    """The mesh of this job; one process stands for the world that data_parallel_shard_degree asks
    for.

    ValueError when a real world (more than one process) does not fit the degrees.
    """
    p = parallelism
    replicate, tensor, shard = (
        p.data_parallel_replicate_degree,
        p.tensor_parallel_degree,
        p.data_parallel_shard_degree,
    )
    if shard < 0:
        shard = max(world // (replicate * tensor), 1)
    total = replicate * tensor * shard
    if world > 1 and total != world:
        raise ValueError(
            f"parallelism: replicate {replicate} x shard {shard} x tensor {tensor} = {total} "
            f"ranks, but WORLD_SIZE is {world}; make the product equal, or leave "
            "data_parallel_shard_degree at -1"
        )
    return Ranks(shard, replicate, tensor, total)


def shard_numel(sizes: Sequence[tuple[int, ...]], ranks: Ranks) -> int:
    """Parameters of the fullest rank: FSDP2 cuts each along its first dimension, in equal blocks of
    whole rows.
    """

    def own(size: tuple[int, ...]) -> int:
        rows = math.ceil(size[0] / ranks.tensor) if len(size) > 1 else size[0]
        return math.ceil(rows / ranks.shard) * math.prod(size[1:])

    return sum(map(own, sizes))


@dataclass(frozen=True)
class Part:
    """Bytes on one rank. `when`: always, sample, step; `host`: in host memory."""

    role: str
    what: str
    bytes: int
    when: str = "always"
    host: bool = False


def memory_parts(cfg: Config, training: Any, ranks: Ranks, shapes: Sequence[Shape]) -> list[Part]:
    """What every rank holds: always, while sampling, and while a step runs."""
    found = []
    for shape in shapes:
        found += (
            _trained(cfg, training, ranks, shape) if shape.role.trained else _frozen(ranks, shape)
        )
    samplers = [s for s in shapes if s.role.name in _samplers(cfg)]
    found += [part for s in samplers for part in _sampling(cfg, training, ranks, s)]
    if shapes[0].role.trained:
        found += _stepping(cfg, training, ranks, shapes)
    return found


def _trained(cfg: Config, training: Any, ranks: Ranks, shape: Shape) -> list[Part]:
    own, size, host = (
        shard_numel(shape.sizes, ranks),
        BYTES[training.dtype],
        training.enable_cpu_offload,
    )
    name = shape.role.name
    return [
        Part(name, f"master weights, {training.dtype}", own * size, host=host),
        Part(name, "AdamW moments", 2 * own * size, host=host),
        Part(name, "gradients", own * size, "always" if host else "step", host),
    ]


def _frozen(ranks: Ranks, shape: Shape) -> list[Part]:
    dtype = (
        shape.role.model.dtype
        if shape.role.table != "model" or shape.role.name == "reference"
        else "float32"
    )
    return [
        Part(
            shape.role.name,
            f"weights, {dtype}",
            shard_numel(shape.sizes, ranks) * BYTES[dtype],
            host=shape.role.model.offload,
        )
    ]


def _samplers(cfg: Config) -> set[str]:
    """Roles that write texts in this run."""
    found = {"policy", "model"}
    if cfg.distill.on_policy > 0 or cfg.eval.source:
        found.add("student")
    if cfg.distill.on_policy < 1 and cfg.distill.source == "teacher":
        found.add("teacher")
    return found


def _compute_dtype(training: Any, shape: Shape) -> str:
    return (
        shape.role.model.dtype if shape.role.name == "teacher" else training.mixed_precision_param
    )


def _sampling(cfg: Config, training: Any, ranks: Ranks, shape: Shape) -> list[Part]:
    size, r = BYTES[_compute_dtype(training, shape)], cfg.rollout
    rows = min(r.rows, max(r.prompts * r.group // ranks.data, 1))
    name, vocabulary = shape.role.name, shape.config.vocab_size
    return [
        Part(name, "gathered copy", shape.numel // ranks.tensor * size, "sample"),
        Part(
            name,
            f"KV cache, {rows} rows",
            rows * training.seq_len * shape.cache_values * size,
            "sample",
        ),
        Part(name, "sampler's logits", rows * vocabulary * SAMPLER_BYTES, "sample"),
    ]


def _stepping(cfg: Config, training: Any, ranks: Ranks, shapes: Sequence[Shape]) -> list[Part]:
    own, size = shapes[0], BYTES[training.mixed_precision_param]
    tokens, (none, full) = (
        max(cfg.batch.tokens, training.seq_len),
        activation_bytes(cfg, training, own),
    )
    open_ = own.block + own.ends
    head = own.config.vocab_size * own.config.hidden_size
    limit = int(inspect.signature(linear_kl).parameters["workspace_mb"].default * 2**20)
    frozen = shapes[1:]
    parts = [
        Part(own.role.name, "open block and head with gradients", open_ * (2 * size + 4), "step"),
        Part(own.role.name, "head gradient of the fused loss, fp32", head * 4, "step"),
        Part(
            "kernels",
            "logits in chunks",
            min(limit, WORKSPACE_BUFFERS * tokens * own.config.vocab_size * 4),
            "step",
        ),
        Part(
            own.role.name,
            f"activations, {tokens} tokens, checkpoint {cfg.activation_checkpoint}",
            full if cfg.activation_checkpoint == "full" else none,
            "step",
        ),
    ]
    if frozen:
        passing = max(
            BYTES[s.role.model.dtype] * (s.block + s.ends)
            + tokens * s.layer_bytes(s.role.model.dtype)
            for s in frozen
        )
        parts.append(Part("frozen", "open block, head and one layer's values", passing, "step"))
    return parts


def activation_bytes(cfg: Config, training: Any, shape: Shape) -> tuple[int, int]:
    """Without and with full activation checkpointing, for one micro-batch; "selective" lies
    between.
    """
    tokens = max(cfg.batch.tokens, training.seq_len)
    size, layers = BYTES[training.mixed_precision_param], shape.config.num_hidden_layers
    layer = tokens * shape.layer_bytes(training.mixed_precision_param)
    return layers * layer, layers * tokens * shape.config.hidden_size * size + layer


def totals(parts: Sequence[Part]) -> dict[str, int]:
    """Device bytes always held, and at the peak of sampling and of a step; host bytes."""
    device = {
        when: sum(p.bytes for p in parts if p.when == when and not p.host)
        for when in ("always", "step")
    }
    sampling = [
        sum(p.bytes for p in parts if p.when == "sample" and p.role == name)
        for name in {p.role for p in parts}
    ]
    return {
        "always": device["always"],
        "while sampling": device["always"] + max(sampling, default=0),
        "while a step runs": device["always"] + device["step"],
        "host": sum(p.bytes for p in parts if p.host),
    }
