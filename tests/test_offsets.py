"""What ids spell, and whether a side gives the source back."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_byte_table import TEXTS, byte_level, metaspace, sentencepiece, table_of

from reflux.tokenalign.byte_table import encode_text
from reflux.tokenalign.offsets import side, spell


@given(text=TEXTS)
def test_spelling_undoes_encoding(text):
    for tokenizer in (byte_level(), byte_level(size=258)):
        spelled = spell(table_of(tokenizer), encode_text(tokenizer, text))
        assert (spelled.text, spelled.bytes, spelled.cut) == (text, text.encode(), False)


@given(text=TEXTS.filter(bool), data=st.data())
def test_a_cut_inside_a_character_keeps_the_whole_characters(text, data):
    tokenizer = byte_level(size=258)
    ids = encode_text(tokenizer, text)
    cut = data.draw(st.integers(0, len(ids)))
    spelled = spell(table_of(tokenizer), ids[:cut])
    whole = max(k for k in range(len(text) + 1) if len(text[:k].encode()) <= cut)
    assert spelled.text == text[:whole] and spelled.bytes == text[:whole].encode()
    assert spelled.cut == (len(spelled.bytes) < cut)


@pytest.mark.parametrize("raw", [b"a\xffb", b"\x80", b"\xed\xa0\x80", b"\xe2\x82a", b"ok\xc0\xaf"], ids=repr)
def test_bytes_that_are_no_text_are_said_to_be_none(raw):
    tokenizer = byte_level(size=258)
    table = table_of(tokenizer)
    one_byte = {piece: i for i, piece in enumerate(table.pieces)}
    spelled = spell(table, [one_byte[raw[k:k + 1]] for k in range(len(raw))])
    assert spelled.text is None and spelled.bytes == raw


@pytest.mark.parametrize("tokenizer", [lambda: byte_level(), lambda: byte_level(prefix=True), lambda: sentencepiece("bpe"),
                                       lambda: sentencepiece("unigram"), lambda: sentencepiece("unigram", False),
                                       lambda: metaspace("bpe", "legacy"), lambda: metaspace("bpe", "first")])
@given(text=TEXTS)
def test_encoding_a_text_gives_a_side_that_reproduces_it(tokenizer, text):
    tokenizer = tokenizer()
    table, ids = table_of(tokenizer), encode_text(tokenizer, text)
    one = side(table, ids, text.encode())
    if "\u2581" in text and table.family == "sentencepiece":  # becomes a space: the source cannot come back
        assert not one.reproduces
        return
    assert one.reproduces
    assert one.lens.sum() == len(text.encode()) and (one.lens >= 0).all()
    assert table.bytes_of(ids)[one.skip:] == text.encode()


def test_the_same_ids_with_and_without_a_space_in_front():
    """Metaspace "always" gives "hello" and " hello" the same ids: only the source tells whether a space was added."""
    tokenizer = metaspace("bpe", "always")
    table, ids = table_of(tokenizer), encode_text(tokenizer, "hello")
    assert ids == encode_text(tokenizer, " hello")
    assert [(s.skip, s.reproduces) for s in (side(table, ids, b"hello"), side(table, ids, b" hello"))] == [(1, True), (0, True)]


@pytest.mark.parametrize("name", ["</s>", "<0x41>"])
def test_a_name_that_the_tokenizer_reads_as_its_token_does_not_reproduce(name):
    tokenizer = metaspace("unigram", "never")
    for text, same in ((name[1:], True), (f"a {name}", False)):
        assert side(table_of(tokenizer), encode_text(tokenizer, text), text.encode()).reproduces == same


def test_a_prefix_is_dropped_only_where_the_tokenizer_has_that_habit():
    tokenizer = byte_level()
    got = side(table_of(tokenizer), encode_text(tokenizer, " hello"), b"hello")
    assert not got.reproduces and got.skip == 0


def test_a_prefix_can_empty_the_first_token():
    tokenizer = sentencepiece("bpe")
    got = side(table_of(tokenizer), encode_text(tokenizer, "\nfoo"), b"\nfoo")
    assert got.reproduces and got.lens[0] == 0 and got.ids[0] >= 0  # the lone mark: a token of no bytes, still scored


def test_a_normaliser_that_changes_the_text_is_not_guessed_around():
    tokenizer = byte_level("NFC")
    for text, same in (("café", True), ("cafe\u0301", False)):
        assert side(table_of(tokenizer), encode_text(tokenizer, text), text.encode()).reproduces == same


def test_control_and_masked_tokens_are_outside():
    tokenizer = byte_level()
    bos, stop = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    ids = encode_text(tokenizer, "hello there")
    bare = side(table_of(tokenizer), ids, b"hello there")
    dressed = side(table_of(tokenizer), [bos, *ids[:1], -1, *ids[1:], stop], b"hello there")
    assert dressed.reproduces and dressed.ids.tolist() == [-1, ids[0], -1, *ids[1:], -1]
    assert np.array_equal(dressed.lens[dressed.ids >= 0], bare.lens)


def test_the_producer_of_a_cut_text_still_reproduces_it():
    tokenizer = byte_level(size=258)
    table, ids = table_of(tokenizer), encode_text(tokenizer, "hi 你")[:-1]
    spelled = spell(table, ids)
    assert spelled.text == "hi " and spelled.cut
    assert side(table, ids, spelled.bytes).reproduces
    assert not side(table, [*ids, ids[0]], spelled.bytes).reproduces


def test_an_empty_text_is_a_side():
    for tokenizer in (byte_level(), sentencepiece("bpe")):
        one = side(table_of(tokenizer), encode_text(tokenizer, ""), b"")
        assert one.reproduces and one.lens.sum() == 0
