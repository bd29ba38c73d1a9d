"""The stubs that stand for torchtitan's data and tokenizer, and its log."""

import logging

import pytest

from reflux.trainer.engine.torchtitan_host import NoData, NoTokenizer, _is_worth_logging


def test_the_stubs_hold_nothing():
    data, tokenizer = NoData(NoData.Config()), NoTokenizer(NoTokenizer.Config())
    assert list(data) == [] and tokenizer.get_vocab_size() == 0
    data.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="use Chat"):
        tokenizer.encode("text")


@pytest.mark.parametrize(
    "path, level, logged",
    [
        ("/x/torchtitan/tools/utils.py", logging.WARNING, False),
        ("/x/torchtitan/tools/utils.py", logging.ERROR, True),
        ("/x/reflux/trainer/loop.py", logging.INFO, True),
    ],
)
def test_of_torchtitan_only_errors_are_logged(path, level, logged):
    record = logging.LogRecord("root", level, path, 1, "text", None, None)
    assert _is_worth_logging(record) == logged
