"""Sizes and hashes of files: what was written is what is read, and any flipped bit is found."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.trainer.engine.manifest import (
    NAME,
    Manifest,
    data_files,
    digest_and_sync,
    read_manifest,
    write_manifest,
    wrong_contents,
    wrong_sizes,
)

CONTENTS = {"a.bin": bytes(range(256)), "sub/b.bin": b"x" * 1000, ".metadata": b"", "c": b"\0"}


def sealed(folder):
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = Manifest(7, {name: digest_and_sync(folder / name) for name in data_files(folder)})
    write_manifest(folder, manifest)
    return manifest


def test_what_is_written_is_read_back(tmp_path):
    written = sealed(tmp_path)
    assert read_manifest(tmp_path) == written and written.step == 7
    assert sorted(written.files) == sorted(CONTENTS) == data_files(tmp_path)
    assert wrong_sizes(tmp_path, written) == wrong_contents(tmp_path, written, written.files) == []
    assert not (tmp_path / (NAME + ".partial")).exists()


@given(
    name=st.sampled_from(["a.bin", "sub/b.bin", "c"]), where=st.floats(0, 1), bit=st.integers(0, 7)
)
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path_factory, name, where, bit):
    folder = tmp_path_factory.mktemp("flip")
    manifest = sealed(folder)
    data = bytearray(CONTENTS[name])
    data[int(where * (len(data) - 1))] ^= 1 << bit
    (folder / name).write_bytes(data)
    assert wrong_sizes(folder, manifest) == []
    (sentence,) = wrong_contents(folder, manifest, manifest.files)
    assert sentence.startswith(f"{name} was changed")


@given(name=st.sampled_from(["a.bin", "sub/b.bin", "c"]), cut=st.integers(1, 1000))
@settings(max_examples=30, deadline=None)
def test_a_cut_file_is_found_by_its_size(tmp_path_factory, name, cut):
    folder = tmp_path_factory.mktemp("cut")
    manifest = sealed(folder)
    left = CONTENTS[name][: max(len(CONTENTS[name]) - cut, 0)]
    (folder / name).write_bytes(left)
    (sentence,) = wrong_sizes(folder, manifest)
    assert sentence == f"{name} has {len(left):,} bytes, its manifest says {len(CONTENTS[name]):,}"


def test_a_missing_file_is_named(tmp_path):
    manifest = sealed(tmp_path)
    (tmp_path / "a.bin").unlink()
    assert wrong_sizes(tmp_path, manifest) == ["a.bin cannot be read: No such file or directory"]
    assert wrong_contents(tmp_path, manifest, ["a.bin"])


def test_without_a_manifest_there_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("cut", [0, 1, 40, -3])
def test_a_torn_manifest_is_an_error_in_words(tmp_path, cut):
    sealed(tmp_path)
    text = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(text[:cut])
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("change", [{"format": 2}, {"files": {"a": {"bytes": 1}}}, {"files": 3}])
def test_a_manifest_of_another_form_is_an_error_in_words(tmp_path, change):
    sealed(tmp_path)
    table = json.loads((tmp_path / NAME).read_text()) | change
    (tmp_path / NAME).write_text(json.dumps(table))
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        read_manifest(tmp_path)
