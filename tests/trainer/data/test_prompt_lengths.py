"""Every row is measured, by any number of ranks; a cache is read for the same data, tokenizer and
template, and for no others.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from assets import save_tokenizer, sentences, train_tokenizer
from thread_ranks import ThreadRank, on_ranks

from reflux.trainer.config.data import DataSection
from reflux.trainer.data import prompt_lengths
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompt_lengths import cache_key
from reflux.trainer.data.prompts import load_prompts

DATA = {"path": "data.jsonl", "files": {"data.jsonl": "ab12"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(sentences(100), 300), folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_lengths, "CHUNK", 4)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path) -> str:
    rows = [
        {"prompt": f"word {i} " * (1 + i * 7 % 5), "answer": "x" if i % 3 else None}
        | ({"response": "yes " * (i - 1)} if i % 2 else {})
        for i in range(19)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measure_prompts(prompts, *given, **options):
    return prompt_lengths.measure_prompts(prompts, *given, location=prompts.location, **options)


def open_rows(source):
    return load_prompts(source, check_rows=False)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_row_is_measured_by_any_number_of_ranks(folder, source, world):
    chat, prompts = Chat(str(folder)), open_rows(source)
    for found in on_ranks(
        world, lambda r: measure_prompts(prompts, Chat(str(folder)), r, responses=True)
    ):
        assert found.prompt_N.tolist() == [len(chat.prompt_ids(p.messages)) for p in prompts]
        want = [0 if p.response is None else len(chat.encode(p.response)) + 1 for p in prompts]
        assert found.response_N.tolist() == want
        assert want[:3] == [0, 0, 0] and want[3] > 1, "an empty response is none"
        assert found.answered_N.tolist() == [i % 3 != 0 for i in range(19)]
    (plain,) = on_ranks(1, lambda r: measure_prompts(prompts, chat, r))
    assert not plain.response_N.any(), "what nobody asked for is not measured"


def test_a_wrong_row_ends_every_rank_with_its_line(folder, source):
    lines = Path(source).read_text().splitlines()
    lines[13] = '{"prompt": 5}'
    Path(source).write_text("\n".join(lines))
    prompts = open_rows(source)
    errors = on_ranks(3, lambda r: measure_prompts(prompts, Chat(str(folder)), r))
    assert len({str(e) for e in errors}) == 1
    assert "data.jsonl, line 14, column prompt: int 5; want a text" in str(errors[0])


def test_a_row_that_the_template_refuses_is_named(folder, source, tmp_path):
    refuses = "{% if '11' in messages[0].content %}{{ raise_exception('no 11') }}{% endif %}{{ 1 }}"
    save_tokenizer(train_tokenizer(sentences(100), 300), tmp_path / "refuses")
    (tmp_path / "refuses" / "chat_template.jinja").write_text(refuses + "{{ messages[0].content }}")
    chat, prompts = Chat(str(tmp_path / "refuses")), open_rows(source)
    with pytest.raises(ValueError, match="data.jsonl, line 12: .*chat_template, line 1, .*no 11"):
        measure_prompts(prompts, chat, ThreadRank())


def test_the_cache_is_read_instead_of_the_rows(folder, source, monkeypatch):
    chat, prompts = Chat(str(folder)), open_rows(source)
    key = cache_key(DATA, DataSection(source), chat)
    first = measure_prompts(prompts, chat, ThreadRank(), key)
    monkeypatch.setattr(chat, "prompt_lengths", None)  # nobody calls it
    for second in on_ranks(2, lambda r: measure_prompts(prompts, chat, r, key)):
        for name in ("prompt_N", "response_N", "answered_N"):
            assert np.array_equal(getattr(first, name), getattr(second, name))
            assert getattr(first, name).dtype == getattr(second, name).dtype


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-5],
        lambda b: b"",
        lambda b: b.replace(b"reflux", b"reflex"),
        lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
    ],
    ids=["cut", "empty", "other", "flipped"],
)
def test_a_damaged_cache_is_measured_anew(folder, source, cache, damage):
    chat, prompts = Chat(str(folder)), open_rows(source)
    key = cache_key(DATA, DataSection(source), chat)
    want = measure_prompts(prompts, chat, ThreadRank(), key).prompt_N
    (file,) = cache.glob("*.lengths")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(measure_prompts(prompts, chat, ThreadRank(), key).prompt_N, want)
    assert file.read_bytes() == whole, "and written again"


def test_a_cache_that_cannot_be_written_costs_time_only(folder, source, cache):
    cache.write_text("a file, no folder")
    chat, prompts = Chat(str(folder)), open_rows(source)
    key = cache_key(DATA, DataSection(source), chat)
    assert len(measure_prompts(prompts, chat, ThreadRank(), key).prompt_N) == 19


def test_other_data_or_columns_or_tokenizers_or_templates_have_another_key(folder, tmp_path):
    section, chat = DataSection("data.jsonl"), Chat(str(folder))
    save_tokenizer(train_tokenizer(sentences(50), 300), tmp_path / "other")
    save_tokenizer(train_tokenizer(sentences(100), 300), tmp_path / "same")
    other, same = Chat(str(tmp_path / "other")), Chat(str(tmp_path / "same"))
    (tmp_path / "same" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    keys = [
        cache_key(DATA, section, chat),
        cache_key(DATA, section, chat, responses=True),
        cache_key(DATA, section, other),
        cache_key(DATA, section, same),
        cache_key(DATA, DataSection("data.jsonl", columns={"prompt": "q"}), chat),
        cache_key(DATA, DataSection("data.jsonl", limit=3), chat),
        cache_key(DATA, DataSection("data.jsonl", split="test"), chat),
        cache_key(DATA | {"files": {"data.jsonl": "cd34"}}, section, chat),
    ]
    assert len(set(keys)) == len(keys) and None not in keys
    (tmp_path / "same" / "chat_template.jinja").unlink()
    assert cache_key(DATA, section, same) == keys[0], "the same files in another folder"


@pytest.mark.parametrize("source, cached", [("reasoning_gym:x?size=3", True), ("my:rows", False)])
def test_rows_that_a_function_makes_are_not_cached(folder, source, cached):
    files = {"files": {"reasoning-gym": "0.1.25"} if cached else {"my.py": "ab"}}
    keys = [
        cache_key(files, DataSection(source + more), Chat(str(folder))) for more in ("", "&a=1")
    ]
    assert len(set(keys)) == 2 if cached else keys == [None, None]
    assert cache_key(None, DataSection(source), Chat(str(folder))) is None
