"""A tokenizer that transformers reads in another way than it lies in its folder, and one that
panics.
"""

import json
import shutil
import warnings

import pytest
from assets import save_tokenizer, sentences, train_tokenizer
from runs import config, run_here
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


def unknown_token_folder(model, out):
    """A copy of the model whose tokenizer knows lower-case letters, digits and little else: what it
    does not know becomes <unk>, as with SentencePiece without byte_fallback.
    """
    shutil.copytree(model, out)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=?.:"
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0)]
    pieces += [(c, -3.0) for c in characters if c != " "]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for file in out.glob("*token*"):
        file.unlink()
    for file in out.glob("*template*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out)
    return out


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_token_vocabulary_trains_by_itself_and_is_refused_by_bytes(
    talkers, tmp_path, titan_process
):
    """Its ids lose what they do not know, so it has no byte table: an error in words wherever bytes
    are needed, before a step; training on its own ids needs none.
    """
    folder = unknown_token_folder(talkers / "policy", tmp_path / "unknown")
    chat = Chat(str(folder))
    assert chat.decode(chat.encode("1 + 2 = 3")) == "1 + 2 = 3" and chat.encode("\u00e9") == (0,)
    with pytest.raises(ValueError, match=r"does not spell .*byte_fallback loses what it does not"):
        _ = chat.table
    own = {"model": {"path": str(folder)}, "rollout": {"max_tokens": 8}}
    sft = {"objective": "nll", "source": "dataset", "on_policy": 0.0}
    run = run_here(config(talkers, tmp_path / "sft", "distill", steps=1, distill=sft, **own))
    assert run.steps[0]["loss"] > 0
    for phase in ("calibrate", "distill"):
        other = {"teacher": {"path": str(talkers / "proxy"), "dtype": "float32"}}
        over = {"distill": {"objective": "byte"}, **other} if phase == "distill" else {}
        with pytest.raises(ValueError, match="byte_fallback loses what it does not know"):
            run_here(config(talkers, tmp_path / phase, phase, **own, **over))
        assert not (tmp_path / phase / "checkpoint").exists()
