"""Any tokenizer as a table: what bytes does each id spell?

The table is the only thing that alignment needs to know of a tokenizer. It is built from the loaded
object's own description (`table_readers`) or from its file (`table_files`), never from `decode`,
which turns half a character into U+FFFD, and it proves itself on 22 probe texts every time it is
built.

V: vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
    Reading,
    encode_text,
    normalizer_of,
    read,
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
    """The bytes of each id, in one buffer; made into objects only when somebody looks at them one
    by one.
    """

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
        return (
            pieces
            if isinstance(pieces, Pieces)
            else cls(b"".join(pieces), np.fromiter(map(len, pieces), np.int32, len(pieces)))
        )

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

    # [V]; a CONTROL id keeps its literal name for display, UNKNOWN and UNUSED are b""
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
    # added tokens that take whitespace beside them out of the text: name them in reports
    swallows_spaces: tuple[str, ...] = ()
    lens: np.ndarray = field(init=False)  # int32 [V], bytes of a TEXT id, else 0
    first_byte: np.ndarray = field(init=False)  # int16 [V], 256 where lens is 0

    def __post_init__(self) -> None:
        pieces = Pieces.of(self.pieces)
        if len(pieces) != len(self.kind):
            raise ValueError(f"ByteTable: {len(pieces)} pieces and {len(self.kind)} kinds.")
        lens = np.where(self.kind == TEXT, pieces.lens, 0).astype(np.int32)
        first_byte = np.full(len(lens), 256, np.int16)
        first_byte[lens > 0] = pieces.bytes_array[pieces.begin[:-1][lens > 0]]
        for name, value in (("pieces", pieces), ("lens", lens), ("first_byte", first_byte)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, tokenizer: Any, *, lossy: bool = False) -> "ByteTable":
        """Build and verify the table of a tokenizer: a loaded object (`table_readers.read` lists
        which) or a path.

        A path may be a folder, tokenizer.json, *.model, *.tiktoken, *tekken*.json, rwkv_vocab*.txt
        or *.gguf (`table_files`; `table_cache.cached_table` keeps its table).
        WordPiece and word-suffix BPE lose spaces or case, so the ids do not say what bytes they
        stand for: refused unless `lossy`, and then only to be anchored in a text by what both have
        in common. ValueError: a family that is not recognised, a table that does not spell a probe,
        a path without a tokenizer.
        """
        if isinstance(tokenizer, (str, PathLike)):
            from .table_files import load  # reading files is for those who have paths

            tokenizer = load(tokenizer)
        reading = read(tokenizer)
        if reading.family in LOSSY and not lossy:
            raise ValueError(
                f"ByteTable: {type(tokenizer).__name__} is of the lossy family {reading.family!r}: "
                "spaces, and often case and accents, do not survive its encoding, so its scores "
                "are not of the text's bytes. Use another model; or, to look at its "
                "pieces, ByteTable.of(tokenizer, lossy=True)."
            )
        table = cls(
            reading.pieces,
            reading.kind,
            reading.family,
            bool(reading.space_prefix),
            "",
            reading.byte_ids,
            reading.swallows_spaces,
        )
        return table._checked(reading) if reading.encode else table

    def _checked(self, reading: Reading) -> "ByteTable":
        """With the habits that descriptions name in half a dozen ways observed rather than read,
        and proved on the probes.
        """
        habits = hashlib.sha256("\0".join(map(reading.normalize, PROBES)).encode()).hexdigest()
        prefix = reading.space_prefix
        if prefix is None:
            prefix = self.bytes_of(reading.encode("x")) == b" x"
        table = replace(self, space_prefix=prefix, normalizer=habits)
        # Unigram as `tokenizers` runs it reads "</s>" in a text as the token; SentencePiece itself
        # does not. Such a text does not give its bytes back, and offsets.side says so; every other
        # text does.
        probes = [p for p in PROBES if "<" not in p] if reading.reads_names else PROBES
        table.verify(reading.encode, probes, reading.normalize)
        return table

    @property
    def lossy(self) -> bool:
        """The ids do not spell their text, not even up to a normaliser: positions need an anchor in
        the text itself.
        """
        return self.family in LOSSY

    def __len__(self) -> int:
        return len(self.kind)

    @cached_property
    def blob(self) -> tuple[np.ndarray, np.ndarray]:
        """The native core's form: all TEXT pieces in one uint8 array, and int64 [V + 1] where each
        begins.
        """
        begin = np.concatenate([[0], np.cumsum(self.lens, dtype=np.int64)])
        return self.pieces.bytes_array[np.repeat(self.kind == TEXT, self.pieces.lens)], begin

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` spell; -1 and ids that are not TEXT spell none. ValueError for an id
        outside the table.
        """
        ids = np.array(list(ids), np.int64)
        outside = np.flatnonzero((ids < -1) | (ids >= len(self)))
        if len(outside):
            at = outside[0]
            raise ValueError(
                f"ByteTable.bytes_of: id {ids[at]} at position {at} is outside this table of "
                f"{len(self)} ids. Rows of a padded head have no token; is this another "
                "tokenizer's id?"
            )
        ids = ids[ids >= 0]
        lens = self.lens[ids]
        within = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        return self.pieces.bytes_array[np.repeat(self.pieces.begin[ids], lens) + within].tobytes()

    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> id over TEXT. Of equal spellings the ordinary piece beats the byte's own token,
        then the lowest id wins.
        """
        text = np.flatnonzero(self.lens > 0)
        last = np.isin(text, self.byte_ids)
        order = np.concatenate([text[~last], text[last]])[::-1]  # the winner is written last
        return {self.pieces[i]: i for i in order.tolist()}

    def with_control(self, names: Mapping[str, int]) -> "ByteTable":
        """The table with control ids that its file does not list: a file of ranks names none. Ids
        between become UNUSED.

        ValueError when an id already spells text.
        """
        size = max(len(self), 1 + max(names.values(), default=-1))
        pieces, kind = [*self.pieces, *[b""] * (size - len(self))], np.full(size, UNUSED, np.int8)
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
        """sha256 over pieces, kinds, space prefix and normaliser: equal for two tokenizers that
        spell alike, id by id.
        """
        h = hashlib.sha256(
            f"{self.space_prefix}|{self.normalizer}|{self.lossy}|{len(self)}|".encode()
        )
        for part in (self.kind.astype("i1"), self.pieces.lens.astype("<i4"), self.pieces.data):
            h.update(part)
        return h.hexdigest()

    def verify(
        self,
        encode: Callable[[str], Sequence[int]],
        probes: Iterable[str],
        normalize: Callable[[str], str] = str,
    ) -> None:
        """ValueError unless the table spells N(probe), or a space and N(probe), for every probe. N
        is `normalize`.

        A lossy table has to spell N(probe) up to whitespace, where it knows every character of it.
        """
        for probe in probes:
            ids = encode(probe)
            got, want = self.bytes_of(ids), normalize(probe).encode()
            if self.lossy:
                known = UNKNOWN not in self.kind[np.asarray(ids, np.int64)]
                got, want = (
                    "".join(x.decode(errors="replace").split()).encode() if known else b""
                    for x in (got, want)
                )
            if got != want and not (self.space_prefix and got == b" " + want):
                raise ValueError(
                    f"ByteTable: this {self.family} tokenizer does not spell {probe!r}: its ids "
                    f"spell {got!r}, want {want!r}. Without the bytes of every id its scores "
                    "cannot be compared with another tokenizer's. A SentencePiece model trained "
                    "without byte_fallback loses what it does not know; such a model cannot be "
                    "used here."
                )
