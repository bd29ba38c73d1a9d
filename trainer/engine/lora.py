"""LoRA: low-rank adapters beside frozen linear layers (arXiv:2106.09685, section 4.1).

    y = W x + s B A x      A [r, in], B [out, r]; s = alpha / r, or alpha / sqrt(r) with rslora
                           (arXiv:2312.03732)

B starts at 0, so the first step begins at the model itself, to the last digit. A is uniform in
+- 1 / sqrt(in), as PEFT draws it, from a stream of its own per layer: the same numbers on any
number of ranks and on both back ends. With the adapters switched off the trained model is its own
reference: no second copy.

Adapters are parameters of the linear layer itself, in its FSDP group. Under tensor parallelism a
layer that shards its output shards B, one that shards its input shards A. What is frozen is kept in
the compute dtype, which is what a step computes with anyway.

Shapes: N rows, L row length, D hidden size.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.protocols.model_spec import ModelSpec

from reflux.trainer.adapter_folder import read_adapter
from reflux.trainer.config.sections import LoraSection

from .forward import hidden_states
from .head import logit_softcap, open_head
from .hf_models import text_config
from .weights import ADAPTERS

SHOWN = 12  # names of layers in an error


class LoraLinear(nn.Module):
    """What attach_adapters puts in front of the class of a linear layer."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_name: str  # of the layer in transformers' model
    lora_is_on = True

    def forward(self, input: Tensor) -> Tensor:  # torchtitan's layouts are keyed by this name
        output = super().forward(input)
        if not self.lora_is_on:
            return output
        return output + self.lora_scale * F.linear(F.linear(input, self.lora_A), self.lora_B)


_CLASSES: dict[type, Any] = {}


def _adapted(kind: type) -> Any:
    """The class of a LoraLinear in front of a class of linear layers."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Lora{kind.__name__}", (LoraLinear, kind), {})
    return _CLASSES[kind]


# --- which layers


def linear_layers(model: Any, spec: ModelSpec) -> dict[str, nn.Linear]:
    """Every linear layer of the decoder's blocks, by its name in transformers' model."""
    adapter = spec.state_dict_adapter(spec.model, None)
    inside = {id(module) for block in model.layers.values() for module in block.modules()}
    layers = {}
    for name, module in _named_modules(model):
        if isinstance(module, nn.Linear) and id(module) in inside:
            (theirs,) = adapter.to_hf({f"{name}.weight": module.weight})
            layers[theirs.removesuffix(".weight")] = module
    return layers


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Under the names that parameters have in a state dict."""
    for name, module in model.named_modules():
        yield re.sub(r"(_checkpoint_wrapped_module|_orig_mod)\.", "", name), module


def choose_targets(names: Sequence[str], patterns: Sequence[str], path: str) -> list[str]:
    """The names that one of the patterns is the end of, or matches as a shell's pattern; all of
    them without a pattern. ValueError for a pattern that matches none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = [n for n in names if fnmatch.fnmatchcase(f".{n}", f"*.{pattern}")]
        if not found:
            raise ValueError(_no_match(names, pattern, path))
        chosen.update(found)
    return [name for name in names if name in chosen] if patterns else list(names)


def _no_match(names: Sequence[str], pattern: str, path: str) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    if not ends:
        return f"lora.rank > 0, but {path} has no linear layer that an adapter can be put beside"
    if pattern.rpartition(".")[2] in ("lm_head", "embed_tokens"):
        return (
            f"lora.targets holds {pattern!r}: the head and the embeddings take no adapter, because "
            f"the losses read the head as one matrix. Want one of {', '.join(ends[:SHOWN])}"
        )
    more = f" and {len(ends) - SHOWN} more" if ends[SHOWN:] else ""
    return (
        f"lora.targets holds {pattern!r}, which is the end of no linear layer's name in {path}; "
        f"want one of {', '.join(ends[:SHOWN])}{more}, a longer end such as {names[0]!r}, a "
        "pattern with *, or no targets for all of them"
    )


# --- into the model


def with_adapters(spec: ModelSpec, lora: LoraSection, path: str) -> ModelSpec:
    """The spec of the same model with adapters, everything else frozen. ValueError where `path`
    already is an adapter: the new one would belong to weights that are in no folder.
    """
    if read_adapter(path) is not None:
        raise ValueError(
            f"model.path = {path} is a LoRA adapter, and lora.rank = {lora.rank} would put another "
            f"on top. Merge it first: python -m reflux.trainer.merge {path} OUT"
        )
    attach = partial(attach_adapters, spec=spec, lora=lora, path=path)
    return dataclasses.replace(spec, parallelize_fn=partial(spec.parallelize_fn, attach=attach))


def attach_adapters(
    model: nn.Module, frozen_dtype: torch.dtype, *, spec: ModelSpec, lora: LoraSection, path: str
) -> None:
    """Adds A and B to the targets of a model on the meta device, and freezes the rest in
    `frozen_dtype`. ValueError where a target matches nothing.
    """
    layers = linear_layers(model, spec)
    names = choose_targets(list(layers), lora.targets, path)
    adapter = spec.state_dict_adapter(spec.model, None)
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if not adapter.keeps_float32(name):
            weight.data = weight.data.to(frozen_dtype)
    for name in names:
        _attach(layers[name], name, lora)


def _attach(layer: Any, name: str, lora: LoraSection) -> None:
    """layer: becomes a LoraLinear."""
    layer.__class__ = _adapted(type(layer))
    layer.lora_name, layer.lora_scale = name, lora.scale
    dtype = torch.get_default_dtype() if layer.weight.device.type != "meta" else torch.float32
    new = partial(torch.empty, device=layer.weight.device, dtype=dtype)
    layer.lora_A = nn.Parameter(new(lora.rank, layer.in_features))
    layer.lora_B = nn.Parameter(new(layer.out_features, lora.rank))
    if getattr(layer, "_param_init", None) is not None:  # torchtitan's modules name every one
        layer._param_init = layer._param_init | {"lora_A": nn.init.zeros_, "lora_B": nn.init.zeros_}
    sharding = getattr(layer, "_sharding_config", None)
    if sharding is not None:
        layouts = sharding.state_shardings | _layouts(sharding.state_shardings["weight"])
        layer._sharding_config = dataclasses.replace(sharding, state_shardings=layouts)


def _layouts(weight: Any) -> dict[str, Any]:
    """Of A and B under tensor parallelism, beside a weight of this layout."""
    replicated = dense_param_placement(tp=spmd.R)
    if weight == dense_param_placement(tp=spmd.S(0)):
        return {"lora_A": replicated, "lora_B": weight}
    return {"lora_A": weight, "lora_B": replicated}


def adapted_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


@torch.no_grad()
def reset_adapters(model: nn.Module, seed: int) -> None:
    """A to its random start, B to 0."""
    for layer in adapted_layers(model):
        layer.lora_B.zero_()
        start = _start_of_A(tuple(layer.lora_A.shape), f"{seed} {layer.lora_name}")
        shards: Any = layer.lora_A
        if hasattr(shards, "device_mesh"):
            mesh = shards.device_mesh  # off-loaded shards lie elsewhere
            start = start.to(mesh.device_type)
            start = distribute_tensor(start, mesh, shards.placements, src_data_rank=None)
        shards.copy_(start)


def _start_of_A(shape: tuple[int, ...], name: str) -> Tensor:
    digest = hashlib.sha256(name.encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)) of [r, in]
    return torch.empty(shape).uniform_(-bound, bound, generator=stream)


# --- off


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its frozen weights do."""
    layers = adapted_layers(model)
    for layer in layers:
        layer.lora_is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_is_on = True


