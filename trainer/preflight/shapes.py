"""The models of a run on the meta device, from config.json alone."""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reflux.trainer.adapter_folder import base_of
from reflux.trainer.config.loader import as_table
from reflux.trainer.config.origins import blamed
from reflux.trainer.config.phases import roles
from reflux.trainer.config.roles import Role
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import LoraSection
from reflux.trainer.engine.engine import NATIVE_CACHE_LIMIT
from reflux.trainer.engine.hf_models import buildable, positions_of, text_config
from reflux.trainer.engine.lora import choose_targets, linear_layers, with_adapters
from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.engine.native_models import native_obstacle
from reflux.trainer.engine.titan_options import titan_table
from reflux.trainer.engine.trainer_config import check_degrees, titan_config

from .report import Finding

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, eq=False)
class Shape:
    """A role's model on the meta device. `why` says why this back end."""

    role: Role
    spec: Any  # torchtitan's ModelSpec
    config: Any  # transformers' config of the language model
    sizes: tuple[tuple[int, ...], ...]  # of every parameter; a tied head counts once
    block: int  # parameters of the largest block
    ends: int  # parameters of embedding and head
    why: str
    linear: tuple[tuple[int, ...], ...] = ()  # sizes of every linear layer but the head
    adapters: tuple[tuple[int, ...], ...] = ()  # sizes of every A and B of [lora]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.sizes))

    @property
    def head_dim(self) -> int:
        c = self.config
        return getattr(c, "head_dim", None) or c.hidden_size // max(self.heads, 1)

    @property
    def max_positions(self) -> int:
        """The longest row that a frozen model takes."""
        return min(positions_of(self.config) or NATIVE_CACHE_LIMIT, NATIVE_CACHE_LIMIT)

    def layer_bytes(self, dtype: str) -> int:
        """What the backward of one block keeps per token, at most: inputs of every matmul and gate
        in the compute dtype; RoPE and query/key norms in fp32, and transformers' other norms too.
        Fitted to five architectures, within 1 to 2.
        """
        c, native = self.config, self.spec.name == "native"
        heads = (self.heads + self.key_value_heads) * self.head_dim
        inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
        inner = max(inner) if isinstance(inner, list | tuple) else inner  # by layer
        narrow = 4 * inner + (3 if native else 5) * c.hidden_size + 2 * heads
        return BYTES[dtype] * narrow + 4 * (5 * heads if native else 3 * heads + 8 * c.hidden_size)

    @property
    def cache_values(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.config.num_hidden_layers * self.key_value_heads * self.head_dim

    @property
    def heads(self) -> int:
        """Of queries; 0 without attention."""
        return getattr(self.config, "num_attention_heads", None) or 0

    @property
    def key_value_heads(self) -> int:
        """As many as of queries where the architecture does not say."""
        c = self.config
        found = getattr(c, "num_key_value_heads", None) or getattr(c, "num_kv_heads", None)
        return found if isinstance(found, int) else self.heads


def planned_shapes(cfg: Config) -> tuple[list[Shape], list[Finding]]:
    """The shape of every role whose folder has a config.json, and errors for the others."""
    shapes, findings = [], []
    for role in roles(cfg):
        if not _has_config(role.model.path):
            what = f"{role.name}: {role.section}.path = {role.model.path!r} has no config.json"
            fix = f"set {role.section}.path to a local Hugging Face model folder"
            findings.append(Finding("error", what, fix))
            continue
        try:
            shapes.append(build_shape(role, cfg.lora if role.trained else None))
        except (OSError, ValueError, AttributeError) as error:
            fix = "take another model, backend or attention"
            findings.append(Finding("error", f"{role.name}: {error}", fix))
    return shapes, findings


def _has_config(path: str) -> bool:
    with contextlib.suppress(ValueError):  # an adapter without its base
        return (Path(base_of(os.path.expanduser(path))) / "config.json").is_file()
    return False


def build_shape(role: Role, lora: LoraSection | None = None) -> Shape:
    """lora: of the trained model. ValueError as from build_spec, and for targets without a layer.
    An attention that needs CUDA is replaced where there is none: shapes are the same.
    """
    path = os.path.expanduser(role.model.path)
    backend, attention = role.model.backend, role.model.attention
    config = text_config(path)
    obstacle = native_obstacle(config, attention)
    if attention in ("flex", "flash_attention_2") and not torch.cuda.is_available():
        backend, attention = "hf" if obstacle and backend == "auto" else backend, "auto"
    spec = build_spec(path, backend=backend, attention=attention)
    with torch.device("meta"), buildable(path):
        model: Any = spec.model.build()
    if lora is not None and lora.rank:
        spec = with_adapters(spec, lora, path)
    layers = {name: tuple(layer.weight.shape) for name, layer in linear_layers(model, spec).items()}
    sizes = tuple(tuple(p.shape) for p in model.parameters())
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers.values())
    ends = {id(p): p for m in (model.tok_embeddings, model.lm_head) for p in m.parameters()}
    if role.model.backend != "auto":
        why = f"backend = {role.model.backend!r}"
    elif spec.name == "native":
        why = "computes it exactly"
    else:
        why = f"native {obstacle or 'was not chosen'}"
    return Shape(
        role,
        spec,
        config,
        sizes,
        block,
        sum(p.numel() for p in ends.values()),
        why,
        tuple(layers.values()),
        _adapter_sizes(layers, lora, path),
    )


def _adapter_sizes(
    layers: Mapping[str, tuple[int, ...]], lora: LoraSection | None, path: str
) -> tuple[tuple[int, ...], ...]:
    if lora is None or not lora.rank:
        return ()
    chosen = choose_targets(list(layers), lora.targets, path)
    out_in = [layers[name] for name in chosen]
    return tuple(size for out, width in out_in for size in ((lora.rank, width), (out, lora.rank)))


def planned_titan(cfg: Config, shape: Shape) -> Any:
    """torchtitan's configuration of the run with everything it does not accept: ValueError for
    unknown keys, and for rows longer than the model's positions.
    """
    config = titan_config(cfg, shape.spec)
    check_degrees(config.parallelism, cfg)
    try:
        shape.spec.model.update_from_config(config=config)
    except ValueError as error:  # rows longer than the model's positions
        raise blamed(cfg, ["training.seq_len"], str(error)) from None
    if shape.spec.name == "hf" and config.parallelism.tensor_parallel_degree > 1:
        text = (
            f"parallelism.tensor_parallel_degree = {config.parallelism.tensor_parallel_degree} "
            f"with the backend 'hf' ({shape.why}); want 1"
        )
        raise blamed(cfg, ["parallelism.tensor_parallel_degree"], text)
    return config


def every_option(cfg: Config) -> dict[str, Any]:
    """The configuration as nested plain tables, torchtitan's sections with every value of this run.
    ValueError for what torchtitan does not know.
    """
    return as_table(cfg) | {name: dict(v) for name, v in titan_table(cfg).items()}
