"""Texts that do not come back from their ids: exactly the spans of changes are not exact."""

import re
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import cut, side_of, span_bytes
from tokenizer_fixtures import byte_level, sentencepiece, table_of
from tokenizers import AddedToken, Tokenizer

from reflux.tokenalign.byte_table import CONTROL, TEXT, UNKNOWN, ByteTable, encode_text
from reflux.tokenalign.offsets import _equal_blocks, side
from reflux.tokenalign.spans import align_spans


def distinct(n, seed):
    """n bytes in which every window of 8 occurs once, in all likelihood."""
    return bytes(np.random.default_rng(seed).integers(97, 123, n, dtype=np.uint8))


@st.composite
def edited(draw):
    """A source, what a side spells instead, and the edits as (begin, end) in the source."""
    parts = [
        distinct(draw(st.integers(24, 40)), draw(st.integers(0, 2**32 - 1)))
        for _ in range(draw(st.integers(2, 4)))
    ]
    source, spelled, windows = b"", b"", []
    for k, part in enumerate(parts):
        source, spelled = source + part, spelled + part
        if k < len(parts) - 1:
            old, new = draw(
                st.sampled_from(
                    [
                        (b"", b"#"),
                        (b"##", b""),
                        (b"#", b"%"),
                        (b"#%#", b"%%%%%"),
                        (b"  ", b" "),
                        (b"#", b""),
                    ]
                )
            )
            windows.append((len(source), len(source) + len(old)))
            source, spelled = source + old, spelled + new
    return source, spelled, windows


@given(edited(), st.data())
def test_spans_outside_the_edits_are_exact_and_no_others(case, data):
    source, spelled, windows = case
    a, b = cut(data.draw, spelled), cut(data.draw, source)
    one, other = (side(side_of(pieces).table, range(len(pieces)), source) for pieces in (a, b))
    assert not one.reproduces and other.reproduces
    got = align_spans([one], [other])[0]
    assert_no_wrong_exact(got, a, b, source)
    truth = unedited_positions(source, spelled, windows)
    common = sorted(
        {truth[e] for e in accumulate(map(len, a)) if e in truth} & set(accumulate(map(len, b)))
    )
    spans = {end: (begin, ok) for (begin, end), ok in zip(span_bytes(got), got.exact, strict=True)}
    for begin, end in zip(common, common[1:], strict=False):
        if all(end < w or begin > v for w, v in windows):
            assert spans[end] == (begin, True)
    for end, (begin, ok) in spans.items():
        assert not (ok and any(begin < v and end > w for w, v in windows if v > w))


def unedited_positions(source, spelled, windows):
    """Position in `spelled` -> position in `source`, strictly inside the unedited parts."""
    positions, at = {}, 0
    edges = [0, *(x for window in windows for x in window), len(source)]
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        at = spelled.index(source[begin:end], at)
        positions |= {at + i: begin + i for i in range(1, end - begin)}
        at += end - begin
    return positions


def assert_no_wrong_exact(got, a, b, source):
    want = [source[begin:end] for begin, end in span_bytes(got)]
    for pieces, span in ((a, got.span_a), (b, got.span_b)):
        spelled = [b""] * got.num_spans
        for piece, k in zip(pieces, span.tolist(), strict=True):
            if k >= 0:
                spelled[k] += piece
        assert all(x == y for x, y, ok in zip(spelled, want, got.exact, strict=True) if ok)


@given(st.binary(max_size=30), st.binary(max_size=30), st.integers(1, 30), st.data())
def test_a_wrong_exact_span_is_never_found(one, two, repeat, data):
    """Any two texts whatever: unrelated, overlapping, periodic."""
    alphabet = data.draw(st.sampled_from([256, 4, 2]))
    spelled, source = (
        bytes(x % alphabet for x in text * repeat + two)
        for text in (one, data.draw(st.sampled_from([one, two, one[1:]])))
    )
    a, b = cut(data.draw, spelled[:80]), cut(data.draw, source[:80])
    source = source[:80]
    sides = [side(side_of(pieces or [b""]).table, range(len(pieces)), source) for pieces in (a, b)]
    got = align_spans(sides[:1], sides[1:])[0]
    assert_no_wrong_exact(got, a, b, source)
    back = align_spans(sides[1:], sides[:1])[0]
    assert (
        np.array_equal(got.exact, back.exact)
        and np.array_equal(got.span_a, back.span_b)
        and np.array_equal(got.bounds, back.bounds)
    )


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["delete", "insert", "flip"]),
    st.integers(1, 3),
    st.data(),
)
def test_one_edit_costs_the_spans_it_touches(seed, kind, k, data):
    """Every span is one byte: all but the edited ones and their neighbours stay exact."""
    source = bytes(
        x
        for x in np.random.default_rng(seed).permutation(200).astype(np.uint8).tolist()
        if x != ord("#")
    )[:60]
    at = data.draw(st.integers(1, 60 - k - 1))
    spelled = {
        "delete": source[:at] + source[at + k :],
        "insert": source[:at] + b"#" * k + source[at:],
        "flip": source[:at] + b"#" * k + source[at + k :],
    }[kind]
    sides = [
        side(side_of([text[i : i + 1] for i in range(len(text))]).table, range(len(text)), source)
        for text in (spelled, source)
    ]
    got = align_spans(sides[:1], sides[1:])[0]
    exact = set(got.bounds[got.exact].tolist())
    assert exact >= {*range(1, at), *range(at + k + 2, 61)} and (
        kind == "insert" or exact.isdisjoint(range(at + 1, at + k + 1))
    )


