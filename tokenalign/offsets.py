"""What a sequence of ids spells, and one side of an alignment: ids whose bytes are those of a shared source text.

The source is the bytes of the side that *produced* the ids (the sampler), never a re-encoding of its text. The other side encodes
the source, and its ids must give the same bytes back; a side that does not says so and is not repaired by guessing.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .byte_table import TEXT, ByteTable


@dataclass(frozen=True)
class Spelled:
    """The text of a sequence of ids."""

    bytes: bytes  # what the ids spell, up to the last whole character
    text: str | None  # the same as strict UTF-8; None when it is not UTF-8, and then no other model can score it
    cut: bool  # the ids end inside a character (a length stop); its first bytes were left out


@dataclass(frozen=True, eq=False)
class Side:
    """One tokenization of the source text, ready for `align_spans`."""

    table: ByteTable
    ids: np.ndarray  # int32 [n]; -1 where a token is outside every span: masked, control, unknown
    skip: int  # 1 when the first token with bytes starts with a space that the tokenizer put before the text, else 0
    reproduces: bool  # the ids spell the source (and at most the start of a cut character after it)

    @property
    def lens(self) -> np.ndarray:
        """int32 [n], bytes of each token in the source."""
        lens = np.where(self.ids >= 0, self.table.lens[self.ids], 0).astype(np.int32)
        first = np.flatnonzero(lens)[:1]
        lens[first] -= self.skip
        return lens


def spell(table: ByteTable, ids: Sequence[int]) -> Spelled:
    """Bytes and strict UTF-8 text of `ids`; ids that are not TEXT (stop, template) spell nothing."""
    raw = table.bytes_of(ids)
    whole = _whole_characters(raw)
    try:
        text = raw[:whole].decode()
    except UnicodeDecodeError:
        return Spelled(raw, None, False)
    return Spelled(raw[:whole], text, whole < len(raw))


def side(table: ByteTable, ids: Sequence[int], source: bytes) -> Side:
    """The ids of one tokenizer as a side of an alignment over `source`.

    ids: [n], -1 for a token to leave out. Control, unknown and unused ids are left out too.
    A tokenizer that may put a space before a text did so iff its ids spell b" " + source; that space belongs to no side.
    Look at `.reproduces` before using a score: it is False when a normaliser, an unknown character or another text got between
    the ids and the source. ValueError for an id outside the table.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)  # checked against the table before it is narrowed
    spelled = table.bytes_of(ids.tolist())
    skip = int(table.space_prefix and not _continues(spelled, source) and _continues(spelled, b" " + source))
    reproduces = bool(skip) or _continues(spelled, source)
    text_ids = np.where((ids >= 0) & (table.kind[ids] == TEXT), ids, -1).astype(np.int32)
    return Side(table, text_ids, skip, reproduces)


def _continues(spelled: bytes, source: bytes) -> bool:
    """spelled = source, or source and then the start of a character that was never finished."""
    return spelled.startswith(source) and _whole_characters(spelled[len(source):]) == 0


def _whole_characters(raw: bytes) -> int:
    """How many leading bytes are left when a character cut off by the end of `raw` is dropped."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return error.start
    return len(raw)
