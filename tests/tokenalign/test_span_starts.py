"""Span starts by brute force over drawn cuts, and every reason to leave one out."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import cut, encoded, side_of, tokenizations

from reflux.tokenalign.offsets import Side, side
from reflux.tokenalign.span_starts import span_starts
from reflux.tokenalign.spans import align_spans


def starts(a, b, **options):
    return span_starts(align_spans([a], [b])[0], a, b, **options)


def as_tuples(at):
    return list(zip(at.a.tolist(), at.b.tolist(), at.span.tolist(), strict=True))


@given(tokenizations())
def test_both_sides_have_read_the_same_bytes(sides):
    at = starts(side_of(sides[0]), side_of(sides[1]), ended=True)
    for a, b, _ in as_tuples(at):
        assert b"".join(sides[0][:a]) == b"".join(sides[1][:b])
    assert (
        at.span.tolist() == list(range(len(at.span)))
        and (np.diff(at.a) > 0).all()
        and (np.diff(at.b) > 0).all()
    )


@given(tokenizations())
def test_no_position_is_missing(sides):
    """Tokens with bytes that start at the same byte are a span start."""
    starts_at = {
        (len(b"".join(sides[0][:a])), k)
        for a, _, k in as_tuples(starts(side_of(sides[0]), side_of(sides[1])))
    }
    begin = [{0, *accumulate(map(len, pieces))} - {len(b"".join(pieces))} for pieces in sides]
    assert {byte for byte, _ in starts_at} == begin[0] & begin[1]


@given(tokenizations(), st.integers(0, 5), st.integers(0, 5))
def test_rows_shift_with_the_prompt(sides, first_a, first_b):
    a, b = side_of(sides[0]), side_of(sides[1])
    plain, shifted = (
        starts(a, b, ended=True),
        starts(a, b, ended=True, first_a=first_a, first_b=first_b),
    )
    assert np.array_equal(plain.a + first_a, shifted.a) and np.array_equal(
        plain.b + first_b, shifted.b
    )


def test_the_picture():
    a, b = side_of([b"the", b" cat", b"alog"]), side_of([b"the", b" ca", b"talog"])
    assert as_tuples(starts(a, b)) == [(0, 0, 0), (1, 1, 1)]
    assert as_tuples(starts(a, b, ended=True)) == [(0, 0, 0), (1, 1, 1), (3, 3, 2)]


def test_without_a_predictor_the_span_is_left_out_on_both_sides():
    a, b = side_of([b"ab", b"c"]), side_of([b"a", b"b", b"c"])
    assert as_tuples(starts(a, b, first_a=-1, first_b=4)) == [(0, 6, 1)]


@given(tokenizations(), st.data())
def test_spans_before_the_seam_are_left_out(sides, data):
    """What is left starts at or after the prompt's end on both sides, in bytes."""
    seam = data.draw(st.integers(0, 45))
    at = starts(side_of(sides[0]), side_of(sides[1]), seam=seam)
    for a, b, _ in as_tuples(at):
        assert len(b"".join(sides[0][:a])) >= seam and len(b"".join(sides[1][:b])) >= seam
    everything = starts(side_of(sides[0]), side_of(sides[1]))
    assert len(at.a) == sum(len(b"".join(sides[0][:a])) >= seam for a in everything.a)


def test_a_token_across_the_seam_is_left_out():
    joint, apart = side_of([b"pro", b"mpt a", b" b"]), side_of([b"prompt", b" a", b" b"])
    assert as_tuples(starts(joint, apart, seam=6)) == [(2, 2, 1)]


def test_a_space_put_in_front_spoils_the_first_position():
    a = side_of([b" the", b" cat"], skip=1)
    b = side_of([b"the", b" ca", b"t"])
    for sides in ((a, b), (b, a)):
        assert [k for _, _, k in as_tuples(starts(*sides, ended=True))] == [1, 2]


def test_a_real_space_prefix():
    text = "the cat"
    a, b = encoded("SentencePiece BPE", text), encoded("byte level", text)
    assert a.skip == 1 and b.skip == 0 and 0 not in starts(a, b).span


def test_a_space_put_in_front_of_a_later_stretch_spoils_that_position():
    """Legacy SentencePiece puts its mark behind every control token: another first byte."""
    pieces = side_of([b" a", b" b", b"c"])
    a = Side(pieces.table, np.array([0, -1, 1, 2], np.int32), 1, True, later_skips=(2,))
    b = side_of([b"a", b"b", b"c"])
    assert as_tuples(starts(a, b)) == [(3, 2, 2)]


def test_what_a_normaliser_changed_is_not_compared():
    table = side_of([b"two", b" re", b"main"]).table
    text = b"Two remain"
    lowered = side(table, [0, 1, 2], text, normalize=str.lower)
    plain = side_of([b"Two", b" remain"])
    assert lowered.reproduces and as_tuples(starts(plain, lowered)) == [(1, 1, 1)], (
        "the model of `two` never saw a T"
    )
    assert as_tuples(
        starts(
            side_of([b"two", b" remain"]),
            side(table, [0, 1, 2], b"two remain", normalize=str.lower),
        )
    ) == [(0, 0, 0), (1, 1, 1)]


@given(tokenizations(1), st.data())
def test_unequal_bytes_are_left_out(sides, data):
    pieces = sides[0]
    other = cut(data.draw, b"".join(pieces))
    changed = bytearray(b"".join(other))
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] ^= 1
    ends = list(accumulate(map(len, other)))
    a, b = (
        side_of(pieces),
        side_of([bytes(changed[e - len(p) : e]) for e, p in zip(ends, other, strict=True)]),
    )
    alignment = align_spans([a], [b])[0]
    compared = span_starts(alignment, a, b, ended=True)
    assert all(alignment.bounds[k] <= at for k in compared.span)


def test_the_stop_position_needs_both_texts_to_end_together():
    a, longer = side_of([b"ab", b"c"]), side_of([b"a", b"bc", b"d"])
    assert as_tuples(starts(a, longer, ended=True)) == [(0, 0, 0)]
    empty = Side(a.table, np.empty(0, np.int32), 0, True)
    assert as_tuples(starts(empty, empty, ended=True, first_a=3)) == [(3, 0, 0)] and not len(
        starts(empty, empty).a
    )


def test_a_stop_id_that_the_side_holds_stands_at_the_stop_position():
    table = side_of([b"ab", b"c"]).table
    a, b = Side(table, np.array([-1, 0, 1, -1], np.int32), 0, True), side_of([b"abc"])
    assert as_tuples(starts(a, b, ended=True)) == [(1, 0, 0), (3, 1, 1)]


def test_what_people_get_wrong():
    a, b = side_of([b"ab"]), side_of([b"a", b"b"])
    with pytest.raises(ValueError, match="want the two sides it was made from, in its order"):
        span_starts(align_spans([a], [b])[0], b, a)
    with pytest.raises(ValueError, match="first_a = -2"):
        starts(a, b, first_a=-2)
    with pytest.raises(ValueError, match="seam = -1"):
        starts(a, b, seam=-1)
