"""Tables on disk: the same table again, verified by its tokenizer, or a new one."""

import os
import time

import numpy as np
import pytest
from tokenizer_fixtures import byte_level, sentencepiece
from tokenizers import Tokenizer

from reflux.tokenalign.byte_table import CONTROL, TEXT, UNUSED, ByteTable
from reflux.tokenalign.table_cache import (
    FORMAT,
    cache_folder,
    cached_table,
    key_of,
    load_table,
    save_table,
)


@pytest.fixture
def tokenizer_file(tmp_path, monkeypatch):
    """A tokenizer.json beside an empty cache, the tokenizer, and a list of all tables built."""
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    built = []

    def of(tokenizer, real=ByteTable.of):
        built.append(tokenizer)
        return real(tokenizer)

    monkeypatch.setattr(ByteTable, "of", of)
    return path, Tokenizer.from_file(str(path)), built


def cache_file():
    (file,) = cache_folder().iterdir()
    return file


def test_the_second_time_it_is_the_same_table_and_not_built(tokenizer_file):
    path, tokenizer, built = tokenizer_file
    first, second = cached_table(path, tokenizer), cached_table(path, tokenizer)
    assert len(built) == 1
    assert first.fingerprint() == second.fingerprint() == ByteTable.of(tokenizer).fingerprint()
    for name in ("family", "space_prefix", "normalizer", "byte_ids", "swallows_spaces", "lossy"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("kind", "lens", "first_byte"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype and (a == b).all()
    assert list(first.pieces) == list(second.pieces) and first.by_bytes() == second.by_bytes()


@pytest.mark.parametrize("make", [lambda: byte_level("NFC"), lambda: sentencepiece("unigram")])
def test_a_cached_table_is_verified_by_the_tokenizer(tokenizer_file, monkeypatch, make):
    """At the second start, too, and through its normaliser."""
    path, _, built = tokenizer_file
    tokenizer = make()
    cached_table(path, tokenizer)
    verified = []

    def verify(self, *given, real=ByteTable.verify):
        verified.append(self)
        return real(self, *given)

    monkeypatch.setattr(ByteTable, "verify", verify)
    table = cached_table(path, tokenizer)
    assert len(built) == 1 and verified == [table]


@pytest.mark.parametrize("other", [lambda: sentencepiece("bpe"), lambda: byte_level("NFKC")])
def test_a_tokenizer_that_its_cached_table_does_not_fit_is_read(tokenizer_file, other):
    """As if the key had missed a change: other ids, or another normaliser."""
    path, tokenizer, built = tokenizer_file
    cached_table(path, tokenizer)
    changed = other()
    assert cached_table(path, changed).fingerprint() == ByteTable.of(changed).fingerprint()
    assert built[1] is changed


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
        lambda data: data.replace(FORMAT.encode(), b"reflux byte table 1", 1),
    ],
    ids=["empty", "head only", "cut", "longer", "random", "one bit", "old format"],
)
def test_a_damaged_file_is_built_anew(tokenizer_file, damage):
    path, tokenizer, built = tokenizer_file
    want = cached_table(path, tokenizer)
    good = cache_file().read_bytes()
    cache_file().write_bytes(damage(good))
    assert cached_table(path, tokenizer).fingerprint() == want.fingerprint()
    assert len(built) == 2 and cache_file().read_bytes() == good


def test_another_tokenizers_table_under_this_name_is_not_used(tokenizer_file, tmp_path):
    path, tokenizer, built = tokenizer_file
    want = cached_table(path, tokenizer)
    other = tmp_path / "other" / "tokenizer.json"
    other.parent.mkdir()
    byte_level(size=258).save(str(other))
    save_table(ByteTable.of(other), cache_file(), key_of(other))  # whole, and of another key
    assert cached_table(path, tokenizer).fingerprint() == want.fingerprint()
    assert built == [tokenizer, other, tokenizer]


def test_the_key_follows_the_bytes_not_the_path_or_the_time(tokenizer_file, tmp_path):
    path, tokenizer, built = tokenizer_file
    key, copy = key_of(path), tmp_path / "sub" / "tokenizer.json"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (1, 1))
    assert key_of(copy) == key
    changed = Tokenizer.from_str(byte_level().to_str())
    changed.add_tokens(["<think>"])
    changed.save(str(path))
    assert key_of(path) != key
    assert len(cached_table(path, changed)) == len(cached_table(copy, tokenizer)) + 1
    assert len(built) == 2


def test_a_folders_key_sees_every_file_that_may_change_its_tokenizer(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    keys = [key_of(tmp_path)]
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.model", "merges.txt"):
        (tmp_path / name).write_text("{}")
        keys.append(key_of(tmp_path))
    assert len(set(keys)) == len(keys)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert key_of(tmp_path) == keys[-1]


def test_a_cache_that_cannot_be_written_costs_time_only(tokenizer_file, monkeypatch):
    path, tokenizer, built = tokenizer_file
    blocked = path.parent / "a file"
    blocked.write_text("")
    monkeypatch.setenv("REFLUX_CACHE", str(blocked / "cache"))
    first, second = cached_table(path, tokenizer), cached_table(path, tokenizer)
    assert first.fingerprint() == second.fingerprint() and len(built) == 2


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


def test_a_name_on_a_hub_is_read_each_time(tokenizer_file):
    _, tokenizer, built = tokenizer_file
    assert len(cached_table("someone/model", tokenizer)) == len(ByteTable.of(tokenizer))
    assert not cache_folder().exists()


def test_a_quarter_of_a_million_ids_load_at_once(tmp_path):
    """No list of objects is made: 20 ms on a free core; the limit is that of a busy one."""
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
    save_table(table, tmp_path / "t", "key")
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
