"""Drawn pairs of vocabularies, for several test files."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from reflux.tokenalign.byte_table import CONTROL, TEXT, ByteTable
from reflux.tokenalign.vocab_map import Vocabulary

PIECES = st.lists(
    st.lists(st.sampled_from(b"ab \xc2\xa9"), min_size=1, max_size=4).map(bytes), max_size=12
)


def table_of(pieces, controls=1, family="byte_level"):
    kind = [TEXT] * len(pieces) + [CONTROL] * controls
    return ByteTable(
        (*pieces, *(f"<{k}>".encode() for k in range(controls))), np.array(kind, np.int8), family
    )


def longest_first(text: str, pieces: Sequence[str]) -> tuple[int, ...]:
    ids: list[int] = []
    while text:
        piece = max((p for p in pieces if text.startswith(p)), key=len)
        ids.append(pieces.index(piece))
        text = text[len(piece) :]
    return tuple(ids)


@st.composite
def vocabularies(draw):
    """Drawn pieces with duplicates, some single bytes, a stop id, a control id, padding rows."""
    pieces = draw(PIECES) + [bytes([b]) for b in draw(st.permutations(b"ab \xc2\xa9"))]
    table = table_of(pieces, controls=2)
    return Vocabulary(table, (len(pieces),), len(table) + draw(st.integers(0, 3)))


pairs = st.tuples(vocabularies(), vocabularies())
