"""One rank's error is every rank's error."""

import pytest
import torch.distributed as dist
from shards import run_on_ranks

from reflux.trainer.engine.agreement import agreed, is_first_rank


def raising(error: Exception):
    def check():
        raise error

    return check


def test_alone_it_is_a_plain_call():
    assert agreed(lambda: 7) == 7 and is_first_rank()
    with pytest.raises(ValueError, match="a tensor is missing"):
        agreed(raising(ValueError("a tensor is missing")))
    with pytest.raises(ValueError, match="no such disk"):
        agreed(raising(OSError("no such disk")))
    with pytest.raises(KeyError):  # a bug is no mistake of the user
        agreed(raising(KeyError("x")))


def one_rank_fails(failing: int) -> str:
    check = raising(ValueError("shard 2 is torn")) if dist.get_rank() == failing else lambda: 7
    try:
        agreed(check)
    except ValueError as error:
        return str(error)
    return "no error"


def test_all_ranks_end_with_the_words_of_the_one_that_failed():
    assert run_on_ranks(one_rank_fails, 1) == ["shard 2 is torn"] * 2
    assert run_on_ranks(one_rank_fails, 5) == ["no error"] * 2
