"""Laws of the alignment over drawn cuts, its three forms as one, and real encodings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from span_cases import (
    PAIRS,
    align,
    by_brute_force,
    encoded,
    ends,
    ragged_rows,
    side_of,
    tokenizations,
)
from tokenizer_fixtures import TEXTS, byte_level, sentencepiece, table_of

from reflux.tokenalign.byte_table import CONTROL, PROBES, encode_text
from reflux.tokenalign.offsets import Side, side
from reflux.tokenalign.spans import align_batch, align_spans, align_spans_ref


def spelled(pieces, span, num_spans):
    return [
        b"".join(p for p, s in zip(pieces, span, strict=True) if s == k) for k in range(num_spans)
    ]


@given(tokenizations())
def test_both_sides_spell_the_same_bytes_in_every_span(sides):
    span_A, span_B, n = align_spans_ref(*sides)
    assert spelled(sides[0], span_A, n) == spelled(sides[1], span_B, n)


@given(tokenizations())
def test_spans_never_go_back_and_none_is_missing(sides):
    span_A, span_B, n = align_spans_ref(*sides)
    for span in (span_A, span_B):
        assert span == sorted(span) and set(span) == set(range(n))


@given(tokenizations())
def test_spans_are_the_smallest_possible(sides):
    got = align(*sides)
    assert got.bounds.tolist() == sorted(set(ends(sides[0])) & set(ends(sides[1])) - {0})
    assert align_spans_ref(*sides)[2] == got.num_spans == len(got.bounds)


@given(tokenizations())
def test_swapping_the_sides_swaps_the_answer(sides):
    span_A, span_B, n = align_spans_ref(*sides)
    assert align_spans_ref(*sides[::-1]) == (span_B, span_A, n)
    there, back = align(*sides), align(*sides[::-1])
    assert np.array_equal(there.span_a, back.span_b) and np.array_equal(there.span_b, back.span_a)
    assert np.array_equal(there.bounds, back.bounds)


def test_the_example_in_the_docstring():
    assert align_spans_ref([b"the", b" cat", b"alog"], [b"the", b" ca", b"talog"]) == (
        [0, 1, 1],
        [0, 1, 1],
        2,
    )


@given(tokenizations(), st.data())
def test_one_changed_byte_is_refused_or_located(sides, data):
    changed = bytearray(b"".join(sides[1]))
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=f"from byte {at} on"):
        align_spans_ref(sides[0], [bytes(changed)])
    moved = [bytes(changed[e - len(p) : e]) for e, p in zip(ends(sides[1]), sides[1], strict=True)]
    got = align(sides[0], moved)
    assert got.equal_bytes == at
    assert got.exact.tolist() == [b <= at for b in got.bounds]


@given(tokenizations(1))
def test_a_tokenization_against_itself_is_one_to_one(sides):
    (pieces,) = sides
    got = align(pieces, pieces)
    real = [s for p, s in zip(pieces, got.span_a, strict=True) if p]
    assert real == list(range(got.num_spans)) and np.array_equal(got.span_a, got.span_b)


@given(tokenizations())
def test_aligning_with_the_spans_themselves_changes_nothing(sides):
    got = align(*sides)
    spans = spelled(sides[0], got.span_a, got.num_spans)
    again = align(sides[0], spans)
    assert np.array_equal(again.span_a, got.span_a) and again.span_b.tolist() == list(
        range(got.num_spans)
    )


@given(tokenizations(), tokenizations())
def test_alignments_concatenate(one, two):
    first, second, both = align(*one), align(*two), align(one[0] + two[0], one[1] + two[1])
    assert both.bounds.tolist() == [*first.bounds, *(first.bounds[-1] + second.bounds)]


@given(tokenizations(3), st.data())
def test_a_coarser_side_adds_no_boundary(sides, data):
    a, b, c = sides
    bounds = set(align(a, b).bounds)
    j = data.draw(st.integers(0, len(a) - 1))
    assert set(align([*a[:j], b"".join(a[j : j + 2]), *a[j + 2 :]], b).bounds) <= bounds
    assert bounds & set(align(b, c).bounds) <= set(align(a, c).bounds)


@given(tokenizations(), st.data())
def test_tokens_of_no_bytes_move_nothing_else(sides, data):
    a, b = sides
    got, j = align(a, b), data.draw(st.integers(0, len(a)))
    more = align([*a[:j], b"", *a[j:]], b)
    assert np.array_equal(np.delete(more.span_a, j), got.span_a) and np.array_equal(
        more.span_b, got.span_b
    )
    assert np.array_equal(more.bounds, got.bounds)
    assert more.span_a[j] == (more.span_a[j + 1] if j < len(a) else got.num_spans - 1), (
        "an empty token goes with what follows"
    )


@given(tokenizations(), st.data())
def test_masked_tokens_change_nothing(sides, data):
    """BOS, padding, control tokens: anywhere, on either side."""
    a, b = map(side_of, sides)
    j = data.draw(st.integers(0, len(a.ids)))
    masked = Side(a.table, np.insert(a.ids, j, -1), 0, True)
    got, want = align_spans([masked], [b])[0], align(*sides)
    assert got.span_a[j] == -1
    assert np.array_equal(np.delete(got.span_a, j), want.span_a) and np.array_equal(
        got.span_b, want.span_b
    )


@given(ragged_rows(), st.integers(1, 3))
def test_native_equals_the_definition(rows, threads):
    vocab_a, vocab_b = (list(dict.fromkeys(p for row in rows for p in row[i])) for i in (0, 1))
    tables = [side_of(vocab).table for vocab in (vocab_a, vocab_b)]
    sides_a = [
        Side(tables[0], np.array([vocab_a.index(p) for p in a], np.int32), 0, True) for a, _ in rows
    ]
    sides_b = [
        Side(tables[1], np.array([vocab_b.index(p) for p in b], np.int32), 0, True) for _, b in rows
    ]
    for (a, b), got in zip(rows, align_spans(sides_a, sides_b, threads=threads), strict=True):
        assert (got.bounds.tolist(), got.span_a.tolist(), got.span_b.tolist()) == by_brute_force(
            a, b
        )
        text_a, text_b = b"".join(a), b"".join(b)
        agree = next(
            (i for i, (x, y) in enumerate(zip(text_a, text_b, strict=False)) if x != y),
            min(len(text_a), len(text_b)),
        )
        assert (got.equal_bytes, got.bytes_a, got.bytes_b) == (agree, len(text_a), len(text_b))
        if text_a and text_a == text_b:
            assert align_spans_ref(a, b) == (
                got.span_a.tolist(),
                got.span_b.tolist(),
                got.num_spans,
            )


@given(ragged_rows(), st.data())
def test_the_padded_form_equals_the_definition(rows, data):
    """Left, right and inner padding, garbage under the mask, int32 lengths."""
    padded = []
    for i in (0, 1):
        width = max(len(row[i]) for row in rows) + data.draw(st.integers(0, 3))
        lens, mask = (
            torch.full((len(rows), width), 7, dtype=torch.int32),
            torch.zeros(len(rows), width, dtype=torch.bool),
        )
        for r, row in enumerate(rows):
            at = sorted(data.draw(st.permutations(range(width)))[: len(row[i])])
            lens[r, at], mask[r, at] = torch.tensor(list(map(len, row[i])), dtype=torch.int32), True
        padded.append((lens, mask))
    (lens_a, mask_a), (lens_b, mask_b) = padded
    span_a, span_b, num = align_batch(lens_a, lens_b, mask_a, mask_b)
    for r, (a, b) in enumerate(rows):
        bounds, want_a, want_b = by_brute_force(a, b)
        assert (num[r], span_a[r][mask_a[r]].tolist(), span_b[r][mask_b[r]].tolist()) == (
            len(bounds),
            want_a,
            want_b,
        )
    assert (span_a[~mask_a] == -1).all() and (span_b[~mask_b] == -1).all()


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_pair_of_tokenizers_aligns_every_probe_exactly(pair):
    texts = [p for p in PROBES if "\u2581" not in p]
    sides_a, sides_b = ([encoded(name, text) for text in texts] for name in pair)
    for text, a, b, got in zip(texts, sides_a, sides_b, align_spans(sides_a, sides_b), strict=True):
        assert (
            a.reproduces
            and b.reproduces
            and got.exact.all()
            and got.bounds[-1] == len(text.encode())
        )
        assert (got.span_a >= 0).all() and (got.span_b >= 0).all()


@given(TEXTS.filter(lambda text: text and "\u2581" not in text), st.sampled_from(PAIRS))
def test_every_form_agrees_on_encoded_texts(text, pair):
    a, b = (encoded(name, text) for name in pair)
    got = align_spans([a], [b])[0]
    assert got.exact.all() and got.bounds[-1] == len(text.encode())
    assert np.array_equal(np.bincount(got.span_a, weights=a.lens), np.diff(got.bounds, prepend=0))
    lens = [torch.from_numpy(s.lens)[None] for s in (a, b)]
    span_a, span_b, num = align_batch(*lens, *(torch.ones_like(n, dtype=torch.bool) for n in lens))
    assert (span_a[0].tolist(), span_b[0].tolist(), num.item()) == (
        got.span_a.tolist(),
        got.span_b.tolist(),
        got.num_spans,
    )


@given(TEXTS.filter(bool), st.data())
def test_a_text_cut_inside_a_character_leaves_an_open_tail(text, data):
    """Nothing is decoded on the way; what lies past the last common boundary is outside."""
    tokenizer, characters = byte_level(), byte_level(size=258)
    raw = text.encode()
    at = data.draw(st.integers(1, len(raw)))
    a = side(table_of(tokenizer), encode_text(tokenizer, text), raw)
    b = side(table_of(characters), encode_text(characters, text)[:at], raw[:at])
    got = align_spans([a], [b])[0]
    last = max([0, *(e for e in np.cumsum(a.lens).tolist() if e <= at)])
    assert got.exact.all() and got.bounds[-1:].tolist() == [last] * (last > 0)
    assert ((got.span_b >= 0) == (np.arange(at) < last)).all()


def test_trl_5885_a_bos_on_one_side_changes_nothing():
    tokenizer = byte_level()
    table, ids = table_of(tokenizer), encode_text(tokenizer, "12345 + 678")
    assert table.kind[0] == CONTROL
    bare, bos = (side(table, x, b"12345 + 678") for x in (ids, [0, *ids]))
    got, want = align_spans([bos], [bare])[0], align_spans([bare], [bare])[0]
    assert got.span_a.tolist() == [-1, *want.span_a] and got.num_spans == want.num_spans


def test_trl_gold_a_leftover_tail_is_no_group():
    got = align([b"ab", b"c", b"d"], [b"ab", b"c"])
    assert (got.span_a.tolist(), got.span_b.tolist(), got.num_spans) == ([0, 1, -1], [0, 1], 2)


def test_simct_a_span_of_several_tokens_does_not_swallow_the_next():
    got = align([b"un", b"happy", b" days"], [b"unh", b"appy", b" days"])
    assert got.span_a.tolist() == got.span_b.tolist() == [0, 0, 1]


def test_dpca_and_nemo_long_spans_are_kept():
    """Caps of 6 and 4 tokens lose digit and space runs."""
    got = align([b"1" * 9 + b"2"], [b"1"] * 9 + [b"2"])
    assert got.num_spans == 1 and got.span_b.tolist() == [0] * 10


def test_rllm_a_mark_is_one_byte_and_a_byte_token_is_one_byte():
    tokenizer = sentencepiece("bpe")
    one = encoded("SentencePiece BPE", "a\n b")
    assert one.lens.sum() == len(b"a\n b")
    assert table_of(tokenizer).lens[tokenizer.piece_to_id("\u2581")] == 1


def test_a_space_put_in_front_joins_the_first_span():
    a, b = encoded("SentencePiece BPE", "\nfoo"), encoded("byte level", "\nfoo")
    got = align_spans([a], [b])[0]
    assert a.skip == 1 and a.lens[0] == 0 and got.span_a[0] == 0 and got.exact.all()
