"""Types by bytes: every class has members, spaces and tokenizer families do not matter."""

import numpy as np
import pytest

from reflux.tokenalign.byte_table import CONTROL, TEXT, ByteTable
from reflux.trainer.diagnosis.token_classes import TYPES, token_types, type_of


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
