"""What each family of tokenizer objects says of itself; trained or built in the test."""

import functools
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_worlds import MERGED, SINGLE, World
from tokenizer_fixtures import (
    CORPUS,
    TEXTS,
    byte_level,
    metaspace,
    normalize_of,
    sentencepiece,
    table_of,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from reflux.tokenalign.byte_table import (
    CONTROL,
    PROBES,
    TEXT,
    UNKNOWN,
    UNUSED,
    ByteTable,
    encode_text,
    normalizer_of,
)
from reflux.tokenalign.table_readers import TokenizerDescription, read


def encoding(special=(("<|end|>", 300),)):
    tiktoken = pytest.importorskip("tiktoken", reason="needs the package tiktoken")
    ranks = SINGLE | {piece: 256 + k for k, piece in enumerate(MERGED)}
    return tiktoken.Encoding(
        "test",
        pat_str=r" ?\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+",
        mergeable_ranks=ranks,
        special_tokens=dict(special),
    )


encoding_once = functools.cache(encoding)


@given(text=TEXTS)
def test_a_tiktoken_encoding_spells_every_text(text):
    table_of(encoding_once()).verify(encoding_once().encode_ordinary, [text])


def test_a_tiktoken_encoding_has_holes_and_control_ids():
    table = ByteTable.of(encoding())
    assert len(table) == 301 and table.family == "ranks"
    assert table.pieces[259:262] == (b"\xe4\xbd", b"12", b"  ")
    assert set(table.kind[262:300].tolist()) == {UNUSED} and table.kind[300] == CONTROL
    assert encode_text(encoding(), "<|end|>") == [b for b in b"<|end|>"], "a name in a text is text"


@given(text=TEXTS)
def test_rwkvs_trie_spells_every_text_and_id_0_ends_one(text):
    world = World([*SINGLE, *MERGED])
    table = ByteTable.of(world)
    table.verify(world.encode, [text])
    assert table.kind[0] == CONTROL and len(table) == 1 + 256 + len(MERGED)


class Tekken:
    """mistral_common's Tekkenizer by its public names."""

    num_special_tokens, n_words = 3, 3 + 256 + len(MERGED)

    def __init__(self):
        self.inner = encoding(special=())

    def id_to_piece(self, i):
        return ("<unk>", "<s>", "</s>")[i]

    def id_to_byte_piece(self, i):
        return self.inner.decode_single_token_bytes(i - 3)

    def encode(self, text, bos, eos):
        return [1] * bos + [i + 3 for i in self.inner.encode_ordinary(text)] + [2] * eos


class Wrapped:
    def __init__(self, **inside):
        self.__dict__.update(inside)


def test_mistrals_objects_are_read_through_their_wrappers():
    tekken = Tekken()
    table = ByteTable.of(tekken)
    assert (
        table.kind[:3].tolist() == [CONTROL] * 3
        and table.pieces[1] == b"<s>"
        and table.pieces[3 + 65] == b"A"
    )
    in_mistral = Wrapped(instruct_tokenizer=Wrapped(tokenizer=tekken))
    # mistral_common's, then transformers' of it
    for wrapper in (in_mistral, Wrapped(tokenizer=in_mistral)):
        assert ByteTable.of(wrapper).fingerprint() == table.fingerprint()
        assert encode_text(wrapper, "the 12") == encode_text(tekken, "the 12")
    processor = sentencepiece("bpe")
    spm = Wrapped(instruct_tokenizer=Wrapped(tokenizer=Wrapped(_model=processor)))
    assert ByteTable.of(spm).fingerprint() == table_of(processor).fingerprint()
    assert encode_text(spm, "a </s>") == encode_text(processor, "a </s>")


@given(text=TEXTS)
def test_a_byte_model_is_its_bytes(text):
    tokenizer = byt5()
    table = table_of(tokenizer)
    assert table.family == "bytes" and encode_text(tokenizer, text) == [
        b + 3 for b in text.encode()
    ]
    table.verify(lambda t: encode_text(tokenizer, t), [text])


@functools.cache
def byt5():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def test_a_byte_models_special_ids_are_control_and_those_that_eat_spaces_are_named():
    table = table_of(byt5())
    assert (
        table.kind[:3].tolist() == [CONTROL] * 3
        and (table.kind[259:] == CONTROL).all()
        and len(table) == 384
    )
    assert table.swallows_spaces == ("<pad>", "</s>", "<unk>")
    assert encode_text(byt5(), "</s>") == [b + 3 for b in b"</s>"]


def wordpiece(lower=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        [t for t in CORPUS if t.isascii()],
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        ),
    )
    return tokenizer


