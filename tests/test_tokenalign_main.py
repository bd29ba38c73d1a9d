"""What `python -m reflux.tokenalign A B --text ...` prints."""
import sys
from importlib import import_module

import pytest
from test_byte_table import byte_level, sentencepiece
from test_spans import side_of

from reflux.tokenalign.spans import align_spans

view = import_module("reflux.tokenalign.__main__")


def test_spans_stand_above_each_other():
    a, b = side_of([b"the", b" cat", b"alog"]), side_of([b"the", b" ca", b"talog"])
    assert view.show(a, b, align_spans([a], [b])[0]) == "A the ‖ ·cat|alog\nB the ‖ ·ca|talog"


def test_what_cannot_be_seen_is_shown():
    a, b = side_of([b" ", "\n你".encode()], skip=1), side_of([b"\n", b"\xe4", b"\xbd\xa0"])
    assert view.show(a, b, align_spans([a], [b])[0]).splitlines() == ["A ∅|\\n你", "B \\n|<e4>|<bd a0>"]


def test_a_text_that_does_not_come_back_is_refused():
    with pytest.raises(ValueError, match="tokenizer A spells b'caf\\\\xc3\\\\xa9'"):
        view.compare(byte_level("NFC"), byte_level(), "cafe\u0301")
    assert "7 bytes" in view.compare(byte_level(), sentencepiece("bpe"), "12345 +")


def test_the_command(tmp_path, monkeypatch, capsys):
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reflux.tokenalign", str(tmp_path), str(tmp_path), "--text", "so 12345"])
    view.main()
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("8 bytes, ") and "‖" in printed
