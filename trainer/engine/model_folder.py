"""The Hugging Face folder of every role, before anything is loaded: it is there, its JSON files are
whole, a model can be built from its config.json, its weights are those of that model, and the head
has a row for every id of the tokenizer.

Reads JSON and the headers of weights: a second for a model of 70 billion parameters. Every error is
a ValueError that names the option or the file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchtitan.protocols.model_spec import ModelSpec

from reflux.trainer.adapter_folder import base_of, model_folder, read_adapter, tokenizer_of
from reflux.trainer.config.phases import roles
from reflux.trainer.config.schema import Config

from .adapter_weights import check_adapter, saved_adapter
from .hf_models import buildable, text_config
from .model_builder import build_spec
from .weights import adapter_of, check_weights

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def check_folders(cfg: Config) -> None:
    """The folders of all roles."""
    done = set()
    for role in roles(cfg):
        path = model_folder(role.model.path, role.option)
        random = role.elsewhere or (role.own and cfg.model.from_scratch)
        key = path, role.model.backend, role.model.attention, role.model.liger, random
        if key not in done:
            for folder in sorted({base_of(path), tokenizer_of(path)}):
                check_files(folder)
            m = role.model
            spec = build_spec(path, backend=m.backend, attention=m.attention, liger=m.liger)
            check_model(spec, path, weights=not random)
        done.add(key)


def check_files(path: str) -> None:
    """The JSON files, and the tokenizer's ids."""
    tables = {name: _table(file) for name in JSON_FILES if (file := Path(path) / name).is_file()}
    if not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        # transformers would invent one without a token
        raise ValueError(f"{path}: no tokenizer there; want one of {', '.join(TOKENIZER_FILES)}")
    if "tokenizer.json" in tables:
        _check_ids(Path(path) / "tokenizer.json", tables["tokenizer.json"], path)


def check_model(spec: ModelSpec, path: str, *, weights: bool = True) -> None:
    """The model on the meta device, and the headers of its weights."""
    with torch.device("meta"), buildable(path):
        model = spec.model.build()
    if weights:
        adapter = adapter_of(spec, path)
        state = adapter.to_hf(model.state_dict())
        check_weights(state, path, adapter)
        lora = read_adapter(path)
        if lora is not None:
            with saved_adapter(lora) as saved:
                check_adapter(state, saved)


def _table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: no JSON ({error}); it is torn or was edited. Copy or download it again"
        ) from None
    if not isinstance(table, dict):
        raise ValueError(f"{file}: {type(table).__name__} in JSON; want an object")
    return table


def _check_ids(file: Path, tokenizer: dict[str, Any], path: str) -> None:
    """Control tokens may lie beyond the head: prompts do not hold them (text models made of
    multimodal ones).
    """
    rows = text_config(path).vocab_size
    try:
        token, beyond = max(_ids(tokenizer), key=lambda entry: entry[1], default=("", -1))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: no tokenizer ({type(error).__name__}: {error}); want the file that the "
            "tokenizers library writes"
        ) from None
    if beyond >= rows:
        raise ValueError(
            f"{file}: the token {token!r} has id {beyond}, but the model of config.json has "
            f"vocab_size = {rows}. Take the tokenizer that belongs to the weights"
        )


def _ids(tokenizer: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens that a text can become, with their ids."""
    control = {t["id"] for t in tokenizer.get("added_tokens") or () if t["special"]}
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()}
    return ((token, int(i)) for token, i in (vocab | added).items() if i not in control)
