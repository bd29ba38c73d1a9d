"""Tables built from tokenizers that are trained in the test."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_fixtures import (
    TEXTS,
    byte_level,
    metaspace,
    normalize_of,
    sentencepiece,
    table_of,
)
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from reflux.tokenalign.byte_table import CONTROL, TEXT, UNKNOWN, ByteTable, encode_text

BYTE_LEVEL = [{}, {"normalizer": "NFC"}, {"normalizer": "NFKC"}, {"prefix": True}, {"size": 258}]
SENTENCEPIECE = [("bpe",), ("unigram",), ("unigram", False)]


@pytest.mark.parametrize("options", BYTE_LEVEL, ids=str)
@given(text=TEXTS)
def test_byte_level_tables_spell_every_text(options, text):
    tokenizer = byte_level(**options)
    table_of(tokenizer).verify(
        functools.partial(encode_text, tokenizer), [text], normalize_of(tokenizer)
    )


@pytest.mark.parametrize("options", SENTENCEPIECE, ids=str)
@given(text=TEXTS)
def test_sentencepiece_tables_spell_every_text(options, text):
    tokenizer = sentencepiece(*options)
    table_of(tokenizer).verify(
        functools.partial(encode_text, tokenizer), [text], normalize_of(tokenizer)
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("scheme", ["always", "first", "never", "legacy"])
def test_the_tokenizers_form_of_a_sentencepiece_model_spells_the_same(kind, scheme):
    theirs, ours = ByteTable.of(sentencepiece(kind)), ByteTable.of(metaspace(kind, scheme))
    text = theirs.kind == TEXT
    assert [p for p, t in zip(theirs.pieces, text, strict=True) if t] == [
        p for p, t in zip(ours.pieces, text, strict=True) if t
    ]
    assert ours.space_prefix == (scheme != "never")
    assert ours.kind[0] == UNKNOWN and ours.kind[1] == ours.kind[2] == CONTROL


def test_one_byte_pieces_are_bytes_and_their_names_in_a_text_are_characters():
    tokenizer = sentencepiece("bpe")
    table = table_of(tokenizer)
    newline = tokenizer.piece_to_id("<0x0A>")
    assert table.pieces[newline] == b"\n" and table.lens[newline] == 1
    assert newline not in encode_text(tokenizer, "<0x0A>")


@given(text=TEXTS.filter(bool), data=st.data())
def test_no_character_is_ever_decoded_on_the_way(text, data):
    """Ids cut anywhere, inside a character too, spell exactly a prefix of the text's bytes."""
    table, ids = table_of(byte_level(size=258)), encode_text(byte_level(size=258), text)
    cut = data.draw(st.integers(0, len(ids)))
    assert table.bytes_of(ids[:cut]) == text.encode()[:cut]


def test_special_tokens_written_in_a_text_are_content():
    tokenizer = byte_level()
    bos = tokenizer.token_to_id("<s>")
    assert bos not in encode_text(tokenizer, "a <s> b")
    assert table_of(tokenizer).kind[bos] == CONTROL
    assert bos in tokenizer.encode("a <s> b").ids, "encode_text left its mode behind"


def test_shipped_padding_truncation_and_bos_do_not_reach_the_ids():
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    bare = encode_text(tokenizer, "12345 + 678")
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=3)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    before = tokenizer.padding, tokenizer.truncation
    assert encode_text(tokenizer, "12345 + 678") == bare
    assert (tokenizer.padding, tokenizer.truncation) == before


def test_an_added_token_is_literal_utf8():
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    # TRL counts the second as 19 characters; it has 27 bytes
    tokenizer.add_tokens(["café", "<｜end▁of▁sentence｜>"])
    table = ByteTable.of(tokenizer)
    ids = encode_text(tokenizer, "a café b<｜end▁of▁sentence｜>")
    assert table.bytes_of(ids) == "a café b<｜end▁of▁sentence｜>".encode()
    assert table.lens[ids[-1]] == 27
    assert "\ufffd" in tokenizer.decode(ids), "why decode is never used"


def test_a_piece_spells_bytes_not_the_string_that_shows_it():
    """The string `©` is byte A9 in byte-level BPE and C2 A9 in SentencePiece."""
    table = table_of(byte_level())
    assert table.pieces[byte_level().token_to_id("©")] == b"\xa9"
    assert "©".encode() == b"\xc2\xa9"


def test_half_a_character_has_its_own_bytes():
    """NeMo-RL re-tokenises decode([id]): tokens of partial UTF-8 become U+FFFD there."""
    tokenizer = byte_level(size=258)
    table = table_of(tokenizer)
    for i in encode_text(tokenizer, "你"):
        assert tokenizer.decode([i]) == "\ufffd" and table.pieces[i] in [
            "你".encode()[k : k + 1] for k in range(3)
        ]


def test_the_fingerprint_is_stable_and_sees_every_change():
    base = byte_level()
    prints = [ByteTable.of(byte_level(**options)).fingerprint() for options in BYTE_LEVEL]
    extended = Tokenizer.from_str(base.to_str())
    extended.add_tokens(["<think>"])
    same_pieces = Tokenizer.from_str(base.to_str())
    same_pieces.normalizer = normalizers.NFC()
    prefixed = Tokenizer.from_str(base.to_str())
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    prints += [ByteTable.of(t).fingerprint() for t in (extended, same_pieces, prefixed)]
    assert len(set(prints)) == len(prints)
    assert ByteTable.of(Tokenizer.from_str(base.to_str())).fingerprint() == prints[0]


def test_a_hugging_face_tokenizer_is_read_through_its_backend():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>"
    )
    assert ByteTable.of(tokenizer).fingerprint() == table_of(byte_level()).fingerprint()
    assert encode_text(tokenizer, "a <s> b") == encode_text(byte_level(), "a <s> b")


def test_what_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="unrecognised tokenizer family: model 'WordLevel'"):
        ByteTable.of(Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="cannot read a dict; want a Hugging Face fast tokenizer"):
        ByteTable.of({})
    with pytest.raises(ValueError, match="no file or folder 'gpt2'.*AutoTokenizer"):
        ByteTable.of("gpt2")


def test_a_tokenizer_that_loses_characters_is_refused():
    with pytest.raises(ValueError, match="does not spell .*byte_fallback"):
        ByteTable.of(sentencepiece("unigram", True, False))


def test_an_id_of_another_tokenizer_is_located():
    table = table_of(byte_level())
    with pytest.raises(
        ValueError, match=f"id {len(table)} at position 2 is outside this table of {len(table)} ids"
    ):
        table.bytes_of([0, -1, len(table)])


def test_blob_holds_text_pieces_only():
    table = table_of(byte_level())
    data, begin = table.blob
    assert [data[begin[i] : begin[i + 1]].tobytes() for i in range(len(table))] == [
        p if k == TEXT else b"" for p, k in zip(table.pieces, table.kind, strict=True)
    ]
    assert (np.diff(begin) == table.lens).all() and (table.first_byte[table.lens == 0] == 256).all()
