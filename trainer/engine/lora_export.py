"""What a LoRA run leaves: the adapter as PEFT saves it, or a whole model, base plus adapter.

Both are written from the adapters and from the base's own files; no rank holds the whole model.
"""

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.model_spec import ModelSpec

from reflux.trainer.adapter_folder import BASE_FILES, CONFIG, WEIGHTS
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import LoraSection
from reflux.trainer.data.tokenizer_files import copy_tokenizer

from .adapter_weights import ENDS, PREFIX
from .agreement import agreed
from .conversions import Part
from .export import export_folder, write_config_and_card
from .lora import gathered_adapters, linear_layers
from .weight_files import INDEX, SINGLE, opened, read_index, stored_tensors, weight_files
from .weights import FolderAdapter, adapter_of

Adapters = Mapping[str, tuple[Tensor, Tensor]]  # layer of transformers' model -> A, B


def export_lora(
    trainer,
    cfg: Config,
    out: str,
    source: str,
    *,
    files: Mapping[str, str],
    card: str,
    template: str | None = None,
) -> None:
    """What the run's [export] wants: the adapters of the model, or with export.merge a whole model.
    files: as of export_adapter. card, template: as of export_hf. Collective.
    """
    model, spec = trainer.model_parts[0], trainer.config.model_spec
    adapters = gathered_adapters(model, spec)
    if cfg.export.merge:
        write = partial(export_merged, adapters, cfg.lora, spec, dtype=cfg.export.dtype)
    else:
        layers = tuple(linear_layers(model, spec))
        write = partial(export_adapter, adapters, layers, cfg.lora, files=files)
    write(out, source, card=card, template=template)


def export_adapter(
    adapters: Adapters,
    layers: Sequence[str],
    lora: LoraSection,
    out: str,
    source: str,
    *,
    files: Mapping[str, str],
    card: str,
    template: str | None = None,
) -> None:
    """The folder that peft.PeftModel.from_pretrained(base, out) loads: A and B in fp32.

    layers: every linear layer of the base. files: sha256 of the base's files, by name; kept beside
    the adapter, so that another base is noticed. card, template: as of export_hf. Collective.
    """

    def finish(folder: Path) -> None:
        tensors = {
            f"{PREFIX}{name}{end}": weight.contiguous()
            for name, pair in adapters.items()
            for end, weight in zip(ENDS, pair)
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        table = peft_config(tuple(adapters), layers, lora, source)
        (folder / CONFIG).write_text(json.dumps(table, indent=2) + "\n")
        if files:
            (folder / BASE_FILES).write_text(json.dumps(dict(files), indent=1) + "\n")
        copy_tokenizer(folder, source, template)
        (folder / "README.md").write_text(card, encoding="utf-8")

    export_folder(out, source, lambda folder: None, finish)


def peft_config(
    targets: Sequence[str], layers: Sequence[str], lora: LoraSection, base: str
) -> dict[str, Any]:
    """adapter_config.json of PEFT's LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(base),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": short_targets(targets, layers),
    }


def short_targets(targets: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The ends of the targets' names, where they name no other layer; else the names in full."""
    ends = {name.rpartition(".")[2] for name in targets}
    others = {name.rpartition(".")[2] for name in set(layers) - set(targets)}
    return sorted(targets) if ends & others else sorted(ends)


def stored_layers(spec: ModelSpec, source: str, wanted: Iterable[str]) -> dict[str, str]:
    """Tensor of the files -> the layer of transformers' model whose weight it is. ValueError where
    one of the layers `wanted` is stored in another form.
    """
    same = [p for p in _parts(adapter_of(spec, source), spec, source) if p.converter is None]
    found = {p.names[0]: p.targets[0].removesuffix(".weight") for p in same}
    missing = sorted(set(wanted) - set(found.values()))
    if missing:
        raise ValueError(
            f"{source}: the weight of {missing[0]!r} is stored fused or split, so an adapter "
            "cannot be merged file by file. Keep the adapter's folder (export.merge = false)"
        )
    return found


def stored_float32(spec: ModelSpec, source: str) -> set[str]:
    """Tensors of the files that the model keeps in float32, whatever its own dtype."""
    adapter = adapter_of(spec, source)
    parts = _parts(adapter, spec, source)
    return {n for p in parts if any(map(adapter.keeps_float32, p.targets)) for n in p.names}


def _parts(adapter: FolderAdapter, spec: ModelSpec, source: str) -> Sequence[Part]:
    with torch.device("meta"):
        state = adapter.to_hf(spec.model.build().state_dict())
    return adapter.assembly(stored_tensors(source), state).parts


def export_merged(
    adapters: Adapters,
    lora: LoraSection,
    spec: ModelSpec,
    out: str,
    source: str,
    *,
    dtype: str,
    card: str,
    template: str | None = None,
) -> None:
    """W + s B A as a model folder, in the files of the base: computed in fp32 from the base's own
    numbers and rounded once to `dtype`. The ranks share the files. Collective.
    """
    layers = agreed(partial(stored_layers, spec, source, adapters))
    kept = stored_float32(spec, source)

    def delta(tensor: str) -> Tensor | None:
        pair = adapters.get(layers.get(tensor, ""))
        return None if pair is None else lora.scale * (pair[1] @ pair[0])

    def write(folder: Path) -> None:
        mine = weight_files(source)[dist.get_rank() :: dist.get_world_size()]
        agreed(partial(merge_files, mine, folder, delta, dtype, kept))

    def finish(folder: Path) -> None:
        write_index(folder, source)
        write_config_and_card(folder, source=source, dtype=dtype, card=card, template=template)

    export_folder(out, source, write, finish)


def merge_files(
    files: Sequence[str],
    folder: Path,
    delta: Callable[[str], Tensor | None],
    dtype: str,
    kept: Container[str] = (),
) -> None:
    """The safetensors files of a model into `folder`, with delta(tensor) on top of each tensor that
    has one: fp32 sums, rounded once to `dtype`, but for those of `kept`. One file in memory at a
    time.
    """
    for file in files:
        merged = {}
        with opened(file) as tensors:
            for name in tensors.keys():
                weight, more = tensors.get_tensor(name), delta(name)
                if more is not None:
                    weight = weight.float() + more
                if weight.is_floating_point() and name not in kept:
                    weight = weight.to(TORCH_DTYPE_MAP[dtype])
                merged[name] = weight.contiguous()
        save_file(merged, folder / os.path.basename(file), metadata={"format": "pt"})


def write_index(folder: Path, source: str) -> None:
    """The base's index, where the weights are in several files."""
    index = read_index(source)
    if (folder / SINGLE).exists() or not index:
        return
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    table = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(table, indent=2) + "\n")
