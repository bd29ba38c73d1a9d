"""Tables from files of each kind, written here; and files that are not what their name says."""

import base64
import json

import pytest
from gguf_files import gguf
from gguf_tokenizers import gguf_of_bpe, gguf_of_spm, same_spelling
from hypothesis import given
from hypothesis import strategies as st
from table_worlds import MERGED, SINGLE, World
from tokenizer_fixtures import TEXTS, byte_level, metaspace, sentencepiece, table_of
from tokenizers import Tokenizer

from reflux.tokenalign.byte_table import (
    CONTROL,
    PROBES,
    TEXT,
    UNKNOWN,
    UNUSED,
    ByteTable,
    encode_text,
)
from reflux.tokenalign.table_files import greedy_encoder, load

RANKS = SINGLE | {piece: 256 + k for k, piece in enumerate(MERGED)}


def rank_lines(ranks=RANKS):
    return b"".join(base64.b64encode(piece) + b" %d\n" % i for piece, i in ranks.items())


def tekken(listed=RANKS, used=len(RANKS)):  # noqa: B008
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
        for p, i in listed.items()
    ]
    config = {
        "pattern": r" ?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
        "default_vocab_size": 10 + used,
        "default_num_special_tokens": 10,
    }
    return json.dumps(
        {"config": config, "vocab": vocab, "special_tokens": [{"rank": 1, "token_str": "<s>"}]}
    ).encode()


def world_lines(pieces=tuple(RANKS)):
    """Text pieces as Python strings, others as bytes literals: RWKV's own style."""

    def literal(piece):
        try:
            return repr(piece.decode())
        except UnicodeDecodeError:
            return repr(piece)

    return "".join(f"{i} {literal(p)} {len(p)}\n" for i, p in enumerate(pieces, 1)).encode()


@pytest.mark.parametrize("name", ["x.tiktoken", "tokenizer.model", "TOKENIZER.MODEL.v3"])
def test_ranks_whatever_the_file_is_called(tmp_path, name):
    (path := tmp_path / name).write_bytes(rank_lines())
    table = ByteTable.of(path)
    assert (
        list(table.pieces) == list(RANKS) and (table.kind == TEXT).all() and table.family == "ranks"
    )
    with pytest.raises(ValueError, match="has no encoder"):
        encode_text(load(path), "text")
    assert table.with_control({"<|endoftext|>": len(RANKS)}).kind[-1] == CONTROL


@given(text=TEXTS)
def test_tekken_is_cut_to_its_vocabulary_and_stands_after_the_control_ids(tmp_path_factory, text):
    pytest.importorskip("tiktoken", reason="Tekken encodes with the package tiktoken")
    path = tmp_path_factory.mktemp("t") / "tekken_7.json"
    path.write_bytes(tekken(RANKS | {b"never used": len(RANKS)}))
    tokenizer = load(path)
    table = ByteTable.of(tokenizer)
    assert (
        len(table) == 10 + len(RANKS)
        and table.kind[:10].tolist() == [CONTROL] * 10
        and table.pieces[10 + 65] == b"A"
    )
    assert table.pieces[1] == b"<s>" and b"never used" not in table.by_bytes()
    table.verify(lambda t: encode_text(tokenizer, t), [text])


def test_tekken_without_tiktoken_has_a_table_and_no_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    (path := tmp_path / "tekken.json").write_bytes(tekken())
    assert len(ByteTable.of(path)) == 10 + len(RANKS) and load(path).encode is None


def test_rwkv_world(tmp_path):
    (path := tmp_path / "rwkv_vocab_v1.txt").write_bytes(world_lines())
    table, tokenizer = ByteTable.of(path), load(path)
    assert same_spelling(table, ByteTable.of(World(list(RANKS))))
    for probe in PROBES:
        assert encode_text(tokenizer, probe) == World(list(RANKS)).encode(probe)


@given(text=st.text(st.sampled_from("thea 12你🙂"), max_size=30))
def test_the_greedy_encoder_takes_the_longest_piece(text):
    assert greedy_encoder({p: i + 1 for p, i in RANKS.items()})(text) == World(list(RANKS)).encode(
        text
    )


def test_gguf_of_a_byte_level_model_is_its_json(tmp_path):
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens(["<think>", "café"])
    (path := tmp_path / "m.gguf").write_bytes(gguf_of_bpe(tokenizer))
    table, of_json = ByteTable.of(path), ByteTable.of(tokenizer)
    assert same_spelling(table, of_json) and table.family == "byte_level"
    assert table.pieces[tokenizer.token_to_id("café")] == "café".encode()


