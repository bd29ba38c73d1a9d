"""Tables on disk: the same table again, and nothing believed that is not whole and of the same
tokenizer.
"""

import os
import time

import numpy as np
import pytest
from tokenizer_fixtures import byte_level
from tokenizers import Tokenizer

from reflux.tokenalign import table_cache
from reflux.tokenalign.byte_table import CONTROL, TEXT, UNUSED, ByteTable
from reflux.tokenalign.table_cache import cache_folder, cached_table, key_of, load_table, save_table


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tokenizer.json and an empty cache; `built` counts the tables that were not taken from
    it.
    """
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    built = []
    monkeypatch.setattr(
        table_cache,
        "load_tokenizer",
        lambda p, load=table_cache.load_tokenizer: built.append(p) or load(p),
    )
    return path, built


def kept_file():
    (file,) = cache_folder().iterdir()
    return file


def test_the_second_time_it_is_the_same_table_and_not_built(place):
    path, built = place
    first, second = cached_table(path), cached_table(path)
    assert len(built) == 1
    assert first.fingerprint() == second.fingerprint() == ByteTable.of(path).fingerprint()
    for name in ("family", "space_prefix", "normalizer", "byte_ids", "swallows_spaces", "lossy"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("kind", "lens", "first_byte"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype and (a == b).all()
    assert list(first.pieces) == list(second.pieces) and first.by_bytes() == second.by_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:50],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: os.urandom(len(data)),
        lambda data: (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        ),
        lambda data: data.replace(b"reflux byte table 1", b"reflux byte table 0", 1),
    ],
    ids=["empty", "head only", "cut", "longer", "random", "one bit", "old format"],
)
def test_a_damaged_file_is_built_anew(place, damage):
    path, built = place
    want = cached_table(path)
    good = kept_file().read_bytes()
    kept_file().write_bytes(damage(good))
    assert cached_table(path).fingerprint() == want.fingerprint()
    assert len(built) == 2 and kept_file().read_bytes() == good


def test_another_tokenizers_table_under_this_name_is_not_believed(place, tmp_path):
    path, built = place
    want = cached_table(path)
    other = tmp_path / "other" / "tokenizer.json"
    other.parent.mkdir()
    byte_level(size=258).save(str(other))
    save_table(ByteTable.of(other), kept_file(), key_of(other))  # whole, and of another key
    assert cached_table(path).fingerprint() == want.fingerprint() and len(built) == 2


def test_a_table_that_no_longer_spells_its_probes_is_not_believed(tmp_path, monkeypatch):
    """As if this project's own reading of the arrays had changed without a new FORMAT."""
    table = ByteTable.of(byte_level())
    save_table(table, file := tmp_path / "t", "key", [[5, 6, 7]])
    assert load_table(file, "key") is not None
    monkeypatch.setattr(ByteTable, "bytes_of", lambda self, ids: b"other")
    assert load_table(file, "key") is None


def test_the_key_follows_the_bytes_not_the_place_or_the_time(place, tmp_path):
    path, built = place
    key, copy = key_of(path), tmp_path / "sub" / "tokenizer.json"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (1, 1))
    assert key_of(copy) == key
    changed = Tokenizer.from_str(byte_level().to_str())
    changed.add_tokens(["<think>"])
    changed.save(str(path))
    assert key_of(path) != key
    assert len(cached_table(path)) == len(cached_table(copy)) + 1 and len(built) == 2


def test_a_folders_key_sees_every_file_that_may_change_its_tokenizer(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    keys = [key_of(tmp_path)]
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.model", "merges.txt"):
        (tmp_path / name).write_text("{}")
        keys.append(key_of(tmp_path))
    assert len(set(keys)) == len(keys)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert key_of(tmp_path) == keys[-1]


def test_a_cache_that_cannot_be_written_costs_time_only(place, monkeypatch):
    path, built = place
    blocked = path.parent / "a file"
    blocked.write_text("")
    monkeypatch.setenv("REFLUX_CACHE", str(blocked / "cache"))
    assert cached_table(path).fingerprint() == cached_table(path).fingerprint() and len(built) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_table(ByteTable.of(byte_level()), tmp_path / "t", "key")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_platforms_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("REFLUX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "reflux"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "reflux")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder() == tmp_path / "reflux"


def test_a_path_without_a_tokenizer_says_so(place):
    with pytest.raises(ValueError, match="no file or folder 'nowhere'"):
        cached_table("nowhere")


def test_a_quarter_of_a_million_ids_load_at_once(tmp_path):
    """No list of objects is made: 20 ms is the promise on a free core, ten times that the limit on
    a busy one.
    """
    rng = np.random.default_rng(0)
    size = 262_144
    lens = rng.integers(1, 14, size)
    data = rng.integers(0, 256, lens.sum(), np.uint8).tobytes()
    ends = np.cumsum(lens).tolist()
    pieces = [data[b - n : b] for n, b in zip(lens.tolist(), ends, strict=True)]
    kind = np.full(size, TEXT, np.int8)
    kind[:3], kind[-5:] = CONTROL, UNUSED
    pieces[-5:] = [b""] * 5
    table = ByteTable(pieces, kind, "ranks", byte_ids=(7, 9), swallows_spaces=("<mask>",))
    save_table(
        table, tmp_path / "t", "key", [rng.integers(0, size, 30).tolist() for _ in range(22)]
    )
    times = []
    for _ in range(5):
        started = time.perf_counter()
        loaded = load_table(tmp_path / "t", "key")
        times.append(time.perf_counter() - started)
    assert loaded.fingerprint() == table.fingerprint() and (
        loaded.byte_ids,
        loaded.swallows_spaces,
    ) == ((7, 9), ("<mask>",))
    assert min(times) < 0.2
