"""Full disks are recognised in whatever clothes, and told in words."""

import errno

import pytest
from full_disk import limited_files, small_disk
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from reflux.trainer import disk_space

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def caused() -> Exception:
    try:
        raise RuntimeError("writer failed") from NO_SPACE
    except RuntimeError as error:
        return error


def while_handling() -> Exception:
    try:
        try:
            raise NO_SPACE
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
        CheckpointException("write", {1: _wrap_exception(NO_SPACE)}),
        caused(),
        while_handling(),
    ],
    ids=repr,
)
def test_a_full_disk_is_recognised(error):
    assert disk_space.is_full(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        ValueError("28 rows"),
        CheckpointException("write", {0: _wrap_exception(KeyError("x"))}),
    ],
    ids=repr,
)
def test_other_errors_are_not(error):
    assert not disk_space.is_full(error)


def test_errors_that_cause_each_other_end():
    one, two = ValueError("a"), ValueError("b")
    one.__cause__, two.__cause__ = two, one
    assert not disk_space.is_full(one)


def test_what_the_system_says_is_recognised(tmp_path):
    with limited_files(10), pytest.raises(OSError) as caught:
        (tmp_path / "x").write_bytes(b"x" * 100)
    assert disk_space.is_full(caught.value)
    with small_disk(tmp_path / "disk", 0.1) as disk:
        assert not disk_space.has_none(disk)
        with pytest.raises(OSError) as caught:
            (disk / "x").write_bytes(b"x" * 200_000)
        assert disk_space.is_full(caught.value) and disk_space.has_none(disk / "not" / "there")


def test_the_words_name_folder_need_and_what_is_kept(tmp_path):
    error = disk_space.no_space(tmp_path, "the export needs 3.0 MB", "step-5, whole")
    assert error.errno == errno.ENOSPC and disk_space.is_full(error)
    assert str(error).startswith(f"no space left in {tmp_path}: the export needs 3.0 MB, ")
    assert "are free. Kept: step-5, whole. Make space, then go on" in str(error)


@pytest.mark.parametrize(
    "n, words", [(0, "0 B"), (999, "999 B"), (2000, "2.0 kB"), (3.44e6, "3.4 MB"), (5e9, "5.0 GB")]
)
def test_sizes_in_words(n, words):
    assert disk_space.size(n) == words


def test_only_an_empty_folder_is_removed(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    (tmp_path / "empty").mkdir()
    for name in ("full", "empty", "missing", "full/a"):
        disk_space.remove_empty(tmp_path, name)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "a").read_text() == "a"
