"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors beside a base
model that lies elsewhere. Wherever a run reads a model folder it also takes such a folder: config,
tokenizer and weights are the base's, and the adapter is added to the weights.

Reads JSON only. Every error is a ValueError that names the file.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflux.trainer.config.fit import nearest_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_FILES = "base_files.json"  # ours: sha256 of the base's files that the adapter was trained on
# what the recipes debug_cpu_* read
DEBUG_MODELS = "; python -m reflux.trainer.studies.debug_models writes it"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# settings of PEFT that change what is computed, and the values at which they do nothing
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
}


@dataclass(frozen=True)
class AdapterFolder:
    """path: the folder. base: of the model it belongs to. alpha, rslora: see scale."""

    path: str
    base: str
    alpha: float
    rslora: bool

    @property
    def weights(self) -> str:
        return os.path.join(self.path, WEIGHTS)

    def scale(self, rank: int) -> float:
        """s of W + s B A; the rank is that of the layer's own A."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


def read_adapter(path: str) -> AdapterFolder | None:
    """None where `path` holds no adapter. ValueError for one that cannot be used."""
    folder = os.path.abspath(os.path.expanduser(path))
    file = os.path.join(folder, CONFIG)
    if not os.path.isfile(file):
        return None
    table = _table(file)
    for key, plain in PLAIN.items():
        if key in table and table[key] not in plain:
            raise ValueError(
                f"{file}: {key} = {table[key]!r} is not supported; want a plain LoRA adapter, or "
                "the whole model that PEFT's merge_and_unload makes of it"
            )
    alpha = table.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ValueError(f"{file}: lora_alpha = {alpha!r}; want a number, as PEFT writes it")
    if not os.path.isfile(os.path.join(folder, WEIGHTS)):
        raise ValueError(f"{folder}: no {WEIGHTS} there; save the adapter as safetensors")
    base = _base(folder, file, table.get("base_model_name_or_path"))
    return AdapterFolder(folder, base, float(alpha), bool(table.get("use_rslora")))


def base_of(path: str) -> str:
    """The folder that config, tokenizer and whole weights are read from: `path` itself, or the base
    of the adapter in it.
    """
    adapter = read_adapter(path)
    return path if adapter is None else adapter.base


def model_folder(path: str, option: str) -> str:
    """The absolute path. option: what names it in the configuration."""
    full = os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(os.path.join(base_of(full), "config.json")):
        return full
    hint = "want a Hugging Face model folder, or a LoRA adapter's with adapter_config.json"
    if os.path.isdir(os.path.join(full, "export")):  # of a run
        hint += f", did you mean {os.path.join(path, 'export')}?"
    if HUB_ID.fullmatch(path) and not os.path.exists(full):
        hint += f". Ids of the hub are not downloaded: hf download {path} --local-dir {path}"
    elif not os.path.exists(full):
        guess = nearest_model(path)
        hint += f". There is no {full}{guess}"
        hint += "" if guess else DEBUG_MODELS if Path(path).parts[-2:-1] == ("debug",) else ""
    raise ValueError(f"{option} = {path!r}: no config.json there; {hint}")


def tokenizer_of(path: str) -> str:
    """The folder whose tokenizer counts: an adapter may bring its own."""
    adapter = read_adapter(path)
    if adapter is None or any(os.path.isfile(os.path.join(path, n)) for n in TOKENIZER_FILES):
        return path
    return adapter.base


def file_of(path: str, name: str) -> str:
    """The file `name` of a model folder: of the adapter if it brings one, else of its base."""
    own = os.path.join(path, name)
    return own if os.path.exists(own) else os.path.join(base_of(path), name)


def _table(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as text:
            table = json.load(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: no JSON ({error}); it is torn or was edited. Copy or download it again"
        ) from None
    if not isinstance(table, dict):
        raise ValueError(f"{file}: {type(table).__name__} in JSON; want an object")
    return table


def _base(folder: str, file: str, name: Any) -> str:
    """Absolute, relative to the adapter's folder, or relative to the working directory."""
    tried = [os.path.expanduser(name)] if isinstance(name, str) and name else []
    for base in [os.path.join(folder, t) for t in tried] + [os.path.abspath(t) for t in tried]:
        if os.path.isfile(os.path.join(base, CONFIG)):
            raise ValueError(
                f"{file}: its base {base} is an adapter, too; merge that one first: "
                f"python -m reflux.trainer.merge {base} OUT"
            )
        if os.path.isfile(os.path.join(base, "config.json")):
            return os.path.normpath(base)
    raise ValueError(
        f"{file}: base_model_name_or_path = {name!r}: no config.json there. Write the local folder "
        "of the base model there; ids of the hub are not downloaded"
    )
