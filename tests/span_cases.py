"""Drawn tokenizations of one text, and their spans by brute force."""

import itertools
from itertools import accumulate

import numpy as np
from hypothesis import strategies as st
from tokenizer_fixtures import byte_level, metaspace, sentencepiece, table_of

from reflux.tokenalign.byte_table import TEXT, ByteTable, encode_text
from reflux.tokenalign.offsets import Side, side
from reflux.tokenalign.spans import align_spans


def cut(draw, text):
    """A repeated cut is a token of no bytes."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=len(text) + 2)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def tokenizations(draw, count=2):
    """One byte string cut in `count` independent ways."""
    text = draw(st.binary(min_size=1, max_size=40))
    return tuple(cut(draw, text) for _ in range(count))


def side_of(pieces, skip=0):
    table = ByteTable(tuple(pieces), np.full(len(pieces), TEXT, np.int8), "byte_level")
    return Side(table, np.arange(len(pieces), dtype=np.int32), skip, True)


def align(pieces_a, pieces_b):
    return align_spans([side_of(pieces_a)], [side_of(pieces_b)])[0]


def ends(pieces):
    return list(accumulate(map(len, pieces)))


def by_brute_force(pieces_a, pieces_b):
    """Boundaries and spans by the definition in spans.py, for sides of any two lengths."""
    bounds = sorted(set(ends(pieces_a)) & set(ends(pieces_b)) - {0})

    def spans(pieces):
        starts, total = [0, *ends(pieces)][: len(pieces)], len(b"".join(pieces))
        past = len(bounds) - 1 if bounds and bounds[-1] == total else -1
        return [
            k if k < len(bounds) else past for k in (sum(b <= s for b in bounds) for s in starts)
        ]

    return bounds, spans(pieces_a), spans(pieces_b)


def span_bytes(got):
    """(begin, end) of each span in the source."""
    return list(zip([0, *got.bounds.tolist()], got.bounds.tolist(), strict=False))


def same(one, two):
    return all(
        np.array_equal(getattr(one, f), getattr(two, f))
        for f in ("span_a", "span_b", "bounds", "exact")
    )


@st.composite
def ragged_rows(draw):
    """Rows of equal text, of different texts and of no text."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        text = draw(st.binary(max_size=24))
        other = draw(
            st.sampled_from([text, text + b"tail", text[:5], b"", draw(st.binary(max_size=12))])
        )
        rows.append((cut(draw, text) if text else [], cut(draw, other) if other else []))
    return rows


TOKENIZERS = {
    "byte level": byte_level,
    "characters": lambda: byte_level(size=258),
    "byte level, prefix": lambda: byte_level(prefix=True),
    "SentencePiece BPE": lambda: sentencepiece("bpe"),
    "SentencePiece Unigram": lambda: sentencepiece("unigram"),
    "SentencePiece, no prefix": lambda: sentencepiece("unigram", False),
    "Metaspace": lambda: metaspace("bpe", "first"),
    "Prepend": lambda: metaspace("bpe", "legacy"),
}


PAIRS = list(itertools.combinations(TOKENIZERS, 2))


def encoded(name, text):
    tokenizer = TOKENIZERS[name]()
    return side(table_of(tokenizer), encode_text(tokenizer, text), text.encode())