@pytest.mark.parametrize(
    "kind, prefix", [("bpe", None), ("bpe", True), ("bpe", False), ("unigram", True)]
)
def test_gguf_of_a_sentencepiece_model_is_the_model(tmp_path, kind, prefix):
    processor = sentencepiece(kind, prefix is not False)
    (path := tmp_path / "m.gguf").write_bytes(gguf_of_spm(processor, prefix))
    table = ByteTable.of(path)
    assert (
        same_spelling(table, table_of(processor)) and table.byte_ids == table_of(processor).byte_ids
    )
    assert table.kind[0] == UNKNOWN


def test_json_and_model_files_are_the_objects(tmp_path):
    byte_level("NFC").save(str(tmp_path / "tokenizer.json"))
    assert (
        ByteTable.of(str(tmp_path / "tokenizer.json")).fingerprint()
        == ByteTable.of(byte_level("NFC")).fingerprint()
    )
    (tmp_path / "spm.model").write_bytes(sentencepiece("bpe").serialized_model_proto())
    assert (
        ByteTable.of(tmp_path / "spm.model").fingerprint()
        == table_of(sentencepiece("bpe")).fingerprint()
    )


def test_a_folder_is_its_tokenizer(tmp_path):
    (tmp_path / "notes.txt").write_text("no tokenizer")
    with pytest.raises(ValueError, match="no tokenizer in"):
        ByteTable.of(tmp_path)
    (tmp_path / "a.tiktoken").write_bytes(rank_lines())
    assert ByteTable.of(tmp_path).family == "ranks"
    (tmp_path / "b.tiktoken").write_bytes(rank_lines())
    with pytest.raises(
        ValueError, match=r"holds \['a.tiktoken', 'b.tiktoken'\]; give the path of one"
    ):
        ByteTable.of(tmp_path)
    metaspace("bpe", "first").save(str(tmp_path / "tokenizer.json"))
    assert ByteTable.of(tmp_path).family == "sentencepiece"


def test_a_folder_of_transformers_is_loaded_by_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().to_str()), eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<|turn|>"]  # stands in no other file
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    table = ByteTable.of(tmp_path)
    assert table.pieces[-1] == b"<|turn|>" and table.kind[-1] == CONTROL


LINES = rank_lines().splitlines(keepends=True)


@pytest.mark.parametrize(
    "name, data, says",
    [
        (
            "a.tiktoken",
            b"".join(LINES[:9]) + b"no base64! 3\n",
            "line 10: .* is not base64 bytes and a rank",
        ),
        (
            "a.tiktoken",
            b"".join(LINES[:65] + LINES[66:]),
            "no piece for 1 of the bytes .* first 0x41.*whole",
        ),
        ("tekken.json", b'{"config": {}}', "is not a tekken file: KeyError"),
        ("tekken.json", tekken(used=1 + len(RANKS)), "distinct pieces, want"),
        ("tekken.json", b"not json", "is not a tekken file"),
        (
            "rwkv_vocab_v1.txt",
            world_lines().replace(b"'A' 1", b"'A' 2"),
            "line 66: b'A' has 1 bytes, want the 2 of its line",
        ),
        ("rwkv_vocab_v1.txt", b"1 __import__('os') 3\n", "line 1: .* is not an id, a literal"),
        ("tokenizer.json", b'{"version": "1.0"}', "is not a tokenizer of the tokenizers library"),
        (
            "tokenizer.model",
            b"\x0a\x0bnot a model",
            "neither a SentencePiece model nor a file of ranks",
        ),
        (
            "m.gguf",
            gguf({"tokenizer.ggml.model": (8, "bert"), "tokenizer.ggml.tokens": (9, (8, ["a"]))}),
            "of the kind 'bert' and 1 tokens",
        ),
        ("m.gguf", gguf({"general.name": (8, "no tokenizer")}), "of the kind None and 0 tokens"),
        (
            "m.gguf",
            gguf_of_bpe(byte_level(), **{"tokenizer.ggml.token_type": (9, (5, [1, 1]))}),
            "tokens and 2 types",
        ),
        ("weights.bin", b"", "no tokenizer file known here"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, data, says):
    (path := tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says):
        ByteTable.of(path)


def test_a_file_may_lack_bytes_that_no_text_has(tmp_path):
    """SmolLM2 has no piece for six control characters and two lead bytes of empty planes."""
    unneeded = (4, 6, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2)
    (path := tmp_path / "a.tiktoken").write_bytes(
        rank_lines({p: i for p, i in RANKS.items() if p not in {bytes([b]) for b in unneeded}})
    )
    assert ByteTable.of(path).kind[list(unneeded)].tolist() == [UNUSED] * 8
