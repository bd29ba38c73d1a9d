"""Tokenizers from files, without loading a model: the path decides the reader.

    folder              AutoTokenizer where it is one of transformers, else the one tokenizer file
                        in it
    tokenizer.json      tokenizers.Tokenizer
    *.model*            SentencePieceProcessor, or ranks (Llama-3's are)
    *.tiktoken          ranks: base64 bytes and an id
    *tekken*.json       Mistral's ranks after its special tokens
    rwkv_vocab*.txt     RWKV World: literals
    *.gguf              tokens, their types, the model's family

Files of ranks list no splitting rule, and GGUF none that runs without its engine. Their
TokenizerDescription has no encoder and cannot be verified on probe texts; what is checked instead
is that its text pieces can spell any byte.
"""

import ast
import base64
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .gguf_metadata import read_metadata
from .table_readers import (
    CONTROL,
    TEXT,
    UNKNOWN,
    UNUSED,
    TokenizerDescription,
    byte_of,
    read_ranks,
    spell_byte_level,
    spell_sentencepiece,
)

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*\n")
# by preference
FOLDER_PATTERNS = (
    "*tekken*.json",
    "tokenizer.model*",
    "*.model",
    "*.tiktoken",
    "rwkv_vocab*.txt",
    "*.gguf",
)
# normal, unknown, control, user-defined, unused, byte
GGUF_KIND = {1: TEXT, 2: UNKNOWN, 3: CONTROL, 4: TEXT, 5: UNUSED, 6: TEXT}
# the bytes of UTF-8 without control characters and empty planes
NEEDED_BYTES = (*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))


def load(path: str | PathLike) -> Any:
    """The tokenizer of a file or folder: an object that `ByteTable.of` and `encode_text` take.

    ValueError: no such path, an unknown kind of file, a file that is not what its name says.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ValueError(
            f"ByteTable: no file or folder {str(path)!r}. Names on a hub are not fetched here: "
            "give the folder of a downloaded tokenizer, or the object from "
            "AutoTokenizer.from_pretrained(name)."
        )
    for matches, reader in _BY_NAME:
        if matches(path.name.lower()):
            return reader(path)
    raise ValueError(
        f"ByteTable: {path.name!r} is no tokenizer file known here; want tokenizer.json, *.model, "
        "*.tiktoken, *tekken*.json, rwkv_vocab*.txt, *.gguf, or their folder."
    )


def _load_folder(folder: Path) -> Any:
    if (folder / "tokenizer_config.json").is_file():
        # slow to import; it may rebuild what tokenizer.json says
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / "tokenizer.json").is_file():
        return load(folder / "tokenizer.json")
    for pattern in FOLDER_PATTERNS:
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return load(files[0])
        if files:
            raise ValueError(
                f"ByteTable: {str(folder)!r} holds {[f.name for f in files]}; give the path of one "
                "of them."
            )
    raise ValueError(
        f"ByteTable: no tokenizer in {str(folder)!r}; want tokenizer.json or one of "
        f"{', '.join(FOLDER_PATTERNS)}."
    )


def _load_json(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"ByteTable: {str(path)!r} is not a tokenizer of the tokenizers library: {error}"
        ) from error


def _load_model(path: Path) -> Any:
    with path.open("rb") as file:
        if RANK_LINE.fullmatch(file.readline(1000)):
            return _load_ranks(path)
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f"ByteTable: {str(path)!r} needs the package sentencepiece (pip install sentencepiece)."
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"ByteTable: {str(path)!r} is neither a SentencePiece model nor a file of ranks: "
            f"{error}"
        ) from error


def _load_ranks(path: Path) -> TokenizerDescription:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            if line.strip():
                raise ValueError(
                    f"ByteTable: {path.name}, line {number}: {line[:60]!r} is not base64 bytes and "
                    "a rank."
                ) from error
    return _spells_every_byte(read_ranks(ranks), path)


def _load_tekken(path: Path) -> TokenizerDescription:
    try:
        listed = json.loads(path.read_bytes())
        config = listed["config"]
        special, size = config["default_num_special_tokens"], config["default_vocab_size"]
        used = listed["vocab"][: size - special]  # more are listed than are in use
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in used}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"ByteTable: {path.name!r} is not a tekken file: {error!r}.") from error
    names = {t["rank"]: t["token_str"] for t in listed.get("special_tokens") or ()}
    pieces = [names.get(i, f"<SPECIAL_{i}>").encode() for i in range(special)] + list(ranks)
    kind = np.repeat(np.array([CONTROL, TEXT], np.int8), [special, len(ranks)])
    if len(ranks) != size - special or list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"ByteTable: {path.name} lists {len(ranks)} distinct pieces, want {size - special} "
            "with ranks in order."
        )
    encode = _tiktoken_encoder(path.stem, config["pattern"], ranks, special)
    return _spells_every_byte(TokenizerDescription(pieces, kind, "ranks", encode), path)


def _tiktoken_encoder(
    name: str, pattern: str, ranks: dict[bytes, int], offset: int
) -> Callable[[str], list[int]] | None:
    try:
        import tiktoken
    except ImportError:
        return None
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: [i + offset for i in encoding.encode_ordinary(text)]


def _load_rwkv(path: Path) -> TokenizerDescription:
    ranks = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            begin, end = line.index(" "), line.rindex(" ")
            literal = ast.literal_eval(line[begin:end].strip())
            piece = literal.encode() if isinstance(literal, str) else literal
            complete = len(piece) == int(line[end:])
            ranks[piece] = int(line[:begin])
        except (ValueError, SyntaxError, AttributeError) as error:
            raise ValueError(
                f"ByteTable: {path.name}, line {number}: {line[:60]!r} is not an id, a literal and "
                "its length."
            ) from error
        if not complete:
            raise ValueError(
                f"ByteTable: {path.name}, line {number}: {piece!r} has {len(piece)} bytes, want "
                f"the{line[end:]} of its line."
            )
    # id 0 ends a text
    return _spells_every_byte(read_ranks(ranks, encode=greedy_encoder(ranks), stop_ids=(0,)), path)


def greedy_encoder(ranks: dict[bytes, int]) -> Callable[[str], list[int]]:
    """Longest match from the left, RWKV World's rule. `ranks` has every byte of the texts."""
    lengths: defaultdict[bytes, set[int]] = defaultdict(set)  # by the first two bytes: few to try
    for piece in ranks:
        lengths[piece[:2]].add(len(piece))
    longest_first = {start: sorted(sizes, reverse=True) for start, sizes in lengths.items()}

    def encode(text: str) -> list[int]:
        data, at, ids = text.encode(), 0, []
        while at < len(data):
            tries = longest_first.get(data[at : at + 2], ())
            piece = next((p for n in tries if (p := data[at : at + n]) in ranks), data[at : at + 1])
            ids.append(ranks[piece])
            at += len(piece)
        return ids

    return encode


