"""A disk that is full is reported as such, and everything else as torch reports it."""

import errno

import pytest
import torch
import torch.distributed.checkpoint as dcp
from full_disk import limited_files, small_disk
from torch.distributed.checkpoint.api import CheckpointException

from reflux.trainer.engine.checkpoint_writer import CheckpointWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {f"weight.{i}": torch.arange(50_000.0) for i in range(5)}  # 1 MB


def save(folder):
    dcp.save(dict(STATE), storage_writer=CheckpointWriter(folder), no_dist=True)


def first(error: CheckpointException) -> BaseException:
    return error.failures[0][0]


@pytest.mark.parametrize("kilobytes", [0.001, 1, 60, 300, 700, 999])
def test_a_limit_on_files_is_named(tmp_path, kilobytes):
    with limited_files(int(kilobytes * 1000)), pytest.raises(CheckpointException) as caught:
        save(tmp_path / "x")
    assert isinstance(first(caught.value), OSError) and first(caught.value).errno == errno.EFBIG


@pytest.mark.parametrize("megabytes", [0.02, 0.3, 0.9])
def test_a_full_disk_is_named(tmp_path, megabytes):
    with small_disk(tmp_path / "disk", megabytes) as disk:
        with pytest.raises(CheckpointException) as caught:
            save(disk / "x")
    assert isinstance(first(caught.value), OSError) and first(caught.value).errno == errno.ENOSPC


def test_with_space_it_writes_what_torch_writes(tmp_path):
    save(tmp_path / "x")
    back = {name: torch.zeros_like(x) for name, x in STATE.items()}
    dcp.load(back, checkpoint_id=tmp_path / "x", no_dist=True)
    assert all(torch.equal(back[name], x) for name, x in STATE.items())
