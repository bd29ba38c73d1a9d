"""GGUF metadata of files written byte by byte, whole, cut off, or no GGUF."""

import struct

import numpy as np
import pytest
from gguf_files import FORMATS, gguf
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.gguf_metadata import SCALARS, read_metadata

FIELDS = {
    "general.name": (8, "é"),
    "general.big": (9, (8, ["skipped"] * 50)),
    "general.ids": (9, (5, [1, 2])),
    "tokenizer.ggml.model": (8, "llama"),
    "tokenizer.ggml.tokens": (9, (8, ["<unk>", "\u2581a", ""])),
    "tokenizer.ggml.token_type": (9, (5, [2, 1, -1])),
    "tokenizer.ggml.scores": (9, (6, [0.5, -1.25, 0.0])),
    "tokenizer.ggml.add_space_prefix": (7, True),
    "tokenizer.ggml.eos_token_id": (4, 2),
    "last": (12, 0.25),
}


def write(tmp_path, data):
    (path := tmp_path / "m.gguf").write_bytes(data)
    return path


def test_fields_come_back_and_others_are_walked_over(tmp_path):
    got = read_metadata(write(tmp_path, gguf(FIELDS) + b"tensors follow"), prefix="tokenizer.ggml.")
    assert list(got) == [
        "model",
        "tokens",
        "token_type",
        "scores",
        "add_space_prefix",
        "eos_token_id",
    ]
    assert got["model"] == "llama" and got["tokens"] == [b"<unk>", "\u2581a".encode(), b""]
    assert got["token_type"].tolist() == [2, 1, -1] and got["scores"].tolist() == [0.5, -1.25, 0.0]
    assert got["add_space_prefix"] == 1 and got["eos_token_id"] == 2
    everything = read_metadata(write(tmp_path, gguf(FIELDS, version=2)))
    assert (
        everything["general.name"] == "é"
        and everything["last"] == 0.25
        and len(everything) == len(FIELDS)
    )


@given(kind=st.sampled_from(sorted(SCALARS)), data=st.data())
def test_every_number_type_is_read_as_it_was_written(tmp_path_factory, kind, data):
    size = 8 * struct.calcsize(FORMATS[kind])
    one = {6: st.floats(width=32), 12: st.floats(), 7: st.booleans()}.get(
        kind,
        st.integers(-(1 << size - 1), (1 << size - 1) - 1)
        if kind in (1, 3, 5, 11)
        else st.integers(0, (1 << size) - 1),
    )
    xs = data.draw(st.lists(one, min_size=1, max_size=5))
    path = tmp_path_factory.mktemp("g") / "m.gguf"
    path.write_bytes(gguf({"a": (kind, xs[0]), "b": (9, (kind, xs))}))
    got = read_metadata(path)
    np.testing.assert_array_equal(got["b"], np.array(xs, SCALARS[kind]))
    np.testing.assert_array_equal(got["a"], np.array(xs[:1], SCALARS[kind])[0])


def test_a_file_cut_anywhere_in_its_metadata_says_so(tmp_path):
    whole = gguf(FIELDS)
    for cut in range(24, len(whole), 7):
        with pytest.raises(ValueError, match="ends within its metadata"):
            read_metadata(write(tmp_path, whole[:cut]))


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "is empty"),
        (b"GGUF", "not a little-endian GGUF"),
        (b"PK\3\4" + bytes(40), "not a little-endian GGUF"),
        (gguf({}, version=1), "version 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "not a little-endian GGUF"),
        (gguf({"a": (9, (9, []))}), "value type 9 .* unknown"),
    ],
    ids=["empty", "short", "zip", "old", "big-endian", "nested"],
)
def test_other_files_are_refused(tmp_path, data, says):
    with pytest.raises(ValueError, match=says):
        read_metadata(write(tmp_path, data))
