"""Any tokenizer as a table: what bytes does each id spell?

The table is the only thing that alignment needs to know of a tokenizer, and this file is the only one that touches tokenizer
objects. It is built from the loaded object's own description, never from `decode` (which turns half a character into U+FFFD),
and it proves itself on 22 probe texts every time it is built.

    byte-level BPE (GPT-2, Llama-3, Qwen ...)    a piece is a string over 256 stand-in characters, one per byte; an added token
                                                 is literal UTF-8
    SentencePiece (Llama-2, Mistral, Gemma ...)  a piece is UTF-8 with U+2581 for a space; <0x41> is one byte; a space may be
                                                 put in front of the text

V: vocabulary.
"""
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

TEXT, CONTROL, UNKNOWN, UNUSED = 0, 1, 2, 3  # kind[id]: only TEXT spells bytes
MARK = "\u2581"  # SentencePiece's visible space

# Texts that every table must spell. Each is a trap that broke some tokenizer or some aligner.
PROBES = (
    "The quick brown fox.",
    " hello",
    "  hello",
    "hello  ",
    "a\n\nb\r\n\tc",
    "   ",
    "12345 + 678 = 13,023",
    "hi 👩\u200d👩\u200d👧\u200d👦🙂 ok",
    "你好世界。日本語テスト",
    "العربية مرحبا",
    "नमस्ते दुनिया",
    "cafe\u0301 nai\u0308ve",
    "\ufb01 \u2460 \uff21 \u00b2 \u338f",  # compatibility forms, changed by NFKC
    "a\u2581b \u2581c",
    "<0x41> <0x0A>",
    "<|im_end|> </s> <eos> <think>x</think>",
    "def f(x):\n    return x**2  # ok\n",
    r"\frac{a_1}{b^{2}} \geq \sqrt{3}",
    "a\u0000b\u200bc\ufeffd\u00a0e",
    "\ufffd\ufffd",
    "HELLO World ÀÉ",
    "\U0001f9ff𐍈ꙮ\ue000",
)

# Printable Latin-1 stands for itself; the 68 other bytes take U+0100 upwards, in byte order (GPT-2's map).
_SELF = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_CHAR_TO_BYTE = {chr(b): b for b in _SELF} | {chr(0x100 + k): b for k, b in enumerate(sorted({*range(256)} - _SELF))}