def _load_gguf(path: Path) -> TokenizerDescription:
    fields = read_metadata(path, prefix="tokenizer.ggml.")
    model, tokens = fields.get("model"), fields.get("tokens")
    if model not in ("gpt2", "llama", "t5") or not tokens:
        raise ValueError(
            f"ByteTable: {path.name} has a tokenizer of the kind {model!r} and {len(tokens or ())} "
            "tokens; known kinds: gpt2 (byte-level BPE), llama and t5 (SentencePiece). Give the "
            "tokenizer that the file was made from."
        )
    types = fields.get("token_type", np.ones(len(tokens), np.int32)).tolist()
    if len(types) != len(tokens) or not set(types) <= set(GGUF_KIND):
        raise ValueError(
            f"ByteTable: {path.name} has {len(tokens)} tokens and {len(types)} types in "
            f"{sorted(set(types))}; want one of {sorted(GGUF_KIND)} for each token."
        )
    pieces = [_spell_gguf(model, name.decode(), t) for name, t in zip(tokens, types, strict=True)]
    prefix = bool(fields.get("add_space_prefix", model != "gpt2"))
    described = TokenizerDescription(
        pieces,
        np.array([GGUF_KIND[t] for t in types], np.int8),
        "byte_level" if model == "gpt2" else "sentencepiece",
        byte_ids=tuple(i for i, t in enumerate(types) if t == 6),
        space_prefix=prefix,
    )
    return _spells_every_byte(described, path)


def _spell_gguf(model: str, name: str, token_type: int) -> bytes:
    if token_type == 6:
        return byte_of(name)
    if token_type in (2, 5):
        return b""
    if token_type == 3:
        return name.encode()
    if model == "gpt2":
        # user-defined: matched as it is written
        return spell_byte_level(name) if token_type == 1 else name.encode()
    return spell_sentencepiece(name)


def _spells_every_byte(described: TokenizerDescription, path: Path) -> TokenizerDescription:
    """The check that needs no encoder: with every byte as a piece every text can be spelled."""
    single = {
        p[0]
        for p, k in zip(described.pieces, described.kind.tolist(), strict=True)
        if k == TEXT and len(p) == 1
    }
    missing = [b for b in NEEDED_BYTES if b not in single]
    if missing:
        raise ValueError(
            f"ByteTable: {path.name} has no piece for {len(missing)} of the bytes that texts need, "
            f"first {missing[0]:#04x}: it would lose them. Is the file whole?"
        )
    return described


_BY_NAME: Sequence[tuple[Callable[[str], bool], Callable[[Path], Any]]] = (
    (lambda name: "tekken" in name and name.endswith(".json"), _load_tekken),
    (lambda name: name.endswith(".json"), _load_json),
    (lambda name: name.endswith(".tiktoken"), _load_ranks),
    (lambda name: name.endswith(".gguf"), _load_gguf),
    (lambda name: name.startswith("rwkv_vocab") and name.endswith(".txt"), _load_rwkv),
    (lambda name: ".model" in name, _load_model),
)
