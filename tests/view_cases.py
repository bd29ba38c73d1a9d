"""Aligned pairs to draw."""

from span_cases import side_of
from tokenizer_fixtures import table_of

from reflux.tokenalign.byte_table import encode_text
from reflux.tokenalign.offsets import side
from reflux.tokenalign.spans import align_spans


def aligned(pieces_a, pieces_b, **skips):
    a, b = side_of(pieces_a, skips.get("skip_a", 0)), side_of(pieces_b)
    return a, b, align_spans([a], [b])[0]


def encoded(tokenizer_a, tokenizer_b, text):
    a, b = (
        side(table_of(t), encode_text(t, text), text.encode()) for t in (tokenizer_a, tokenizer_b)
    )
    assert a.reproduces and b.reproduces
    return a, b, align_spans([a], [b])[0]
