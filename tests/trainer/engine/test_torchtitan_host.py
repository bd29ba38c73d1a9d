"""The stubs that stand for torchtitan's data and tokenizer, and its log."""

import logging

import pytest
from runs import config
from torchtitan.tools.utils import device_type

from reflux.trainer.engine.engine import Engine
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


@pytest.mark.skipif(device_type != "cpu", reason="an accelerator has both")
@pytest.mark.parametrize(
    "over",
    [{"profiler": {"enable_memory_snapshot": True}}, {"training": {"enable_cpu_offload": True}}],
)
def test_what_only_a_gpu_has_is_refused_without_one(talkers, tmp_path, over):
    """Before anything is built: an AttributeError of torch.cpu at the first step before."""
    ((section, values),) = over.items()
    cfg = config(talkers, tmp_path / "run", "distill", **over)
    with pytest.raises(ValueError, match=f"^{section}.{[*values][0]} = true wants a GPU"):
        Engine(cfg)
