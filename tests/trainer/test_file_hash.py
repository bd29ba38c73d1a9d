"""A file's hash is that of its bytes, read in parts."""

import hashlib

import pytest

from reflux.trainer.file_hash import file_sha256


@pytest.mark.parametrize("content", [b"", b"old\n", bytes(range(256)) * 5000])
def test_the_hash_is_that_of_the_bytes(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        file_sha256(str(tmp_path / "absent"))
