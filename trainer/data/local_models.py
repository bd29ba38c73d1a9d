"""Models that grade: the device and numbers they are loaded in, and what tells them apart."""

import contextlib
import hashlib
from pathlib import Path

from reflux.trainer.adapter_folder import base_of
from reflux.trainer.file_hash import file_sha256

from .attempt import describe

READ = (".json", ".jinja", ".model", ".txt", ".safetensors")  # what transformers reads of a folder


def check_place(task: str, device: str, dtype: str) -> None:
    """ValueError for a device that is not there, and for no floating-point dtype."""
    import torch  # here: a judge behind a server needs none

    kind = getattr(torch, dtype, None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"{task}: dtype = {dtype!r}; want float32, bfloat16 or float16")
    want = "want cpu, cuda or cuda:N"
    try:
        if torch.empty(0, device=device).is_meta:
            raise ValueError(f"{task}: device = {device!r} holds no numbers; {want}")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has all three
        reason = describe(error).splitlines()[0]
        raise ValueError(f"{task}: device = {device!r} is not there; {want} ({reason})") from error


def content_hash(path: str) -> str:
    """sha256 of a model folder: of its settings, tokenizer and weights, and of an adapter's base;
    the same wherever it lies. Reads all of it. `path` itself where no folder is there.
    """
    folders = [Path(path)]
    with contextlib.suppress(ValueError):  # an adapter that only PEFT itself knows
        folders.append(Path(base_of(path)))
    files = [
        f for folder in dict.fromkeys(folders) for f in sorted(folder.glob("*")) if _is_read(f)
    ]
    if not files:
        return path  # no folder: a name of the hub
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _is_read(file: Path) -> bool:
    return file.suffix in READ and file.is_file()