def word_suffix(clip=True):
    """CLIP's pieces are byte-level, GPT-1's are characters; both end a word with </w>."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        if clip
        else split
    )
    tokenizer.decoder = decoders.ByteLevel() if clip else decoders.BPEDecoder()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=900,
            end_of_word_suffix="</w>",
            special_tokens=["<unk>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if clip else [],
        ),
    )
    return tokenizer


LOSSY_ONES = {
    "wordpiece": wordpiece,
    "word_suffix clip": word_suffix,
    "word_suffix gpt": lambda: word_suffix(False),
}


@pytest.mark.parametrize("name", LOSSY_ONES)
def test_lossy_families_are_refused_unless_asked_for_and_say_what_they_are(name):
    tokenizer = LOSSY_ONES[name]()
    with pytest.raises(ValueError, match=f"lossy family '{name.split()[0]}'.*lossy=True"):
        ByteTable.of(tokenizer)
    table = ByteTable.of(tokenizer, lossy=True)
    assert table.lossy and not table_of(byte_level()).lossy
    assert (
        table.fingerprint()
        != ByteTable(
            table.pieces, table.kind, "byte_level", table.space_prefix, table.normalizer
        ).fingerprint()
    )


def spell_lossy(tokenizer, text):
    return ByteTable.of(tokenizer, lossy=True).bytes_of(encode_text(tokenizer, text))


def test_lossy_pieces():
    tokenizer = wordpiece()
    table = ByteTable.of(tokenizer, lossy=True)
    assert (
        table.kind[tokenizer.token_to_id("[UNK]")] == UNKNOWN
        and table.kind[tokenizer.token_to_id("[CLS]")] == CONTROL
    )
    assert table.bytes_of(encode_text(tokenizer, "The quick BROWN fox.")) == b"thequickbrownfox."
    inside = next(i for p, i in tokenizer.get_vocab().items() if p == "##o")
    assert table.pieces[inside] == b"o"
    for clip in (True, False):
        tokenizer = word_suffix(clip)
        assert spell_lossy(tokenizer, "The quick  fox.") == b"the quick fox. "
        assert spell_lossy(tokenizer, "HELLO ÀÉ") == "hello àé ".encode()
    assert spell_lossy(tokenizer, "\u0444") == b"", (
        "a letter that this one has not: UNKNOWN spells nothing"
    )


def test_a_lossy_table_that_spells_something_else_is_refused():
    tokenizer = wordpiece()
    wrong = [p[::-1] for p in read(tokenizer).pieces]
    reading = TokenizerDescription(
        wrong, read(tokenizer).kind, "wordpiece", read(tokenizer).encode, read(tokenizer).normalize
    )
    with pytest.raises(ValueError, match="this wordpiece tokenizer does not spell"):
        ByteTable.of(reading, lossy=True)


def test_added_tokens_special_or_not_and_those_that_eat_spaces():
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_special_tokens(
        [AddedToken("<|im_end|>", special=True), AddedToken("<mask>", lstrip=True, special=True)]
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("<tool>", rstrip=True), "  indent"])
    table = ByteTable.of(tokenizer)
    kinds = {
        name: int(table.kind[tokenizer.token_to_id(name)])
        for name in ("<|im_end|>", "<mask>", "<think>", "<tool>", "  indent")
    }
    assert kinds == {
        "<|im_end|>": CONTROL,
        "<mask>": CONTROL,
        "<think>": TEXT,
        "<tool>": TEXT,
        "  indent": TEXT,
    }
    assert sorted(table.swallows_spaces) == ["<mask>", "<tool>"]
    ids = encode_text(tokenizer, "a <think>b</think>  indent <|im_end|>")
    assert (
        table.bytes_of(ids) == b"a <think>b</think>  indent <|im_end|>"
        and tokenizer.token_to_id("<think>") in ids
    )
    assert tokenizer.token_to_id("<|im_end|>") not in ids
    assert table.bytes_of(encode_text(tokenizer, "a <tool> b")) == b"a <tool>b", (
        "the reason to name it"
    )


def test_an_added_token_matched_in_the_normalised_text_spells_the_normalised_text():
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(
        [AddedToken("<Think>", normalized=True), AddedToken("<Tool>", normalized=False)]
    )
    table = ByteTable.of(tokenizer)
    assert (
        table.pieces[tokenizer.token_to_id("<Think>")] == b"<think>"
        and table.pieces[tokenizer.token_to_id("<Tool>")] == b"<Tool>"
    )
    assert table.bytes_of(encode_text(tokenizer, "A <THINK> b")) == b"a <think> b"


def test_a_model_piece_that_is_an_added_token_too_keeps_its_spaces():
    """Gemma lists its runs of marks twice: one list is literal, the other is of spaces."""
    tokenizer = Tokenizer.from_str(metaspace("bpe", "never").to_str())
    vocab = tokenizer.get_vocab()
    piece = next(p for p in vocab if p.startswith("\u2581") and len(p) > 2)
    tokenizer.add_tokens([AddedToken(piece, normalized=False)])
    assert ByteTable.of(tokenizer).pieces[vocab[piece]] == piece.replace("\u2581", " ").encode()


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: byte_level("NFC"),
        lambda: byte_level("NFKC"),
        lambda: byte_level(prefix=True),
        lambda: sentencepiece("bpe"),
        lambda: sentencepiece("unigram"),
        lambda: metaspace("bpe", "legacy"),
        lambda: metaspace("bpe", "first"),
        lambda: metaspace("unigram", "always"),
        byt5,
        lambda: encoding_once(),
    ],
)
@given(text=TEXTS)
def test_the_normaliser_is_what_the_ids_spell_and_never_adds_a_prefix(tokenizer, text):
    tokenizer = tokenizer()
    table, normalize = table_of(tokenizer), normalizer_of(tokenizer)
    if "<" in text and table.family == "sentencepiece":
        return  # Unigram reads names
    spelled, want = table.bytes_of(encode_text(tokenizer, text)), normalize(text).encode()
    assert spelled == want or table.space_prefix and spelled == b" " + want
    plain = "".join(c for c in text if c in string.ascii_letters + " \n")
    assert normalize(plain) == plain


def test_unigrams_settings_stand_in_its_state():
    """No attributes: byte_fallback decides whether <0x0A> is a byte or six characters."""
    tokenizer = metaspace("unigram", "never")
    table = table_of(tokenizer)
    assert table.kind[0] == UNKNOWN and len(table.byte_ids) == 256
    assert [table.pieces[i] for i in table.byte_ids] == [bytes([b]) for b in range(256)]
    plain = Tokenizer(
        models.Unigram([("<unk>", -9.0), ("<0x41>", -1.0), ('a"]', -1.0), ("x", -1.0)], 0, False)
    )
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    plain.decoder = decoders.Metaspace(prepend_scheme="never")
    reading = read(plain)
    assert (
        list(reading.pieces) == [b"", b"<0x41>", b'a"]', b"x"]
        and reading.kind[0] == UNKNOWN
        and not reading.byte_ids
    )


def test_of_equal_spellings_the_piece_wins_over_the_byte():
    processor = sentencepiece("bpe")
    table = table_of(processor)
    by_bytes = table.by_bytes()
    doubled = [i for i in table.byte_ids if by_bytes[table.pieces[i]] != i]
    assert doubled, "this model has no letter that is a piece and a byte"
    assert all(not processor.is_byte(by_bytes[table.pieces[i]]) for i in doubled)
    assert set(by_bytes) == {p for p, n in zip(table.pieces, table.lens.tolist(), strict=True) if n}


def test_control_ids_that_a_file_does_not_list_can_be_named():
    table = table_of(byte_level())
    n = len(table)
    wider = table.with_control({"<|endoftext|>": n + 2})
    assert (
        len(wider) == n + 3
        and wider.kind[n:].tolist() == [UNUSED, UNUSED, CONTROL]
        and wider.pieces[n + 2] == b"<|endoftext|>"
    )
    assert wider.fingerprint() != table.fingerprint() and (wider.lens[:n] == table.lens).all()
    with pytest.raises(ValueError, match="id 5 .* already spells"):
        table.with_control({"<|endoftext|>": 5})


def test_a_reading_without_an_encoder_has_a_table_and_cannot_encode():
    reading = TokenizerDescription([b"a", b"b"], np.array([TEXT, TEXT], np.int8), "ranks")
    assert ByteTable.of(reading).bytes_of([1, 0]) == b"ba"
    with pytest.raises(ValueError, match="has no encoder"):
        encode_text(reading, "ab")


@pytest.mark.parametrize("text", PROBES)
def test_every_probe_is_a_trap_of_its_own(text):
    """All probes are different texts, and each is spelled by a plain table."""
    assert PROBES.count(text) == 1
    assert table_of(byte_level()).bytes_of(encode_text(byte_level(), text)) == text.encode()
    assert normalize_of(byte_level())(text) == text


@given(data=st.data())
def test_bytes_of_is_the_pieces_of_text_ids_joined(data):
    table = table_of(byte_level())
    ids = data.draw(st.lists(st.integers(-1, len(table) - 1), max_size=30))
    assert table.bytes_of(ids) == b"".join(
        table.pieces[i] for i in ids if i >= 0 and table.kind[i] == TEXT
    )
