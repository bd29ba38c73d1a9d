"""Prompts, stop tokens, and text that is never taken for a control token."""

import json

import pytest
from assets import save_tokenizer, sentences, train_tokenizer
from tokenizer_fixtures import metaspace

from reflux.tokenalign.byte_table import ByteTable
from reflux.trainer.data import chat as chat_module
from reflux.trainer.data.chat import Chat, same_vocabulary

ASK = ({"role": "user", "content": "what remains?"},)
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sentences(100), 300)


@pytest.fixture
def make(tokenizer, tmp_path):
    """make(name, template=..., stops=..., **settings) -> Chat on a folder of its own."""

    def make(name="a", *, stops=None, add=(), source=None, **settings) -> Chat:
        folder = tmp_path / name
        save_tokenizer(source or tokenizer, folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        if add:
            table = json.loads((folder / "tokenizer.json").read_text())
            for k, text in enumerate(add):
                table["added_tokens"].append(
                    {
                        "id": 300 + k,
                        "content": text,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                )
            (folder / "tokenizer.json").write_text(json.dumps(table))
        if stops is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return Chat(str(folder))

    return make


def test_the_prompt_is_the_template_up_to_where_the_answer_begins(make):
    chat = make()
    ids = chat.prompt_ids(ASK)
    assert ids[0] == BOS and ids.count(BOS) == 2 and ids.count(EOS) == 1 and EOS != ids[-1]
    assert chat.tokenizer.decode(ids) == "<|bos|>user: what remains?<|eos|><|bos|>assistant: "


def test_without_a_template_the_text_is_the_prompt(make):
    chat = make(chat_template=None)
    assert chat.decode(chat.prompt_ids(ASK)) == "what remains?" and EOS not in chat.prompt_ids(ASK)
    with pytest.raises(
        ValueError, match="the prompt '' has no token. Give it a text, or the tokenizer a BOS token"
    ):
        chat.prompt_ids(({"role": "user", "content": ""},))


def test_control_strings_in_a_text_are_text(make):
    chat = make()
    ids = chat.encode("a <|eos|> b")
    assert (
        EOS not in ids
        and chat.decode(ids) == "a <|eos|> b"
        and chat.decode((*ids, EOS)) == "a <|eos|> b"
    )


def test_the_stop_set_is_all_that_ends_a_response(make):
    assert make("one").stop_ids == (EOS,)
    chat = make("set", stops=[EOS, 7, 299, 300, 4000])
    assert chat.stop_ids == (EOS, 7, 299), "ids that the tokenizer does not have can never be drawn"
    assert make("number", stops=7).stop_ids == (EOS, 7)
    assert make("pad", pad_token="<|eos|>").stop_ids == (EOS,), (
        "EOS stays EOS when it is padding too"
    )


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m['content'] }}<|im_end|>",
        "{{ m['content'] }}</b><|im_end|>\n",
        "b{{ m['content'] }} \n<|im_end|>b",
    ],
)
def test_the_templates_own_end_of_turn_closes_a_given_text(make, turn):
    """Not the tokenizer's EOS where a chat model ends its turns with another token."""
    chat = make(chat_template=f"{{% for m in messages %}}{turn}{{% endfor %}}", add=["<|im_end|>"])
    im_end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_id == im_end != EOS and chat.stop_ids == (EOS, im_end)


def test_a_template_that_ends_no_turn_falls_back_to_eos(make):
    assert (
        make(chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}").stop_id == EOS
    )


def test_no_end_at_all_is_refused(make):
    with pytest.raises(ValueError, match="names no end-of-sequence token; set eos_token"):
        make(eos_token=None)