@pytest.mark.parametrize("text", ["a 你 b", "你", "say 好 and more of it 你 then the end"])
def test_unknown_characters_cost_their_own_spans_only(text):
    tokenizer = lacking("你好")
    table, ids = table_of_lossy(tokenizer), encode_text(tokenizer, text)
    assert UNKNOWN in table.kind[ids]
    one, other = (
        side(table, ids, text.encode()),
        side(table_of(byte_level()), encode_text(byte_level(), text), text.encode()),
    )
    got = align_spans([one], [other])[0]
    assert not one.reproduces and (one.ids[table.kind[ids] == UNKNOWN] == -1).all()
    for k, (begin, end) in enumerate(span_bytes(got)):
        assert got.exact[k] == text.encode()[begin:end].isascii()
    if len(text) > 20:
        assert got.exact.sum() >= 8


def lacking(characters):
    """A SentencePiece model without byte fallback that was never shown `characters`."""
    tokenizer = sentencepiece("bpe", True, False)
    assert all(tokenizer.piece_to_id(c) == tokenizer.unk_id() for c in characters)
    return tokenizer


def table_of_lossy(tokenizer):
    """ByteTable.of refuses it, for good reasons; its pieces are read all the same."""
    pieces = [
        b""
        if tokenizer.is_unknown(i) or tokenizer.is_control(i)
        else tokenizer.id_to_piece(i).replace("\u2581", " ").encode()
        for i in range(tokenizer.vocab_size())
    ]
    kind = [
        UNKNOWN if tokenizer.is_unknown(i) else CONTROL if tokenizer.is_control(i) else TEXT
        for i in range(len(pieces))
    ]
    return ByteTable(tuple(pieces), np.array(kind, np.int8), "sentencepiece", True)


def test_an_added_token_that_swallows_whitespace():
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True)])
    text = "The quick brown fox.  <tool> The quick brown fox."
    one = side(ByteTable.of(tokenizer), encode_text(tokenizer, text), text.encode())
    other = side(
        table_of(byte_level(size=258)), encode_text(byte_level(size=258), text), text.encode()
    )
    got = align_spans([one], [other])[0]
    assert not one.reproduces and not got.exact.all()
    inexact = [x for x, ok in zip(span_bytes(got), got.exact, strict=True) if not ok]
    assert all(begin >= 20 and end <= 33 for begin, end in inexact) and got.bounds[-1] == len(text)


@pytest.mark.parametrize(
    "ids, exact", [([0, 1], [False, True]), ([2, 1], [True, True]), ([3, 1], [False, True])]
)
def test_only_a_space_is_taken_for_a_space_put_in_front(ids, exact):
    table = ByteTable(
        (b"xabc", b"def", b" abc", b" abX"), np.zeros(4, np.int8), "sentencepiece", True
    )
    other = side(side_of([b"abc", b"def"]).table, [0, 1], b"abcdef")
    one = side(table, ids, b"abcdef")
    got = align_spans([one], [other])[0]
    assert got.exact.tolist() == exact and one.reproduces == all(exact)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.integers(1, 40),
)
def test_equal_blocks_are_equal_and_in_order(one, two, size):
    """Repeated, swapped and moved parts: a chain of blocks that overlap on neither side."""
    parts = [distinct(size, k) for k in range(5)] + [b"ab" * size]
    got, want = b"".join(parts[k] for k in one), b"".join(parts[k] for k in two)
    free = other_free = 0
    for i, j, n in _equal_blocks(got, want):
        assert n > 0 and i >= free and j >= other_free and got[i : i + n] == want[j : j + n]
        free, other_free = i + n, j + n


def test_a_part_that_moved_does_not_cost_the_others():
    parts = [distinct(50, k) for k in range(5)]
    for got in ([*parts[1:], parts[0]], [parts[4], *parts[:4]]):
        assert sum(n for *_, n in _equal_blocks(b"".join(got), b"".join(parts))) == 200


def test_collapsed_whitespace_through_a_long_text():
    source = b"".join(b"%d lines,  and\n\n%d more. " % (i, i * i) for i in range(2000))
    spelled = re.sub(rb"\s+", b" ", source)

    def words(text):
        return re.findall(rb"\s*\S+|\s+", text)

    sides = [
        side(side_of(words(text)).table, range(len(words(text))), source)
        for text in (spelled, source)
    ]
    got = align_spans(sides[:1], sides[1:])[0]
    assert_no_wrong_exact(got, words(spelled), words(source), source)
    as_written = [word for word in words(source) if not re.match(rb"\s\s", word)]
    assert (
        np.diff(got.bounds, prepend=0)[got.exact].sum() == sum(map(len, as_written))
        and len(as_written) > 4000
    )


def test_strict_names_the_first_byte_that_differs():
    tokenizer = byte_level()
    table, ids = table_of(tokenizer), encode_text(tokenizer, "the quick brown box jumps")
    with pytest.raises(
        ValueError,
        match=r"from byte 16 on: behind b'the quick brown ' come b'box jumps' and b'fox jumps' "
        r"\(of 25 and 25 bytes\)",
    ):
        side(table, ids, b"the quick brown fox jumps", strict=True)
    assert side(table, ids, b"the quick brown box jumps", strict=True).reproduces


def test_sides_of_different_sources_are_refused():
    table = side_of([b"ab", b"c"]).table
    with pytest.raises(ValueError, match="sides of different sources, b'aXc' and b'abc'"):
        align_spans([side(table, [0, 1], b"aXc")], [side(table, [0, 1], b"abc")])
