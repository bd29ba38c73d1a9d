"""Types by bytes: every type has members, spaces and tokenizer families do not matter. Frequency
bands: ranks decide, ties go to the smaller id, what never occurs is a band of its own.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.byte_table import CONTROL, TEXT, ByteTable
from reflux.trainer.diagnosis.token_classes import (
    BANDS,
    TYPES,
    count_ids,
    frequency_bands,
    token_types,
    type_of,
)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("  \n", "whitespace"),
        ("12", "digit"),
        (" 3.14", "digit"),
        ("٣", "digit"),
        ("+", "operator"),
        (" ==", "operator"),
        ("≤", "operator"),
        (",", "punctuation"),
        ("。", "punctuation"),
        (" The", "function"),
        ("n't", "function"),
        ("\\frac", "code"),
        ("();{", "code"),
        ("x_1", "code"),
        (" catalog", "content"),
        ("नमस्ते", "content"),
        ("你好", "content"),
        ("🙂", "other"),
        ("a1", "other"),
    ],
)
def test_first_match_wins(text, kind):
    assert type_of(text.encode()) == kind


def test_half_a_character_is_other():
    assert type_of("é".encode()[:1]) == "other"


def test_a_table_has_one_type_per_id_and_its_stops_are_named():
    pieces = (b" the", b"7", b"<|im_end|>", b"done")
    table = ByteTable(pieces, np.array([TEXT, TEXT, CONTROL, TEXT], np.int8), "byte_level")
    assert [TYPES[i] for i in token_types(table, [3, 99])] == ["function", "digit", "stop", "stop"]


def names(band_V):
    return [BANDS[i] for i in band_V]


def test_counts_of_parts_add_up():
    assert count_ids([(1, 1, 3), (3,), ()], 5).tolist() == [0, 2, 0, 2, 0]
    assert count_ids([], 2).tolist() == [0, 0]
    assert (count_ids([(1, 1)], 5) + count_ids([(3,), (3,)], 5)).tolist() == [0, 2, 0, 2, 0]


def test_ranks_by_hand():
    count_V = np.zeros(1200, np.int64)
    count_V[100:1199] = np.arange(1099, 0, -1)  # id 100 is the most frequent, 1099 ids occur
    band = names(frequency_bands(count_V))
    assert band[:100] == ["never seen"] * 100 and band[1199] == "never seen"
    assert band[100:110] == ["top 10"] * 10 and band[110:200] == ["11-100"] * 90
    assert band[200:1100] == ["101-1000"] * 900 and band[1100:1199] == ["rest seen"] * 99


def test_of_equally_frequent_ids_the_smaller_comes_first():
    few = names(frequency_bands(np.array([1] * 12 + [0])))
    assert few == ["top 10"] * 10 + ["11-100"] * 2 + ["never seen"]
    many = frequency_bands(np.tile([3, 1], 400))  # enough for a sort that mixes equals
    assert names(many[:20]) == ["top 10", "101-1000"] * 10
    assert names(many[20:200]) == ["11-100", "101-1000"] * 90
    assert set(names(many[200:])) == {"101-1000"}


@given(st.lists(st.lists(st.integers(0, 30), max_size=40), max_size=6), st.randoms())
def test_order_and_grouping_of_texts_change_nothing(texts, random):
    want = frequency_bands(count_ids(texts, 31))
    flat = [i for text in texts for i in text]
    random.shuffle(flat)
    assert (frequency_bands(count_ids([flat], 31)) == want).all()