@dataclass(frozen=True, eq=False)
class ByteTable:
    """What each id of one tokenizer spells. Compare tables by `fingerprint()`."""

    pieces: tuple[bytes, ...]  # [V]; a CONTROL id keeps its literal name for display, UNKNOWN and UNUSED are b""
    kind: np.ndarray  # int8 [V], TEXT, CONTROL, UNKNOWN or UNUSED
    family: str  # "byte_level" or "sentencepiece"
    space_prefix: bool = False  # may put one space before a text; whether it did is decided text by text (offsets.side)
    normalizer: str = ""  # sha256 of the probes as the tokenizer normalises them
    lens: np.ndarray = field(init=False)  # int32 [V], bytes of a TEXT id, else 0
    first_byte: np.ndarray = field(init=False)  # int16 [V], 256 where lens is 0

    def __post_init__(self) -> None:
        text = [p if k == TEXT else b"" for p, k in zip(self.pieces, self.kind, strict=True)]
        object.__setattr__(self, "lens", np.fromiter(map(len, text), np.int32, len(text)))
        object.__setattr__(self, "first_byte", np.fromiter((p[0] if p else 256 for p in text), np.int16, len(text)))

    @classmethod
    def of(cls, tokenizer: Any) -> "ByteTable":
        """Build and verify the table of a loaded tokenizer.

        Takes a Hugging Face fast tokenizer, a `tokenizers.Tokenizer` or a SentencePieceProcessor.
        Raises ValueError when the family is not recognised or the table does not spell a probe.
        """
        build = _from_sentencepiece if _is_sentencepiece(tokenizer) else _from_backend
        table, normalize = build(tokenizer)
        probes = [p for p in PROBES if "<" not in p] if _matches_names(tokenizer) else PROBES
        table.verify(lambda text: encode_text(tokenizer, text), probes, normalize)
        return table

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def blob(self) -> tuple[np.ndarray, np.ndarray]:
        """The native core's form: all TEXT pieces in one uint8 array, and int64 [V + 1] where each begins."""
        text = b"".join(p for p, k in zip(self.pieces, self.kind, strict=True) if k == TEXT)
        return np.frombuffer(text, np.uint8), np.concatenate([[0], np.cumsum(self.lens, dtype=np.int64)])

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` spell; -1 and ids that are not TEXT spell none. ValueError for an id outside the table."""
        size, pieces, kind = len(self.pieces), self.pieces, self._kinds
        out = []
        for at, i in enumerate(ids):
            if not -1 <= i < size:
                raise ValueError(f"ByteTable.bytes_of: id {i} at position {at} is outside this table of {size} ids. Rows of "
                                 "a padded head have no token; is this another tokenizer's id?")
            if i >= 0 and kind[i] == TEXT:
                out.append(pieces[i])
        return b"".join(out)

    def fingerprint(self) -> str:
        """sha256 over pieces, kinds, space prefix and normaliser: equal for two tokenizers that spell alike, id by id."""
        h = hashlib.sha256(f"{self.space_prefix}|{self.normalizer}".encode())
        for piece, kind in zip(self.pieces, self._kinds, strict=True):
            h.update(b"%d:%d:%b" % (kind, len(piece), piece))
        return h.hexdigest()

    def verify(self, encode: Callable[[str], Sequence[int]], probes: Iterable[str],
               normalize: Callable[[str], str] = str) -> None:
        """ValueError unless the table spells N(probe), or a space and N(probe), for every probe. N is `normalize`."""
        for probe in probes:
            got, want = self.bytes_of(encode(probe)), normalize(probe).encode()
            if got != want and not (self.space_prefix and got == b" " + want):
                raise ValueError(
                    f"ByteTable: this {self.family} tokenizer does not spell {probe!r}: its ids spell {got!r}, want {want!r}. "
                    "Without the bytes of every id its scores cannot be compared with another tokenizer's. A SentencePiece "
                    "model trained without byte_fallback loses what it does not know; such a model cannot be used here.")

    @cached_property
    def _kinds(self) -> bytes:
        return self.kind.tobytes()  # indexing bytes is several times faster than indexing an int8 array


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as content: no special token is added, and one written in the text is encoded as plain characters."""
    if _is_sentencepiece(tokenizer):
        return tokenizer.encode(text, out_type=int, add_bos=False, add_eos=False, reverse=False, enable_sampling=False)
    backend = _backend(tokenizer)
    with _content_mode(backend):
        return backend.encode(text, add_special_tokens=False).ids


def _is_sentencepiece(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "id_to_piece") and hasattr(tokenizer, "is_byte")


def _backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` inside, or the argument itself."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_special_tokens"):
        raise ValueError(f"ByteTable: cannot read a {type(tokenizer).__name__}; want a Hugging Face fast tokenizer, a "
                         "tokenizers.Tokenizer or a SentencePieceProcessor. Load it with AutoTokenizer.from_pretrained(folder).")
    return backend


@contextmanager
def _content_mode(backend: Any) -> Iterator[None]:
    """Special tokens are not parsed, nothing is padded or cut; the caller's settings come back afterwards."""
    special, padding, truncation = backend.encode_special_tokens, backend.padding, backend.truncation
    try:
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        yield
    finally:
        backend.encode_special_tokens = special
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)


def _from_backend(tokenizer: Any) -> tuple[ByteTable, Callable[[str], str]]:
    # The loaded object, not its file: transformers rebuilds pipelines when it loads.
    backend = _backend(tokenizer)
    description = json.loads(backend.to_str())
    family = _family(description)
    pieces, kind = _read_vocabulary(description, family)
    rule = backend.normalizer.normalize_str if backend.normalizer else str
    normalize = (lambda text: rule(text).replace(MARK, " ")) if family == "sentencepiece" else rule
    return _measured(tokenizer, pieces, kind, family, normalize), normalize


def _matches_names(tokenizer: Any) -> bool:
    """Unigram in `tokenizers` reads "</s>" or "<0x41>" in a text as the token of that name; SentencePiece itself does not.

    Such a text does not give its bytes back, and `offsets.side` says so; every other text does.
    """
    return not _is_sentencepiece(tokenizer) and type(_backend(tokenizer).model).__name__ == "Unigram"