@pytest.mark.parametrize("fallback", [False, True], ids=["bytes", "byte fallback"])
@pytest.mark.parametrize(
    "text, left_out, want",
    [
        ("ok \u20ac", 1, "ok "),
        ("ok \u20ac", 2, "ok "),
        ("ok \u20ac", 0, "ok \u20ac"),
        ("ok \ufffd\U0001f600", 1, "ok \ufffd"),  # written by the model
        ("ok \ufffd\ufffd", 0, "ok \ufffd\ufffd"),
        ("\U0001f600", 3, ""),
        ("", 0, ""),
    ],
)
def test_a_character_that_the_ids_end_inside_is_no_text(make, fallback, text, left_out, want):
    """A decoder writes one U+FFFD for its bytes, or one for each of them."""
    chat = make(source=metaspace("bpe", "legacy") if fallback else None, eos_token="</s>")
    ids = chat.encode(text)
    ids = ids[: len(ids) - left_out]
    assert chat.whole_text(ids, chat.decode(ids)) == want


def test_vocabularies_are_compared_by_map_and_not_by_size(make):
    other = train_tokenizer([s[::-1] for s in sentences(100)], 300)
    a, b, c = make("a"), make("b"), make("c", source=other)
    assert same_vocabulary(a, b) and a.vocab_size == c.vocab_size and not same_vocabulary(a, c)


def test_the_byte_table_is_built_once_and_verified_at_every_start(make, monkeypatch, tmp_path):
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))
    calls = []
    for name in ("of", "verify"):
        real = getattr(ByteTable, name)

        def counted(*given, name=name, real=real):
            calls.append(name)
            return real(*given)

        monkeypatch.setattr(ByteTable, name, counted)
    first, second = make("a").table, make("b").table
    assert calls == ["of", "verify", "verify"]
    assert first.fingerprint() == second.fingerprint()
    chat = make("a")
    assert chat.table.bytes_of(chat.encode("a <|eos|> b")) == b"a <|eos|> b"


def test_a_tokenizer_that_its_cached_table_does_not_fit_is_read_again(make, monkeypatch, tmp_path):
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))
    cached, other = make("a").table, make("a")
    monkeypatch.setattr(other, "tokenizer", train_tokenizer([s[::-1] for s in sentences(100)], 300))
    assert other.table.fingerprint() == ByteTable.of(other.tokenizer).fingerprint()
    assert other.table.fingerprint() != cached.fingerprint()


@pytest.mark.parametrize("stops", ["x", [2, "x"], [True], 2.5])
def test_stop_ids_that_are_none_are_named(make, stops):
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id = .*want an id"):
        make(stops=stops)


@pytest.mark.parametrize("settings", [{"tokenizer_class": 7}, {"eos_token": 3}])
def test_a_tokenizer_that_transformers_cannot_read_is_named(make, settings):
    with pytest.raises(ValueError, match="/a: transformers cannot read its tokenizer"):
        make(**settings)


# --- folders that cannot be used: every mistake in words, with the file


@pytest.mark.parametrize(
    "template, says",
    [
        ("one\n{% for m in messages %}{{ m[ }}", "line 2, fails .* TemplateSyntaxError"),
        ("\n\n{{ messages[0].x.y }}", "line 3, .* user: UndefinedError"),
        ("{{ raise_exception('No.') }}", "TemplateError: No. Mend the template"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "OverflowError: Range too big"),
        (
            "{% for i in range(9999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}",
            "TooSlow",
        ),
        ("hello", "makes 'hello' of any message of the user: every prompt would be the same"),
        (7, "TypeError"),
    ],
    ids=range(10),
)
def test_a_template_that_fails_is_named_with_its_line(make, monkeypatch, template, says):
    monkeypatch.setattr(chat_module, "TEMPLATE_S", 0.3)
    with pytest.raises(ValueError, match=f"(?s)a/tokenizer_config.json: chat_template.*{says}"):
        make(chat_template=template)


def test_a_template_file_is_named(make, tmp_path):
    make("a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{% for x in %}")
    with pytest.raises(ValueError, match="a/chat_template.jinja: chat_template, line 1, fails"):
        Chat(str(tmp_path / "a"))


