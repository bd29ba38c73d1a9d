"""Every mistake in what the command is given ends in one line with file, line and the fix."""

import io
import json
import sys
from importlib import import_module

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from tokenizer_fixtures import byte_level

from reflux.tokenalign.corpus import LoadedTokenizer
from reflux.tokenalign.given_text import KEYS, GivenError, checked

command = import_module("reflux.tokenalign.__main__")
PAIR = [LoadedTokenizer("A", byte_level()), LoadedTokenizer("B", byte_level(size=300))]
LOGP = {"logp_a": [-1.0, -1.0], "logp_b": [-1.0] * 5}  # of "12345 hence"


def run(monkeypatch, capsys, *arguments):
    """(exit code, standard error) of the command on two loaded tokenizers."""
    loaded = iter(PAIR)
    monkeypatch.setattr(command, "load_tokenizer", lambda path, name: next(loaded))
    monkeypatch.setattr(sys, "argv", ["reflux.tokenalign", "A", "B", *map(str, arguments)])
    code = 0
    try:
        command.main()
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "content, line, message",
    [
        ('{"text": "hi",\n "ids_a": }', 2, "not JSON: Expecting value at column 11"),
        ("", 1, "not JSON: Expecting value"),
        ('{"text": "a"', 1, "not JSON"),
        ('"text"', 1, "holds the string 'text'; want a JSON object"),
        ("[1]", 1, "holds a list; want a JSON object"),
        ('{"txt": 1}', 1, "keys txt; want text or ids_a"),
        ('{\n"text": 5}', 2, "text is the number 5; want a string"),
        ('{\n"text": null}', 2, "text is null; want a string"),
        ('{\n"text": ""}', 2, "the text is empty"),
        ('{"text":\n "a\\ud800"}', 1, r"text[1] is half of a surrogate pair, '\ud800'"),
        ('{"text": "hi",\n\n"ids_a": 3}', 3, "ids_a is the number 3; want a list"),
        ('{\n"ids_a": ["x"]}', 2, "ids_a[0] is the string 'x'; want a token id"),
        ('{\n"ids_a": [1.5]}', 2, "ids_a[0] is the number 1.5"),
        ('{\n"ids_a": [true]}', 2, "ids_a[0] is true"),
        ('{\n"ids_a": [3, 99999]}', 2, "ids_a[1] = 99999; want -1"),
        ('{\n"ids_a": [%s]}' % ("9" * 30), 2, "want -1 (a token to leave out)"),
        ('{\n"ids_a": [-2]}', 2, "ids_a[0] = -2"),
        ('{\n"ids_a": []}', 2, "ids_a spell no text"),
        ('{\n"ids_a": [-1]}', 2, "ids_a spell no text"),
        ('{"text": "hi",\n"stop_a": -1.0}', 2, "a stop of one side only; want both"),
        ('{"text": "hi",\n"stop_a": "x", "stop_b": -1.0}', 2, "stop_a is the string 'x'"),
        ('{"text": "hi", "stop_a": -1,\n"stop_b": []}', 2, "stop_b is a list; want a number"),
        ('{"text": "hi", "stop_a": -1,\n"stop_b": 2}', 2, "stop_b = 2; want log p in nats"),
        ('{"text": "hi",\n"logp_b": [-1.0]}', 2, "log-probabilities of one side only"),
        (
            '{"text": "hi",\n"logp_a": "x", "logp_b": "y"}',
            2,
            "logp_a is the string 'x'; want a list",
        ),
        ('{"text": "hi",\n"logp_a": [{}], "logp_b": []}', 2, "logp_a[0] is an object"),
        ('{"text": "hi",\n"logp_a": [0.5], "logp_b": []}', 2, "logp_a[0] = 0.5; want log p"),
        ('{"text": "hi",\n"logp_a": [1%s], "logp_b": []}' % ("0" * 400), 2, "logp_a[0] = inf"),
        (
            '{"text": "12345 hence",\n"logp_a": [-1], "logp_b": [-1]}',
            2,
            "logp_a has 1 numbers for 2",
        ),
        (
            '{"text": "12345 hence", "logp_b": [-1,-1,-1,-1,-1],\n"logp_a": [null, -1]}',
            2,
            "logp_a[0] = nan inside a span",
        ),
        ('{"text": "hi",\n"prompt_bytes": "x"}', 2, "prompt_bytes is the string 'x'"),
        ('{"text": "hi",\n"prompt_bytes": -1}', 2, "prompt_bytes is the number -1; want a whole"),
        ('{"text": "hi",\n"prompt_bytes": 3}', 2, "prompt_bytes = 3 of 2 bytes"),
        ("[" * 100_000, None, "nested too deeply"),
    ],
)
def test_a_scores_file(tmp_path, monkeypatch, capsys, content, line, message):
    file = tmp_path / "s.json"
    file.write_text(content)
    code, err = run(monkeypatch, capsys, "--scores", file)
    place = f"{file}:{line}: " if line else f"{file}: "
    assert code == 2 and f"reflux.tokenalign: {place}" in err and message in err
    assert err.count("\n") == 1


def test_a_scores_file_that_is_not_utf8(tmp_path, monkeypatch, capsys):
    file = tmp_path / "s.json"
    file.write_bytes(b'{"text":\n"\xff"}')
    code, err = run(monkeypatch, capsys, "--scores", file)
    assert code == 2 and f"{file}:2: the file is not UTF-8" in err


def test_a_text_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "t.txt"
    file.write_bytes(b"so\nso\xff")
    code, err = run(monkeypatch, capsys, "--file", file)
    assert code == 2 and f"{file}:2: byte 0xff is not UTF-8" in err
    file.write_bytes(b"")
    code, err = run(monkeypatch, capsys, "--file", file)
    assert code == 2 and f"{file}: the text is empty" in err


def test_no_text(monkeypatch, capsys):
    code, err = run(monkeypatch, capsys, "--text", "")
    assert code == 2 and "--text: the text is empty: there is nothing to align" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    code, err = run(monkeypatch, capsys, "--file", "-")
    assert code == 2 and "-: the text is empty" in err
    code, err = run(monkeypatch, capsys, "--text", "a\udcff")
    assert code == 2 and "half of a surrogate pair" in err


def test_what_may_be_missing(tmp_path, monkeypatch, capsys):
    """A log p of null where the token is outside every span, stops without token scores."""
    text = {"text": "12345 hence", "stop_a": -0.5, "stop_b": 0.0}
    ids = PAIR[0].encode(text["text"])
    outside = {"ids_a": [-1, *ids], "logp_a": [None, -1.0, -1.0], "logp_b": LOGP["logp_b"]}
    for given in (text, text | LOGP | outside):
        (tmp_path / "s.json").write_text(json.dumps(given))
        assert run(monkeypatch, capsys, "--scores", tmp_path / "s.json")[0] == 0


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@settings(deadline=None)
@drawn(st.dictionaries(st.sampled_from([*KEYS, "x"]), ANYTHING, max_size=4))
def test_whatever_json_says_is_aligned_or_named(given):
    """No other exception, and the key of a GivenError is one that was given."""
    try:
        checked(given, 600, 300)
    except GivenError as error:
        assert error.key in given or error.key == ""
    try:
        command.align_text(*PAIR, given)
    except ValueError as error:
        assert str(error)
