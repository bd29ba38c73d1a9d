"""Which files are read, and that no damaged one is."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reflux.trainer.engine.weight_files import opened, stored_tensors, weight_files

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards."""
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.ones(2).bfloat16()}, tmp_path / "model-2.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tmp_path


def edit_index(folder, edit):
    table = json.loads((folder / INDEX).read_text())
    edit(table["weight_map"])
    (folder / INDEX).write_text(json.dumps(table))


def test_shards_are_those_of_the_index_and_headers_tell_names_shapes_and_types(sharded):
    save_file({"a": torch.zeros(4, 4), "x": torch.ones(1)}, sharded / "consolidated.safetensors")
    stored = stored_tensors(str(sharded))
    assert {n: (os.path.basename(s.file), s.shape, s.dtype) for n, s in stored.items()} == {
        "a": ("model-1.safetensors", (4, 4), "F32"),
        "b": ("model-1.safetensors", (3,), "F32"),
        "c": ("model-2.safetensors", (2,), "BF16"),
    }


def test_a_single_file_goes_before_an_index_as_in_transformers(sharded):
    save_file({"z": torch.ones(1)}, sharded / "model.safetensors")
    assert weight_files(str(sharded)) == (str(sharded / "model.safetensors"),)
    assert list(stored_tensors(str(sharded))) == ["z"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda f: (f / "model-2.safetensors").unlink(), "shard model-2.safetensors is missing"),
        (lambda f: (f / INDEX).unlink(), "no model.safetensors and no .*index.json there, only"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a":'), "json: no index of shards"),
        (lambda f: (f / INDEX).write_text("[]"), "index.json: no index of shards"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), "index.json: "),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "index.json: "),
        (lambda f: (f / INDEX).write_text("[" * 10**5), "index.json: no index of shards"),
        (
            lambda f: edit_index(f, lambda m: m.update(a="../model-1.safetensors")),
            "name files of its own folder",
        ),
        (
            lambda f: edit_index(f, lambda m: m.update(a="model-2.safetensors")),
            "tensor 'a' is model-2.safetensors, in truth it is model-1.safetensors",
        ),
        (lambda f: edit_index(f, lambda m: m.pop("b")), "tensor 'b' is nowhere"),
        (
            lambda f: edit_index(f, lambda m: m.update(d="model-1.safetensors")),
            "tensor 'd' is model-1.safetensors, in truth it is in none of its shards",
        ),
        (
            lambda f: save_file({"a": torch.ones(1)}, f / "model-2.safetensors"),
            "model-2.safetensors: tensor 'a' is also in .*model-1.safetensors",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_shards_is_said(sharded, edit, message):
    edit(sharded)
    with pytest.raises(ValueError, match=message):
        stored_tensors(str(sharded))


def test_other_formats_are_named(tmp_path):
    with pytest.raises(ValueError, match="no model.safetensors.*want a folder with weights"):
        weight_files(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="only pytorch_model.bin. Want transformers' safetensors"):
        weight_files(str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(3)}, file)
    return file


@given(cut=st.integers(0, 400), tail=st.binary(max_size=8))
def test_a_file_cut_or_extended_anywhere_is_named(whole, tmp_path_factory, cut, tail):
    raw = whole.read_bytes()
    broken = raw[: min(cut, len(raw) - 1)] + tail
    if len(broken) == len(raw):
        return  # other numbers, which no header tells
    file = tmp_path_factory.mktemp("cut") / "model.safetensors"
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=f"{file}: truncated, or no safetensors file"):
        stored_tensors(str(file.parent))
    shutil.rmtree(file.parent)


@given(at=st.integers(0, 150), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_with_the_files_name_or_another_header(
    whole, tmp_path_factory, at, bit
):
    raw = bytearray(whole.read_bytes())
    raw[at] ^= 1 << bit
    file = tmp_path_factory.mktemp("flip") / "model.safetensors"
    file.write_bytes(raw)
    try:
        assert all(s.file == str(file) for s in stored_tensors(str(file.parent)).values())
    except ValueError as error:
        assert str(file) in str(error)
    shutil.rmtree(file.parent)


def test_what_is_no_file_of_weights_is_said(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 5\n")
    with pytest.raises(ValueError, match="model.safetensors: a pointer of Git LFS.*git lfs pull"):
        stored_tensors(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read: No such file"), opened(f"{file}.none"):
        pass
