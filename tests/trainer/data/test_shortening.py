"""What is cut are the oldest tokens of the user, no more than needed, and nothing else."""

import pytest
from assets import save_tokenizer, sentences, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.shortening import shorten


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(sentences(100), 300), folder)
    return Chat(str(folder))


def excess_over(chat, room):
    return lambda messages: len(chat.prompt_ids(messages)) - room


def contents(messages, role):
    return [m["content"] for m in messages if m["role"] == role]


TEXTS = st.text(st.sampled_from("ab 1Ü🙂\n"), min_size=1, max_size=40)


@given(data=st.data(), system=st.booleans(), turns=st.integers(0, 2))
def test_the_end_of_what_the_user_wrote_stays_and_nothing_else_changes(chat, data, system, turns):
    messages = [{"role": "system", "content": data.draw(TEXTS)}] * system
    for _ in range(turns):
        messages += [{"role": r, "content": data.draw(TEXTS)} for r in ("user", "assistant")]
    messages.append({"role": "user", "content": data.draw(TEXTS)})
    length = len(chat.prompt_ids(messages))
    room = data.draw(st.integers(1, length + 2))
    short = shorten(chat, messages, excess_over(chat, room))
    bare = [m | {"content": ""} if m["role"] == "user" else m for m in messages]
    if short is None:
        assert len(chat.prompt_ids(bare)) + 4 >= room, "one character has at most 4 tokens"
        return
    assert len(chat.prompt_ids(short)) <= room
    assert [m["role"] for m in short] == [m["role"] for m in messages]
    for role in ("system", "assistant"):
        assert contents(short, role) == contents(messages, role)
    before, after = contents(messages, "user"), contents(short, "user")
    assert after[-1] and all(a.endswith(b) for a, b in zip(before, after))
    cut = [a != b for a, b in zip(before, after)]
    assert cut == sorted(cut, reverse=True), "the oldest first"
    assert all(not b for b, is_cut in list(zip(after, cut))[: max(sum(cut) - 1, 0)])
    ids, short_ids = chat.prompt_ids(messages), chat.prompt_ids(short)
    special = set(chat.tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in short_ids if i in special]


def test_no_more_is_cut_than_needed(chat):
    messages = [{"role": "user", "content": "one two three four five six seven eight"}]
    length = len(chat.prompt_ids(messages))
    for over in range(1, 8):
        short = shorten(chat, messages, excess_over(chat, length - over))
        # cutting inside a word can make other tokens of its rest
        assert length - over - 2 <= len(chat.prompt_ids(short)) <= length - over


def test_what_fits_stays_as_it_is(chat):
    messages = ({"role": "user", "content": "one"},)
    assert shorten(chat, messages, excess_over(chat, 99)) == list(messages)


def test_a_slow_tokenizer_cuts_characters(chat, monkeypatch):
    monkeypatch.setattr(type(chat), "token_starts", lambda self, text: list(range(len(text))))
    messages = [{"role": "user", "content": "one two three four five six"}]
    room = len(chat.prompt_ids(messages)) - 5
    short = shorten(chat, messages, excess_over(chat, room))
    assert len(chat.prompt_ids(short)) <= room and short[0]["content"].endswith("six")
