"""The one check of every model that is loaded, trained or frozen: the tensors in its folder are
those of the model, all of them and no others, and finite numbers.

    check_weights    names, shapes, dtypes, number of layers, tied head: by the headers
    load_weights     the check, the weights into the shards, verify_weights, then the adapter
                     where the folder is one
    verify_weights   no NaN or inf, and really read: torchtitan silently starts from random weights
                     when no load is configured

Every error is a ValueError that names the file and the tensor. transformers would train a missing
tensor from random numbers and drop an extra one.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from transformers import PreTrainedModel

from reflux.trainer.adapter_folder import read_adapter

from .adapter_weights import add_adapter, check_adapter, saved_adapter
from .agreement import agreed, is_first_rank
from .conversions import Assembly, Part, meta_shapes, same_names
from .weight_files import Stored, opened, read_index, stored_tensors, weight_files

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
ADAPTERS = (".lora_A", ".lora_B")  # ends of the names of what lora.py adds to a model
ROWS = 4096  # of a tied head, compared at a time


class FolderAdapter(StateDictAdapter):
    """torchtitan's adapter of a Hugging Face folder, of the files of weight_files only."""

    def __init__(self, model_config: Any, hf_assets_path: str | None):
        super().__init__(model_config, None)
        self.hf_assets_path = hf_assets_path
        # tensor -> number of its file, for checkpoints in Hugging Face's format
        self.fqn_to_index_mapping = _shard_numbers(hf_assets_path) if hf_assets_path else None

    @property
    def tied(self) -> Mapping[str, str]:
        """Tensor without weights of its own -> the one whose weights it has."""
        return {}

    @property
    def ignored(self) -> tuple[str, ...]:
        """Regular expressions: buffers that old exports stored and no model reads."""
        return (r"rotary_emb\.inv_freq$",)

    def keeps_float32(self, name: str) -> bool:
        """Whether the model computes with this tensor in float32, whatever its own dtype."""
        return False

    def assembly(self, stored: Iterable[str], weights: Iterable[str]) -> Assembly:
        """Which tensors of the files (names `stored`) make those of the model (names `weights`, and
        tied ones).
        """
        return same_names(stored, [*weights, *self.tied])

    def shapes(self, part: Part, stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
        """Of the model's tensors, as the files' shapes make them."""
        if part.converter is None:
            return {part.targets[0]: stored[part.names[0]].shape}
        return meta_shapes(part, self.model, lambda name: stored[name].shape)

    @property
    def model(self) -> PreTrainedModel:
        """On the meta device, for conversions."""
        raise TypeError(f"{type(self).__name__} converts nothing")

    def files(
        self, weights: Mapping[str, Tensor], stored: Mapping[str, Stored], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of an export, by their names in the files: shards, or whole ones that one
        rank holds and that are on the meta device on the others. Collective.

        weights: as to_hf returns them, in `dtype`. stored: the folder that the model came from;
        empty where it has no weights.
        """
        return dict(weights)

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        return _FolderReader(path)


class _FolderReader(HuggingFaceStorageReader):
    def __init__(self, path: str):
        super().__init__(path)
        self.fs = _Listing(weight_files(path))


class _Listing(FileSystem):
    """A file system in which the folder holds these files."""

    def __init__(self, files: tuple[str, ...]):
        self._files = files

    def ls(self, path: Any) -> list[str]:
        return list(self._files)


def _shard_numbers(path: str) -> dict[Any, int] | None:
    index = read_index(path)
    numbers = {file: i for i, file in enumerate(sorted(set(index.values())), 1)}
    return {name: numbers[file] for name, file in index.items()} or None


# --- before anything is read


def check_weights(weights: Mapping[str, Tensor], path: str, adapter: FolderAdapter) -> None:
    """ValueError unless the folder's tensors are exactly those of the model.

    weights: Hugging Face name -> tensor of the global shape; its values do not matter.
    """
    stored = stored_tensors(path)
    assembly = adapter.assembly(stored, weights)
    for name, weight in weights.items():
        if name not in assembly.targets:
            why = _layers_differ(weights, stored) or _other_names(weights, stored)
            raise ValueError(
                f"{path}: no tensor {name!r} {tuple(weight.shape)} in {_files(stored)}; {why}"
            )
    made_by = {target: part for part in assembly.parts for target in part.targets}
    for targets in dict.fromkeys(made_by[name].targets for name in weights):
        _check_part(made_by[targets[0]], weights, stored, adapter)
    extra = [
        name
        for name in sorted(assembly.strangers)
        if not _is_buffer(name, stored[name], adapter.ignored)
    ]
    if extra:
        why = _layers_differ(weights, stored) or "the architecture in its config.json lacks them"
        raise ValueError(
            f"{stored[extra[0]].file}: {len(extra)} tensors that the model does not have, first "
            f"{extra[0]!r}; {why}"
        )
    file_names = {t: part.names[0] for part in assembly.parts for t in part.targets}
    for name, of in adapter.tied.items():
        if name in file_names and of in file_names and is_first_rank():
            a, b = file_names[name], file_names[of]
            _check_tied(a, stored[a], b, stored[b])


def _files(stored: Mapping[str, Stored]) -> str:
    files = sorted({s.file.rpartition("/")[2] for s in stored.values()})
    return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"


def _other_names(weights: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> str:
    others = sorted(stored.keys() - weights.keys())
    there = f", but {others[0]!r}" if others else ""
    return f"its config.json describes another model{there}"


def _layers_differ(weights: Iterable[str], stored: Iterable[str]) -> str:
    """A sentence where the numbers of layers differ, else nothing."""
    ours, theirs = _layers(weights), _layers(stored)
    if ours == theirs:
        return ""
    return f"config.json describes {ours} layers, the file holds {theirs}: take its own config.json"


def _layers(names: Iterable[str]) -> int:
    numbers = (re.search(r"\.(\d+)\.", name) for name in names)
    return max((int(n[1]) + 1 for n in numbers if n), default=0)


def _check_part(
    part: Part,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    adapter: FolderAdapter,
) -> None:
    for name in part.names:
        if weights[part.targets[0]].is_floating_point() and stored[name].dtype not in FLOATS:
            raise ValueError(
                f"{stored[name].file}: tensor {name!r} is {stored[name].dtype}; want float32, "
                "float16 or bfloat16. Quantised weights mean nothing without their scales: take "
                "the model they were made from"
            )
    first = part.names[0]
    more = f" and {len(part.names) - 1} others" if part.names[1:] else ""
    try:
        shapes = adapter.shapes(part, stored)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{stored[first].file}: tensors {first!r}{more} do not fit together: {error}"
        ) from error
    for target, shape in shapes.items():
        if target in weights and shape != tuple(weights[target].shape):
            what = f"tensor {first!r} is" if not more else f"tensors {first!r}{more} make"
            raise ValueError(
                f"{stored[first].file}: {what} {shape}; the model of its config.json wants "
                f"{tuple(weights[target].shape)}"
            )


def _is_buffer(name: str, stored: Stored, ignored: Iterable[str]) -> bool:
    """Of an old export. A float matrix is a weight, whatever its name."""
    matrix = len(stored.shape) > 1 and stored.dtype in FLOATS
    return not matrix and any(re.search(pattern, name) for pattern in ignored)


def _check_tied(name: str, stored: Stored, of: str, original: Stored) -> None:
    """transformers 5 does not tie where both tensors are in the file and differ: it computes
    another model than config.json says.
    """
    if stored.shape != original.shape or not _equal(name, stored, of, original):
        raise ValueError(
            f"{stored.file}: tensor {name!r} differs from {of!r}, but config.json ties them "
            "(tie_word_embeddings). Set tie_word_embeddings = false there to use the head of the "
            f"file, or remove {name!r} from it"
        )


def _equal(name: str, stored: Stored, of: str, original: Stored) -> bool:
    with opened(stored.file) as a, opened(original.file) as b:
        x, y = a.get_slice(name), b.get_slice(of)
        starts = range(0, stored.shape[0], ROWS)
        return all(torch.equal(x[i : i + ROWS], y[i : i + ROWS]) for i in starts)


# --- reading


def load_weights(model: nn.Module, spec: ModelSpec, path: str) -> None:
    """Reads the folder's weights into the shards through the spec's adapter: each rank its own. Of
    a LoRA adapter's folder, the base's, and s B A on top. Collective.
    """
    adapter = adapter_of(spec, path)
    weights = adapter.to_hf(own_weights(model))
    agreed(partial(check_weights, weights, path, adapter))
    read_weights(weights, path, adapter)
    ModelWrapper(model).load_state_dict(adapter.from_hf(weights))
    verify_weights(model, spec, path)
    lora = read_adapter(path)
    if lora is not None:
        with saved_adapter(lora) as saved:
            agreed(partial(check_adapter, weights, saved))
            agreed(partial(add_adapter, weights, saved))
        ModelWrapper(model).load_state_dict(adapter.from_hf(weights))


@torch.no_grad()
def read_weights(weights: Mapping[str, Tensor], path: str, adapter: FolderAdapter) -> None:
    """Fills this rank's shards in place. weights: as adapter.to_hf returns them. Collective."""
    stored = agreed(partial(stored_tensors, path))
    parts = adapter.assembly(stored, weights).parts
    same = {p.names[0]: weights[p.targets[0]] for p in parts if _is_same(p, weights)}
    try:
        dcp.load(same, storage_reader=adapter.get_hf_storage_reader(path))
    except CheckpointException as error:
        causes = "; ".join(str(cause[0]) for cause in error.failures.values())
        raise ValueError(f"{path}: the weights cannot be read: {causes}") from error
    others = [p for p in parts if p.converter and weights.keys() & set(p.targets)]
    agreed(partial(_read_converted, others, weights, stored, adapter))


def _is_same(part: Part, weights: Mapping[str, Tensor]) -> bool:
    return part.converter is None and part.targets[0] in weights


def _read_converted(
    parts: Iterable[Part],
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    adapter: FolderAdapter,
) -> None:
    with contextlib.ExitStack() as files:
        tensors = {f: files.enter_context(opened(f)) for f in {s.file for s in stored.values()}}
        for part in parts:
            read = partial(_tensor, tensors, stored)
            for name, shard in part.read(adapter.model, weights, read):
                weight = weights[name]
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local.copy_(shard)


def _tensor(files: Mapping[str, Any], stored: Mapping[str, Stored], name: str) -> Tensor:
    tensor: Tensor = files[stored[name].file].get_tensor(name)
    return tensor


def verify_weights(model: nn.Module, spec: ModelSpec, path: str) -> None:
    """ValueError for NaN or inf. RuntimeError where the smallest matrix is not the one in the file,
    for then nothing was read. Collective.

    A matrix, because freshly initialised norms are ones and so are many stored ones.
    """
    adapter = adapter_of(spec, path)
    weights = adapter.to_hf(own_weights(model))
    stored = agreed(partial(stored_tensors, path))
    parts = adapter.assembly(stored, weights).parts
    files = {t: stored[p.names[0]].file for p in parts for t in p.targets}
    agreed(partial(check_finite, weights, files))
    part = min(
        (p for p in parts if _is_same(p, weights) and weights[p.targets[0]].dim() == 2),
        key=lambda p: (weights[p.targets[0]].numel(), p.targets),
    )
    weight, (stored_name,) = weights[part.targets[0]], part.names
    with opened(stored[stored_name].file) as tensors:
        want = tensors.get_tensor(stored_name)
    got = weight.full_tensor() if isinstance(weight, DTensor) else weight
    if not torch.equal(got.detach().cpu(), want.to(got.dtype)):
        raise RuntimeError(
            f"{path}: {stored_name!r} in the model is not the one in the file: the weights were "
            "not loaded"
        )


def own_weights(model: nn.Module) -> dict[str, Any]:
    """The model's state without adapters."""
    state = ModelWrapper(model).state_dict()
    return {name: weight for name, weight in state.items() if not name.endswith(ADAPTERS)}


def verify_numbers(model: nn.Module, source: str) -> None:
    """ValueError for NaN or inf in weights that come from `source`. Collective."""
    weights = ModelWrapper(model).state_dict()
    agreed(partial(check_finite, weights, dict.fromkeys(weights, source)))


@torch.no_grad()
def check_finite(weights: Mapping[str, Tensor], source: Mapping[str, str]) -> None:
    """ValueError for NaN or inf in this rank's shards, with the tensor's name and its source. One
    pass over the memory and one host sync.
    """
    names, extremes = [], []
    for name, weight in weights.items():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if local.is_floating_point() and local.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(local)).float())
    if not names:
        return
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    bad = [name for name, ok in zip(names, finite) if not ok]
    if bad:
        raise ValueError(
            f"{source[bad[0]]}: tensor {bad[0]!r} holds NaN or inf"
            f"{f', and {len(bad) - 1} others do' if bad[1:] else ''}. Take a folder with whole "
            "weights"
        )


def adapter_of(spec: ModelSpec, path: str) -> FolderAdapter:
    adapter = spec.state_dict_adapter(spec.model, path)
    assert isinstance(adapter, FolderAdapter)  # build_spec makes no others
    return adapter
