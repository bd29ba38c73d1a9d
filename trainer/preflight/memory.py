"""What a run will hold on one rank, in bytes by role and moment.

A plan, not a measurement: exact for weights, gradients and moments, an upper estimate for the rest.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reflux.kernels.linear_kl import linear_kl
from reflux.trainer.config.schema import Config

from .shapes import BYTES, Shape

# [rows, V] fp32 buffers of the hungriest fused loss (linear_kl without its row kernel)
WORKSPACE_BUFFERS = 8
# per row and vocabulary entry: fp32 logits and log-probabilities, fp64 probabilities and their sums
SAMPLER_BYTES = 24


# a weight of a quantised model: int8 with an fp32 scale a row; 4 bits with an fp32 scale for 64
PACKED_BYTES = {"int8": 1 + 4 / 1024, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class RankPlan:
    """Degrees of the meshes; data = ranks that see different prompts."""

    shard: int
    replicate: int
    tensor: int
    world: int

    @property
    def data(self) -> int:
        return self.shard * self.replicate


def plan_ranks(parallelism: Any, world: int) -> RankPlan:
    """The mesh of this job; `world` is the number of its processes.

    One process plans for the world that the degrees describe. ValueError where more than one
    process does not fit them.
    """
    replicate = parallelism.data_parallel_replicate_degree
    shard = parallelism.data_parallel_shard_degree
    tensor = parallelism.tensor_parallel_degree
    if shard < 0:
        shard = max(world // (replicate * tensor), 1)
    total = replicate * tensor * shard
    if world > 1 and total != world:
        raise ValueError(
            f"parallelism: replicate {replicate} x shard {shard} x tensor {tensor} = {total} "
            f"ranks, but WORLD_SIZE is {world}; make the product equal, or leave "
            "data_parallel_shard_degree at -1"
        )
    return RankPlan(shard, replicate, tensor, total)


def shard_numel(sizes: Sequence[tuple[int, ...]], ranks: RankPlan) -> int:
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


def memory_parts(
    cfg: Config, training: Any, ranks: RankPlan, shapes: Sequence[Shape]
) -> list[Part]:
    """What every rank holds: always, while sampling, and while a step runs."""
    parts = []
    shapes = [s for s in shapes if not s.role.elsewhere]
    for s in shapes:
        parts += _trained(training, ranks, s) if s.role.trained else _frozen(ranks, s)
    for s in shapes:
        parts += _sampling(cfg, training, ranks, s) if s.role.samples else []
    if shapes[0].role.trained:
        parts += _stepping(cfg, training, shapes)
    return parts


def _trained(training: Any, ranks: RankPlan, shape: Shape) -> list[Part]:
    """Every weight, or with [lora] the frozen ones in the compute dtype and the adapters."""
    name, host, parts = shape.role.name, training.enable_cpu_offload, []
    weights = shard_numel(shape.sizes, ranks) * BYTES[training.dtype]
    what = "master weights"
    if shape.adapters:
        dtype = training.mixed_precision_param
        frozen = shard_numel(shape.sizes, ranks) * BYTES[dtype]
        parts.append(Part(name, f"frozen weights, {dtype}", frozen, host=host))
        weights = shard_numel(shape.adapters, ranks) * BYTES[training.dtype]
        what = "adapters"
    parts += [
        Part(name, f"{what}, {training.dtype}", weights, host=host),
        Part(name, "AdamW moments", 2 * weights, host=host),
        Part(name, "gradients", weights, "always" if host else "step", host),
    ]
    if not training.sync_every_microbatch:
        numel = sum(map(math.prod, shape.adapters)) or shape.numel
        whole = numel // ranks.tensor * BYTES[training.mixed_precision_reduce]
        parts.append(Part(name, "gradients, whole between micro-batches", whole, "step"))
    return parts


def _frozen(ranks: RankPlan, shape: Shape) -> list[Part]:
    model, name = shape.role.model, shape.role.name
    if shape.role.shared:
        return [Part(name, "the policy's weights, adapters off", 0)]
    if model.quantization != "none":
        return [Part(name, f"weights, {model.quantization}, whole on every rank", _packed(shape))]
    weights = shard_numel(shape.sizes, ranks) * BYTES[model.dtype]
    return [Part(name, f"weights, {model.dtype}", weights, host=model.offload)]


def _packed(shape: Shape) -> int:
    """Of a quantised model: its linear layers but the head, and the rest in the role's dtype."""
    model = shape.role.model
    linear = sum(map(math.prod, shape.linear))
    rest = (shape.numel - linear) * BYTES[model.dtype]
    return rest + math.ceil(linear * PACKED_BYTES[model.quantization])


