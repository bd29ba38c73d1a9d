"""A tokenizer that transformers reads in another way than it lies in its folder, and one that
panics.
"""

import json
import warnings

import pytest
from assets import save_tokenizer, sentences, train_tokenizer

from reflux.trainer.data import tokenizer_health
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.tokenizer_health import panics_in_words, warn_of_another_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(sentences(100), 300), folder)
    return folder


def test_a_tokenizer_as_it_lies_there_is_not_spoken_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat = Chat(str(folder))
        warn_of_another_tokenizer("/nowhere", chat.tokenizer)


def test_a_lost_regex_is_found_at_the_start(folder, tmp_path):
    """The folder's file splits digits, the loaded tokenizer does not."""
    chat = Chat(str(folder))
    table = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    table["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, *filter(None, [table["pre_tokenizer"]])],
    }
    split = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    table["pre_tokenizer"]["pretokenizers"].insert(0, split)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.warns(UserWarning, match="tokenizer.json cuts it into .* tokenizer_class"):
        warn_of_another_tokenizer(str(tmp_path), chat.tokenizer)


def test_a_file_that_the_library_cannot_read_is_left_to_loading(folder, tmp_path):
    chat = Chat(str(folder))
    (tmp_path / "tokenizer.json").write_text("{")
    warn_of_another_tokenizer(str(tmp_path), chat.tokenizer)


class PanicException(BaseException):
    """As pyo3 names it."""


def test_a_panic_is_an_error_in_words(folder, monkeypatch):
    chat = Chat(str(folder))

    def panic(*_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("reflux.trainer.data.chat.encode_text", panic)
    with pytest.raises(ValueError, match="broke off on 'abc' .index out of bounds.*damaged"):
        chat.encode("abc")


def test_what_is_no_panic_goes_on():
    with pytest.raises(KeyboardInterrupt), panics_in_words("a", "b"):
        raise KeyboardInterrupt


def test_probes_hold_what_a_regex_decides():
    assert len(tokenizer_health._probes()) == len(set(tokenizer_health._probes())) > 20
