"""Any tokenizer as a table: what bytes does each id spell?

The table is the only thing that alignment needs to know of a tokenizer. It is built from the loaded
object's own description (`table_readers`) or from its file (`table_files`), never from `decode`,
which turns half a character into U+FFFD. It is verified on 22 probe texts every time it is built,
and every time it is read from the cache (`table_cache`).

V: vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from os import PathLike
from typing import Any

import numpy as np

from .table_readers import (
    CONTROL,
    LOSSY,
    MARK,
    TEXT,
    UNKNOWN,
    UNUSED,
    AddedText,
    TokenizerDescription,
    encode_text,
    normalizer_of,
    read,
    reads_names,
)

__all__ = [
    "CONTROL",
    "MARK",
    "PROBES",
    "TEXT",
    "UNKNOWN",
    "UNUSED",
    "ByteTable",
    "Pieces",
    "encode_text",
    "normalizer_of",
]

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


class Pieces(Sequence[bytes]):
    """The bytes of each id, in one buffer; made into objects at the first look at one of them."""

    def __init__(self, data: bytes, lens: np.ndarray):
        """data: all pieces joined. lens: int32 [V]. ValueError when they do not fit."""
        if (lens < 0).any() or int(lens.sum()) != len(data):
            raise ValueError(
                f"Pieces: {len(data)} bytes for pieces of {int(lens.sum())} bytes together."
            )
        self.data, self.lens, self.bytes_array = data, lens, np.frombuffer(data, np.uint8)
        self.begin = np.concatenate([[0], np.cumsum(lens, dtype=np.int64)])

    @classmethod
    def of(cls, pieces: Sequence[bytes]) -> "Pieces":
        if isinstance(pieces, Pieces):
            return pieces
        return cls(b"".join(pieces), np.fromiter(map(len, pieces), np.int32, len(pieces)))

    @cached_property
    def _objects(self) -> tuple[bytes, ...]:
        begin = self.begin.tolist()
        return tuple(self.data[a:b] for a, b in zip(begin, begin[1:]))

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, i):
        return self._objects[i]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._objects)


@dataclass(frozen=True, eq=False)
class ByteTable:
    """What each id of one tokenizer spells. Compare tables by `fingerprint()`."""

    # [V]; a CONTROL id has its literal name for display, UNKNOWN and UNUSED are b""
    pieces: Sequence[bytes]
    kind: np.ndarray  # int8 [V], TEXT, CONTROL, UNKNOWN or UNUSED
    # "byte_level", "sentencepiece", "ranks", "bytes"; lossy: "wordpiece", "word_suffix"
    family: str
    # may put one space before a text; whether it did is decided text by text (offsets.side)
    space_prefix: bool = False
    # sha256 of the probes as the tokenizer normalises them; "" for a file that does not say
    normalizer: str = ""
    # ids of one raw byte beside an ordinary piece of that byte (SentencePiece's <0x41>)
    byte_ids: tuple[int, ...] = ()
    # added tokens that take whitespace beside them out of the text: reports name them
    swallows_spaces: tuple[str, ...] = ()
    # added tokens of text beside which whitespace is swallowed, or a space may be put in front
    added: tuple[AddedText, ...] = ()
    packed: Pieces = field(init=False)  # `pieces` in one buffer
    lens: np.ndarray = field(init=False)  # int32 [V], bytes of a TEXT id, else 0
    first_byte: np.ndarray = field(init=False)  # int16 [V], 256 where lens is 0

    def __post_init__(self) -> None:
        pieces = Pieces.of(self.pieces)
        if len(pieces) != len(self.kind):
            raise ValueError(f"ByteTable: {len(pieces)} pieces and {len(self.kind)} kinds.")
        lens = np.where(self.kind == TEXT, pieces.lens, 0).astype(np.int32)
        first_byte = np.full(len(lens), 256, np.int16)
        first_byte[lens > 0] = pieces.bytes_array[pieces.begin[:-1][lens > 0]]
        computed = {"pieces": pieces, "packed": pieces, "lens": lens, "first_byte": first_byte}
        for name, value in computed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, tokenizer: Any, *, lossy: bool = False) -> "ByteTable":
        """Build and verify the table of a tokenizer: a loaded object (`table_readers.read` lists
        which) or a path.

        A path may be a folder, tokenizer.json, *.model, *.tiktoken, *tekken*.json, rwkv_vocab*.txt
        or *.gguf (`table_files`). WordPiece and word-suffix BPE lose spaces or case, so the ids do
        not say what bytes they stand for: refused unless `lossy`, and then only to be anchored in a
        text by what both have in common. ValueError: a family that is not recognised, a table that
        does not spell a probe, a path without a tokenizer.
        """
        if isinstance(tokenizer, (str, PathLike)):
            from .table_files import load  # most callers have a loaded object, not a path

            tokenizer = load(tokenizer)
        described = read(tokenizer)
        if described.family in LOSSY and not lossy:
            raise ValueError(
                f"ByteTable: {type(tokenizer).__name__} is of the lossy family "
                f"{described.family!r}: spaces, and often case and accents, do not survive its "
                "encoding, so its scores are not of the text's bytes. Use another model; or, to "
                "look at its pieces, ByteTable.of(tokenizer, lossy=True)."
            )
        table = cls(
            described.pieces,
            described.kind,
            described.family,
            bool(described.space_prefix),
            "",
            described.byte_ids,
            described.swallows_spaces,
            described.added,
        )
        return table if described.encode is None else table._observed(described, described.encode)

    def _observed(
        self, described: TokenizerDescription, encode: Callable[[str], Sequence[int]]
    ) -> "ByteTable":
        """Verified on the probes, with the space prefix and normaliser that `encode` shows."""
        prefix = described.space_prefix
        if prefix is None:
            prefix = self.bytes_of(encode("x")) == b" x"
        added = [row._replace(restarts=row.restarts and prefix) for row in self.added]
        table = replace(
            self,
            space_prefix=prefix,
            normalizer=_fingerprint_of(described.normalize),
            added=tuple(row for row in added if row.left or row.right or row.restarts),
        )
        table.verify(encode, _probes(described.reads_names), described.normalize)
        return table

    def verify_tokenizer(self, tokenizer: Any) -> None:
        """ValueError unless this is the table of `tokenizer`, by the 22 probes; some milliseconds.

        Takes what `of` takes, loaded, with an encoder.
        """
        normalize = normalizer_of(tokenizer)
        if _fingerprint_of(normalize) != self.normalizer:
            raise ValueError("ByteTable: the tokenizer normalises the probes in another way.")
        self.verify(partial(encode_text, tokenizer), _probes(reads_names(tokenizer)), normalize)

    @property
    def lossy(self) -> bool:
        """The ids do not spell their text, not even up to a normaliser."""
        return self.family in LOSSY

    def __len__(self) -> int:
        return len(self.kind)

    @cached_property
    def blob(self) -> tuple[np.ndarray, np.ndarray]:
        """All TEXT pieces in one uint8 array, and int64 [V + 1] where each begins."""
        begin = np.concatenate([[0], np.cumsum(self.lens, dtype=np.int64)])
        return self.packed.bytes_array[np.repeat(self.kind == TEXT, self.packed.lens)], begin

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` spell; -1 and ids that are not TEXT spell none.

        ValueError for an id outside the table.
        """
        given = np.array(list(ids), np.int64)
        outside = np.flatnonzero((given < -1) | (given >= len(self)))
        if len(outside):
            at = outside[0]
            raise ValueError(
                f"ByteTable.bytes_of: id {given[at]} at position {at} is outside this table of "
                f"{len(self)} ids. Rows of a padded head have no token; is this another "
                "tokenizer's id?"
            )
        text_ids = given[given >= 0]
        lens = self.lens[text_ids]
        within = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        return self.packed.bytes_array[
            np.repeat(self.packed.begin[text_ids], lens) + within
        ].tobytes()

    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> id over TEXT. Of equal spellings: the ordinary piece, then the lowest id."""
        text = np.flatnonzero(self.lens > 0)
        last = np.isin(text, self.byte_ids)
        order = np.concatenate([text[~last], text[last]])[::-1]  # the first choice is set last
        return {self.pieces[i]: i for i in order.tolist()}

    def with_control(self, names: Mapping[str, int]) -> "ByteTable":
        """The table with control ids that its file does not list (a file of ranks names none). Ids
        between become UNUSED.

        ValueError when an id already spells text.
        """
        size = max(len(self), 1 + max(names.values(), default=-1))
        pieces = [*self.pieces, *[b""] * (size - len(self))]
        kind = np.full(size, UNUSED, np.int8)
        kind[: len(self)] = self.kind
        for name, i in names.items():
            if kind[i] == TEXT:
                raise ValueError(
                    f"ByteTable.with_control: id {i} ({name!r}) already spells {pieces[i]!r}; is "
                    "it of another vocabulary?"
                )
            pieces[i], kind[i] = name.encode(), CONTROL
        return replace(self, pieces=pieces, kind=kind)

    def fingerprint(self) -> str:
        """sha256 of pieces, kinds, space prefix and normaliser: equal where all ids spell alike."""
        h = hashlib.sha256(
            f"{self.space_prefix}|{self.normalizer}|{self.lossy}|{len(self)}|".encode()
        )
        for part in (self.kind.astype("i1"), self.packed.lens.astype("<i4"), self.packed.data):
            h.update(part)
        return h.hexdigest()

    def verify(
        self,
        encode: Callable[[str], Sequence[int]],
        probes: Iterable[str],
        normalize: Callable[[str], str] = str,
    ) -> None:
        """ValueError unless the table spells N(probe) for every probe.

        N is `normalize`. Spaces that the tokenizer puts in front of a stretch, and whitespace that
        its added tokens swallow, are allowed for. A lossy table has to spell N(probe) up to
        whitespace, where it knows every character of it.
        """
        for probe in probes:
            ids = list(encode(probe))
            want = normalize(probe)
            if not (
                self._spells_up_to_spaces(ids, want) if self.lossy else self._spells(ids, want)
            ):
                raise ValueError(
                    f"ByteTable: this {self.family} tokenizer does not spell {probe!r}: its ids "
                    f"spell {self.bytes_of(ids)!r}, want {want.encode()!r}. Without the bytes of "
                    "every id its scores cannot be compared with another tokenizer's. "
                    + self._why_not(ids, want)
                )

    def _spells_up_to_spaces(self, ids: Sequence[int], text: str) -> bool:
        if UNKNOWN in self.kind[np.asarray(ids, np.int64)]:
            return True
        spelled = self.bytes_of(ids).decode(errors="replace")
        return spelled.split() == text.split() or "".join(spelled.split()) == "".join(text.split())

    def _spells(self, ids: Sequence[int], text: str) -> bool:
        """Whether `ids` are an encoding of `text`, whitespace beside `added` tokens apart."""
        want = text.encode()
        if self.bytes_of(ids) == want:
            return True
        behind_spaces = _behind_spaces(text)
        added = {row.id: row for row in self.added}
        reached, at_start = {0}, self.space_prefix  # bytes of `want` spelled so far
        for i in ids:
            piece = self.pieces[i] if i >= 0 and self.kind[i] == TEXT else b""
            row = added.get(i)
            if row and row.left:
                reached |= {behind_spaces[at] for at in reached if at in behind_spaces}
            longer = {at + len(piece) for at in reached if want.startswith(piece, at)}
            if at_start and piece[:1] == b" ":
                longer |= {at + len(piece) - 1 for at in reached if want.startswith(piece[1:], at)}
            reached = longer
            if row and row.right:
                reached |= {behind_spaces[at] for at in reached if at in behind_spaces}
            at_start = bool(row and row.restarts and self.space_prefix) or at_start and not piece
        return len(want) in reached

    def _why_not(self, ids: Sequence[int], text: str) -> str:
        if UNKNOWN in self.kind[np.asarray(ids, np.int64)]:
            return (
                "It has no id for some of these characters. A SentencePiece model trained without "
                "byte_fallback loses what it does not know; such a model cannot be used here."
            )
        spelled = self.bytes_of(ids).decode(errors="replace")
        if "".join(spelled.split()) == "".join(text.split()):
            return (
                "It adds or drops whitespace: a tokenizer that collapses spaces "
                "(remove_extra_whitespaces) cannot be used here."
            )
        return (
            "Were its files changed, or converted from another format? Compare its ids with those "
            "of the library that the model was trained with."
        )


def _behind_spaces(text: str) -> dict[int, int]:
    """Byte position of each character -> that behind the whitespace that begins there."""
    end = len(text.encode())
    behind = {end: end}
    at = end
    for character in reversed(text):
        following = at
        at -= len(character.encode())
        behind[at] = behind[following] if character.isspace() else at
    return behind


def _probes(without_names: bool) -> Sequence[str]:
    """The probes that a tokenizer has to spell.

    Unigram as `tokenizers` runs it reads "</s>" in a text as the token; SentencePiece itself does
    not. Such a text does not give its bytes back, and offsets.side reports it; all others do.
    """
    return [p for p in PROBES if "<" not in p] if without_names else PROBES


def _fingerprint_of(normalize: Callable[[str], str]) -> str:
    """sha256 of the normalised probes."""
    return hashlib.sha256("\0".join(map(normalize, PROBES)).encode()).hexdigest()