class BaseModel:
    """The trained model with its adapters off, as a frozen model: the reference of a calibration
    without a copy. Every method is collective.
    """

    def __init__(self, model: nn.Module, path: str):
        self.model, self.path = model, path
        self.vocab_size = text_config(path).vocab_size
        self.softcap = logit_softcap(model)

    @torch.no_grad()
    def hidden(self, ids_NL: Tensor, positions_NL: Tensor, packed: bool = False) -> Tensor:
        """Hidden states [N, L, D]; arguments as hidden_states."""
        with adapters_off(self.model):
            return hidden_states(self.model, ids_NL, positions_NL, packed=packed)

    def open_head(self) -> contextlib.AbstractContextManager[Tensor]:
        """Context of the plain [V, D] head weight, gathered inside."""
        return open_head(self.model)


# --- their state


class AdapterState(ModelWrapper):
    """torchtitan's view of the model for checkpoints, of the adapters alone."""

    def _get_state_dict(self) -> dict[str, Any]:
        whole = super()._get_state_dict()
        return {name: weight for name, weight in whole.items() if name.endswith(ADAPTERS)}


def gathered_adapters(model: nn.Module, spec: ModelSpec) -> Mapping[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted layer, whole, fp32, on the host; names and order of rows are those
    of transformers' model. Collective.
    """
    rows = _RowOrder(spec)
    names = {id(module): name for name, module in _named_modules(model)}
    found = {}
    for layer in adapted_layers(model):
        A, B = (_whole(layer.lora_A), _whole(layer.lora_B))
        found[layer.lora_name] = A, B[rows(names[id(layer)], B.shape[0], A.shape[1])]
    return found


def adapter_deltas(model: nn.Module, spec: ModelSpec) -> dict[str, Callable[[], Tensor]]:
    """Layer of transformers' model -> its s B A [out, in] in fp32 on the host, made when it is
    asked for. Empty without adapters. Collective.
    """
    scales = {layer.lora_name: layer.lora_scale for layer in adapted_layers(model)}
    return {
        name: partial(_delta, A, B, scales[name])
        for name, (A, B) in gathered_adapters(model, spec).items()
    }


def _delta(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * (B @ A)


def _whole(weight: Any) -> Tensor:
    full = weight
    if hasattr(weight, "full_tensor"):
        full = weight.to(weight.device_mesh.device_type).full_tensor()  # off-loaded shards, too
    return full.detach().float().cpu()


class _RowOrder:
    """Which row of a weight here is row i of transformers': torchtitan's llama rotates pairs of
    neighbours, so its query and key rows lie in another order.
    """

    def __init__(self, spec: ModelSpec):
        self._adapter = spec.state_dict_adapter(spec.model, None)
        self._known: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, out: int, size: int) -> Tensor:
        # mixtures of experts have dense layers beside them: another size under the same name
        kind = name.rpartition(".")[2], out
        if kind not in self._known:
            rows = torch.arange(out)[:, None].expand(out, size)
            (theirs,) = self._adapter.to_hf({f"{name}.weight": rows}).values()
            self._known[kind] = theirs[:, 0].clone()
        return self._known[kind]