def _sampling(cfg: Config, training: Any, ranks: RankPlan, shape: Shape) -> list[Part]:
    role, r = shape.role, cfg.rollout
    if role.own and r.engine != "embedded":
        return _engine(cfg, training, shape) if r.engine == "vllm" else []
    size = BYTES[training.mixed_precision_param if role.own else role.model.dtype]
    rows = min(r.rows, max(r.prompts * r.group // ranks.data, 1))
    cache = rows * training.seq_len * shape.cache_values * size
    logits = rows * shape.config.vocab_size * SAMPLER_BYTES
    return [
        Part(role.name, "gathered copy", shape.numel // ranks.tensor * size, "sample"),
        Part(role.name, f"KV cache, {rows} rows", cache, "sample"),
        Part(role.name, "sampler's logits", logits, "sample"),
    ]


def _engine(cfg: Config, training: Any, shape: Shape) -> list[Part]:
    """What vLLM holds beside the shards; its cache takes what gpu_memory_fraction leaves, at most
    this.
    """
    name, r = shape.role.name, cfg.rollout
    size = BYTES[training.mixed_precision_param]
    cache = r.max_running * training.seq_len * shape.cache_values * size
    return [
        Part(name, "vLLM's weights", shape.numel * size // r.tensor_parallel, "sample"),
        Part(name, f"its cache, {r.max_running} rows", cache // r.tensor_parallel, "sample"),
    ]


def _stepping(cfg: Config, training: Any, shapes: Sequence[Shape]) -> list[Part]:
    own, frozen = shapes[0], shapes[1:]
    name, checkpoint = own.role.name, cfg.activation_checkpoint
    tokens = max(cfg.batch.tokens, training.seq_len)
    # weights and gradients in the compute dtype, and the fp32 ones that are summed over ranks
    trained = 1 if own.adapters else 2
    opened = (own.block + own.ends) * trained * BYTES[training.mixed_precision_param]
    head = 0
    if not own.adapters:
        opened += (own.block + own.ends) * 4
        head = own.config.vocab_size * own.config.hidden_size * 4
    none, full = activation_bytes(cfg, training, own)
    activations = full if checkpoint == "full" else none
    parts = [
        Part(name, "open block and head", opened, "step"),
        Part(name, "head gradient of the fused loss, fp32", head, "step"),
        Part("kernels", "logits in chunks", _workspace(tokens, own), "step"),
        Part(name, f"activations, {tokens} tokens, checkpoint {checkpoint}", activations, "step"),
    ]
    if frozen:
        passing = max(_passing(s, tokens) for s in frozen)
        parts.append(Part("frozen", "open block, head and one layer's values", passing, "step"))
    return parts


def _workspace(tokens: int, shape: Shape) -> int:
    """Of the fused losses."""
    limit = inspect.signature(linear_kl).parameters["workspace_mb"].default * 2**20
    return min(int(limit), WORKSPACE_BUFFERS * tokens * shape.config.vocab_size * 4)


def _passing(shape: Shape, tokens: int) -> int:
    """Of one frozen model while it is read."""
    model = shape.role.model
    size, values = BYTES[model.dtype], tokens * shape.layer_bytes(model.dtype)
    if model.quantization != "none":  # one layer at a time is unpacked
        return size * max(map(math.prod, shape.linear)) + values
    return size * (shape.block + shape.ends) + values


def activation_bytes(cfg: Config, training: Any, shape: Shape) -> tuple[int, int]:
    """Of one micro-batch, without and with full activation checkpointing."""
    tokens = max(cfg.batch.tokens, training.seq_len)
    size, layers = BYTES[training.mixed_precision_param], shape.config.num_hidden_layers
    layer = tokens * shape.layer_bytes(training.mixed_precision_param)
    return layers * layer, layers * tokens * shape.config.hidden_size * size + layer


def totals(parts: Sequence[Part]) -> dict[str, int]:
    """Device bytes always held, and at the peak of sampling and of a step; host bytes."""
    on_device = [p for p in parts if not p.host]
    always = sum(p.bytes for p in on_device if p.when == "always")
    step = sum(p.bytes for p in on_device if p.when == "step")
    sampling = [
        sum(p.bytes for p in parts if p.when == "sample" and p.role == name)
        for name in {p.role for p in parts}
    ]
    return {
        "always": always,
        "while sampling": always + max(sampling, default=0),
        "while a step runs": always + step,
        "host": sum(p.bytes for p in parts if p.host),
    }


def peak(parts: Sequence[Part]) -> int:
    """Device bytes of one rank at their highest."""
    return max(bytes for name, bytes in totals(parts).items() if name != "host")
