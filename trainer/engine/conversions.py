"""Which tensors of the files become which of a transformers model, by transformers' own weight
conversions (conversion_mapping.py): names of the hub, experts in one tensor or many, fused and
split projections.

    assembled    names of files -> Assembly: what is made of what, and what belongs nowhere
    Part.read    the model's tensors from those of the files
    stored_form  and back, for an export

transformers converts while it loads whole models; here each rank reads its own shards. Experts that
are stacked along the sharded dimension are read by the rank that holds them and by no other; what
else is fused or split is read whole, one group of tensors at a time.

Shapes: E experts.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], Tensor]  # name in the files -> the whole tensor


@dataclass(frozen=True)
class Part:
    """Tensors of the files that become tensors of the model together.

    sources: pattern of the converter -> names in the files, in order. targets: names in the model.
    converter: None where one tensor is another under a different name, or the same.
    """

    sources: Mapping[str, tuple[str, ...]]
    targets: tuple[str, ...]
    converter: WeightConverter | None = None

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, list[Tensor]]) -> dict:
        """Name in the model -> tensor. tensors: as `sources`."""
        assert self.converter is not None
        converter = copy.deepcopy(self.converter)
        collected: dict[str, Any] = converter.collected_tensors
        for pattern, values in tensors.items():
            collected[pattern] = list(values)
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def read(
        self, model: PreTrainedModel, weights: Mapping[str, Tensor], read: Read
    ) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, this rank's shard of it)."""
        rows = self._own_rows(weights)
        if rows is not None:
            if rows.start == rows.stop:
                return
            named = {pattern: names[rows] for pattern, names in self.sources.items()}
        else:
            named = dict(self.sources)
        made = self.convert(model, {p: [read(n) for n in names] for p, names in named.items()})
        for name, tensor in made.items():
            yield name, tensor if rows is not None else shard_of(tensor, weights[name])

    def _own_rows(self, weights: Mapping[str, Tensor]) -> slice | None:
        """The experts of this rank, where only they have to be read."""
        operations = self.converter.operations if self.converter else []
        weight = weights[self.targets[0]]
        if len(self.targets) > 1 or not isinstance(weight, DTensor) or not operations:
            return None
        first, *others = operations
        if (
            not isinstance(first, MergeModulelist)
            or first.dim
            or not all(map(_keeps_experts, others))
        ):
            return None
        if not all(p == Shard(0) or p.is_replicate() for p in weight.placements):
            return None
        shape, offset = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        return slice(offset[0], offset[0] + shape[0])


def _keeps_experts(operation: object) -> bool:
    if isinstance(operation, Transpose):
        return min(operation.dim0, operation.dim1) > 0
    return isinstance(operation, Concatenate) and operation.dim > 0


def shard_of(whole: Tensor, weight: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of `weight`."""
    if not isinstance(weight, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape))]


@dataclass(frozen=True)
class Assembly:
    """parts: of the model's tensors that the files hold. strangers: names in the files of which no
    tensor of the model is made. used: the conversions that these names needed, in order.
    """

    parts: tuple[Part, ...]
    strangers: tuple[str, ...]
    used: tuple[WeightTransform, ...] = ()

    @property
    def targets(self) -> set[str]:
        return {target for part in self.parts for target in part.targets}


def same_names(stored: Iterable[str], weights: Iterable[str]) -> Assembly:
    """Of a model whose tensors are called as in the files."""
    ours = set(weights)
    stored = list(stored)
    parts = tuple(Part({name: (name,)}, (name,)) for name in stored if name in ours)
    return Assembly(parts, tuple(name for name in stored if name not in ours))


def assembled(model: PreTrainedModel, stored: Iterable[str], weights: Iterable[str]) -> Assembly:
    """By transformers' rules; `model` may be on the meta device.

    stored: names in the files. weights: names in the model.
    """
    ours: dict[str, bool] = dict.fromkeys(weights, True)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    strangers = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, ours
        )
        if target not in ours and name in ours:
            target, pattern = name, None
        if target not in ours:
            strangers.append(name)
            continue
        converter = by_pattern[pattern] if pattern else None
        group = groups.setdefault(target, (converter, {}))
        group[1].setdefault(pattern or name, []).append(name)
    parts = tuple(_part(target, *group, ours) for target, group in groups.items())
    used = tuple(t for t in transforms if t.was_used())
    return Assembly(parts, tuple(strangers), used)


def _part(
    target: str,
    converter: WeightConverter | None,
    sources: Mapping[str, Sequence[str]],
    ours: Mapping[str, bool],
) -> Part:
    names = {pattern: tuple(found) for pattern, found in sources.items()}
    if converter is None:
        return Part(names, (target,))
    first = converter.target_patterns[0]
    targets = [target.replace(first, other) for other in converter.target_patterns]
    return Part(names, tuple(t for t in targets if t in ours), converter)


# --- and back


def default_transforms(model: PreTrainedModel) -> tuple[WeightTransform, ...]:
    """What transformers undoes in a model that was not loaded from files."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return tuple(t for t in transforms if not isinstance(t, PrefixChange))


@dataclass(frozen=True)
class StoredGroup:
    """names: in the model. files: in the files. convert: makes these from the whole tensors; None
    where only the name differs.
    """

    names: tuple[str, ...]
    files: tuple[str, ...]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def stored_form(
    model: PreTrainedModel, weights: Mapping[str, Tensor], used: Sequence[WeightTransform]
) -> Iterator[StoredGroup]:
    """Undoes the conversions `used`. Names are found on the meta device, so that every rank finds
    all of them without a weight.
    """
    undone = [t.reverse_transform() for t in reversed(used)]
    renamings = [t for t in undone if isinstance(t, WeightRenaming)]
    converters = [t for t in undone if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = name, None
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                break
        group = groups.setdefault(target, (by_pattern.get(pattern or ""), {}))
        group[1].setdefault(pattern or name, []).append(name)
    for target, (undo, sources) in groups.items():
        part = Part({p: tuple(found) for p, found in sources.items()}, (target,), undo)
        if undo is None:
            yield StoredGroup(tuple(part.names), (_renamed(target, renamings),))
            continue
        convert = partial(_convert, part, model, renamings)
        shapes = {n: torch.empty(weights[n].shape, device="meta") for n in part.names}
        yield StoredGroup(tuple(part.names), tuple(convert(shapes)), convert)


def _convert(
    part: Part,
    model: PreTrainedModel,
    renamings: Sequence[WeightRenaming],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    named = {p: [tensors[n] for n in found] for p, found in part.sources.items()}
    return {_renamed(n, renamings): t for n, t in part.convert(model, named).items()}


def _renamed(name: str, renamings: Iterable[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def meta_shapes(
    part: Part, model: PreTrainedModel, shape_of: Callable[[str], tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Name in the model -> shape that the files' shapes give it."""
    empty = {
        p: [torch.empty(shape_of(n), device="meta") for n in names]
        for p, names in part.sources.items()
    }
    return {n: tuple(t.shape) for n, t in part.convert(model, empty).items()}
