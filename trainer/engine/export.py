"""The trained model as a Hugging Face folder, written from its FSDP2 shards: no rank holds the
whole model.

The folder appears complete or not at all: it is built beside its target as OUT.partial and then
renamed. A crash between the two renames leaves the old export as OUT.old and the new one, complete,
as OUT.partial.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank,
)
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.config import TORCH_DTYPE_MAP

from reflux.trainer.adapter_folder import CONFIG
from reflux.trainer.data.tokenizer_files import copy_tokenizer

from .hf_models import whole_config
from .manifest import sync_file, sync_folder
from .ranks import Peers
from .weight_files import Stored, has_weights, stored_tensors
from .weights import adapter_of

FILE_BYTES = 5 * 10**9  # transformers' own limit for one safetensors file


def export_hf(
    trainer,
    out: str,
    source: str,
    *,
    dtype: str = "bfloat16",
    card: str,
    template: str | None = None,
) -> None:
    """Writes the trainer's model to the folder `out`, loadable with
    AutoModelForCausalLM.from_pretrained(out).

    source: the folder the model came from; its config, tokenizer and generation config go along.
    dtype: "float32" or "bfloat16". card: the text of README.md. template: the text of the chat
    template, None: the source's. Collective; on several nodes `out` is on a shared file system.
    ValueError for another dtype, for out = source, and if `out` holds something that is not a model
    folder.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"export: dtype = {dtype!r}; want 'float32' or 'bfloat16'")

    def write(staging: Path) -> None:
        _write_weights(_weights(trainer, source, dtype), staging)

    finish = partial(
        write_config_and_card, source=source, dtype=dtype, card=card, template=template
    )
    export_folder(out, source, write, finish)


def export_folder(
    out: str, source: str, write: Callable[[Path], None], finish: Callable[[Path], None]
) -> None:
    """Puts a folder in the place of `out`, whole or not at all. write: fills it, on every rank;
    finish: what the first rank adds. Collective. ValueError as of export_hf.
    """
    target, staging = Path(os.path.realpath(out)), Path(os.path.realpath(out) + ".partial")
    if target == Path(os.path.realpath(source)):
        raise ValueError(f"export: {out} is the folder the model came from; want another one")
    if target.exists() and not any((target / name).is_file() for name in ("config.json", CONFIG)):
        raise ValueError(
            f"export: {out} exists and is not a model folder (no config.json); remove it or choose "
            "another"
        )
    dist.barrier()  # every rank has looked before rank 0 begins to write
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    try:
        write(staging)
        Peers().from_first(partial(_finish, target, staging, finish))
    except BaseException:
        if dist.get_rank() == 0:  # a full disk gets its space back
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _weights(trainer, source: str, dtype: str) -> dict[str, Tensor]:
    """Name in the files -> shard (DTensor) in the wanted dtype, or as FolderAdapter.files."""
    adapter = adapter_of(trainer.config.model_spec, source)
    weights = adapter.to_hf(ModelWrapper(trainer.model_parts[0]).state_dict())
    stored: dict[str, Stored] = stored_tensors(source) if has_weights(source) else {}
    wanted = TORCH_DTYPE_MAP[dtype]
    cast = {
        name: w.detach().to(wanted)
        if w.is_floating_point() and not adapter.keeps_float32(name)
        else w
        for name, w in weights.items()
    }
    return adapter.files(cast, stored, wanted)


def _write_weights(weights: dict[str, Tensor], staging: Path) -> None:
    """Every rank writes its shards; then the ranks share the work of joining them into files of at
    most FILE_BYTES.
    """
    shards, files = staging / "shards", file_numbers(weights)
    dcp.save(
        {name: w for name, w in weights.items() if w.device.type != "meta"},
        storage_writer=HuggingFaceStorageWriter(
            path=str(shards), save_distributed=True, fqn_to_index_mapping=files
        ),
    )
    dist.barrier()
    consolidate_safetensors_files_on_every_rank(
        str(shards), str(staging), fqn_to_index_mapping=files
    )


def file_numbers(weights: dict[str, Tensor], limit_bytes: int = FILE_BYTES) -> dict[str, int]:
    """Tensor name -> number of its file, from 1: in order, a new file before the limit would be
    passed.
    """
    numbers, number, used = {}, 1, 0
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        if used and used + size > limit_bytes:
            number, used = number + 1, 0
        numbers[name], used = number, used + size
    return numbers


def _finish(target: Path, staging: Path, finish: Callable[[Path], None]) -> None:
    """Everything but the weights; on the disk before the folder gets its name."""
    shutil.rmtree(staging / "shards", ignore_errors=True)
    finish(staging)
    for file in (p for p in staging.rglob("*") if p.is_file()):
        sync_file(file)
    sync_folder(staging)
    _replace(target, staging)
    sync_folder(target.parent)


def write_config_and_card(
    staging: Path, *, source: str, dtype: str, card: str, template: str | None = None
) -> None:
    """What a model folder holds beside its weights."""
    config = whole_config(source)
    config.dtype = dtype
    config.save_pretrained(staging)
    copy_tokenizer(staging, source, template)
    (staging / "README.md").write_text(card, encoding="utf-8")


def _replace(target: Path, staging: Path) -> None:
    old = Path(f"{target}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