def _family(description: dict) -> str:
    """From the structured decoder (a Sequence is looked into); ValueError for a family whose ids do not give bytes."""
    decoder, model = description["decoder"] or {}, description["model"]
    parts = decoder.get("decoders", [decoder])
    types = {part.get("type") for part in parts}
    plain_bpe = model["type"] == "BPE" and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    if "ByteLevel" in types and plain_bpe:
        return "byte_level"
    marks = any(p.get("type") == "Replace" and p.get("pattern") == {"String": MARK} for p in parts)
    if (marks or types & {"ByteFallback", "Metaspace"}) and (plain_bpe or model["type"] == "Unigram"):
        return "sentencepiece"
    raise ValueError(
        f"ByteTable: unrecognised tokenizer family: model {model['type']!r}, decoder {sorted(map(str, types))}. Known: "
        "byte-level BPE (decoder ByteLevel) and SentencePiece BPE or Unigram (decoder Metaspace, ByteFallback or Replace of "
        "U+2581). WordPiece and word-suffix BPE lose spaces or case: their ids do not say what bytes they stand for.")


def _read_vocabulary(description: dict, family: str) -> tuple[list[bytes], np.ndarray]:
    model, added = description["model"], description["added_tokens"]
    vocab = {p: i for i, (p, _) in enumerate(model["vocab"])} if model["type"] == "Unigram" else model["vocab"]
    size = 1 + max([-1, *vocab.values(), *(a["id"] for a in added)])
    pieces, kind = [b""] * size, np.full(size, UNUSED, np.int8)
    byte_fallback = family == "sentencepiece" and model.get("byte_fallback")
    byte_ids = {i for p, i in vocab.items() if byte_fallback and _is_byte_piece(p)}
    for piece, i in vocab.items():
        pieces[i] = _byte_of(piece) if i in byte_ids else _spell(piece, family)
        kind[i] = TEXT
    for token in added:
        i, content = token["id"], token["content"]
        if i not in byte_ids:
            # An added token is matched in the text as it is written, except one that SentencePiece's model knows too
            # (Gemma lists its runs of marks twice).
            known = family == "sentencepiece" and content in vocab
            pieces[i] = _spell(content, family) if known else content.encode()
            kind[i] = CONTROL if token["special"] else TEXT
    unknown = model.get("unk_id") if model["type"] == "Unigram" else vocab.get(model.get("unk_token"))
    if family == "sentencepiece" and unknown is not None:  # byte-level BPE never emits it: GPT-2 names its stop token here
        pieces[unknown], kind[unknown] = b"", UNKNOWN
    return pieces, kind


def _from_sentencepiece(processor: Any) -> tuple[ByteTable, Callable[[str], str]]:
    pieces, kind = [], []
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            pieces.append(_byte_of(piece)), kind.append(TEXT)
        elif processor.is_unknown(i) or processor.is_unused(i):
            pieces.append(b""), kind.append(UNKNOWN if processor.is_unknown(i) else UNUSED)
        elif processor.is_control(i):
            pieces.append(piece.encode()), kind.append(CONTROL)
        else:
            pieces.append(_spell(piece, "sentencepiece")), kind.append(TEXT)
    normalize = lambda text: processor.normalize(text).replace(MARK, " ")
    return _measured(processor, pieces, np.asarray(kind, np.int8), "sentencepiece", normalize), normalize


def _measured(tokenizer: Any, pieces: list[bytes], kind: np.ndarray, family: str,
              normalize: Callable[[str], str]) -> ByteTable:
    """The table with its two habits observed rather than read: descriptions name them in half a dozen ways."""
    habits = hashlib.sha256("\0".join(map(normalize, PROBES)).encode()).hexdigest()
    space_prefix = ByteTable(tuple(pieces), kind, family).bytes_of(encode_text(tokenizer, "x")) == b" x"
    return ByteTable(tuple(pieces), kind, family, space_prefix, habits)


def _spell(piece: str, family: str) -> bytes:
    if family == "sentencepiece":
        return piece.replace(MARK, " ").encode()
    try:
        return bytes(_CHAR_TO_BYTE[c] for c in piece)
    except KeyError:  # a piece outside the alphabet can only have been matched literally
        return piece.encode()


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _byte_of(piece: str) -> bytes:
    return bytes([int(piece[3:5], 16)])