def test_a_template_that_refuses_system_messages_says_what_to_do(make):
    chat = make(
        chat_template="{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    system = {"role": "system", "content": "Be brief."}
    for ask in (chat.prompt_ids, lambda messages: chat.prompt_lengths([messages])):
        with pytest.raises(
            ValueError, match="roles system, user: TemplateError: no system. It tak"
        ):
            ask((system, *ASK))
    assert chat.prompt_ids(ASK)


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("tokenizer.json", '{"version": "1.0", "trunc', "tokenizer.json: no JSON .* it is torn"),
        ("tokenizer.json", "", "tokenizer.json: no JSON"),
        ("tokenizer.json", "[1]", "tokenizer.json: list in JSON; want an object"),
        ("tokenizer.json", "{}", "a: transformers cannot read its tokenizer"),
        ("tokenizer.json", None, "a: transformers cannot read its tokenizer"),
        ("tokenizer_config.json", '{"a', "tokenizer_config.json: no JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: list in JSON"),
        ("generation_config.json", '{"eos', "generation_config.json: no JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', r"eos_token_id = \['x'\]; want an id"),
    ],
)
def test_a_torn_file_is_named(make, tmp_path, file, content, says):
    make("a")
    path = tmp_path / "a" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=says):
        Chat(str(tmp_path / "a"))


def test_an_id_of_the_hub_is_no_folder():
    with pytest.raises(ValueError, match="Qwen/Qwen3-0.6B: no such folder; .* are not downloaded"):
        Chat("Qwen/Qwen3-0.6B")


# --- lengths

TEXTS = ["what remains?", "", "a <|eos|> b", "Ünï 🙂 cødé\n\n", "x " * 200, "<|bos|>" * 3, " lead"]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("template", [True, False])
def test_lengths_are_those_of_the_ids(make, tmp_path, template, eos):
    settings = {} if template else {"chat_template": None}
    make("a", add_eos_token=eos, **settings)
    table = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    cut = {"max_length": 5, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(table | {"truncation": cut}))
    chat = Chat(str(tmp_path / "a"))
    talks = [({"role": "user", "content": text},) for text in TEXTS if template or text]
    assert chat.prompt_lengths(talks) == [len(chat.prompt_ids(talk)) for talk in talks]
    assert chat.prompt_lengths([]) == []


def test_a_prompt_without_tokens_has_no_length(make):
    chat = make(chat_template=None, add_bos_token=False)
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        chat.prompt_lengths([({"role": "user", "content": ""},)])


@pytest.mark.parametrize(
    "settings, first", [({}, BOS), ({"chat_template": None}, BOS), ({"bos_token": None}, EOS)]
)
def test_a_document_begins_behind_one_token(make, settings, first):
    """Its BOS, or the end of the document before it, with no template around it."""
    chat = make(**settings)
    assert chat.prompt_ids(()) == (first,)
    asked, document = chat.prompt_lengths([ASK, ()])
    assert document == 1 and asked == len(chat.prompt_ids(ASK))


def test_a_template_of_another_file_and_its_arguments(make, tmp_path):
    file = tmp_path / "short.jinja"
    file.write_text(
        "{% for m in messages %}<|bos|>{{ m.content }}<|eos|>{% endfor %}"
        "{% if think is defined and not think %}no thoughts{% endif %}"
    )
    folder = make().path
    plain, other = Chat(folder), Chat(folder, str(file))
    silent = Chat(folder, str(file), {"think": False})
    assert other.tokenizer.decode(other.prompt_ids(ASK)) == "<|bos|>what remains?<|eos|>"
    assert silent.tokenizer.decode(silent.prompt_ids(ASK)).endswith("<|eos|>no thoughts")
    assert silent.prompt_lengths([ASK]) == [len(silent.prompt_ids(ASK))]
    assert len({plain.key, other.key, silent.key}) == 3 and plain.key == Chat(folder).key


def test_a_template_that_cannot_be_read_or_fails_is_named(make, tmp_path):
    folder = make().path
    with pytest.raises(ValueError, match="template = '.*missing.jinja': it cannot be read"):
        Chat(folder, str(tmp_path / "missing.jinja"))
    (tmp_path / "torn.jinja").write_text("one\n{% for m in %}")
    with pytest.raises(ValueError, match="torn.jinja: chat_template, line 2, fails"):
        Chat(folder, str(tmp_path / "torn.jinja"))
