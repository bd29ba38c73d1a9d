"""The shim fills what torchtitan needs of its device module and of torch, once, and before
anything else.
"""

import pytest
import torch

from reflux.trainer.engine import compat

on_cpu = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="the device module is torch's own there"
)


@on_cpu
def test_installing_twice_keeps_the_first_module():
    assert compat.install()
    from torchtitan.tools import utils

    first = utils.device_module
    assert compat.install() and utils.device_module is first and utils.device_type == "cpu"


@on_cpu
def test_the_device_module_answers_as_torch_cuda_would():
    module = compat.CpuModule()
    assert module.current_device() == 0 and module.is_available() == torch.cpu.is_available()
    assert module.get_device_properties().total_memory > 2**28
    before = module.memory_stats()["active_bytes.all.peak"]
    hog = torch.ones(2**24)  # 64 MiB on top of whatever is resident
    assert 2**24 < before <= module.memory_stats()["active_bytes.all.peak"] and hog.sum() > 0


def test_torch_has_every_name_torchtitan_imports():
    compat.install()
    import torchtitan.trainer  # noqa: F401  fails on torch 2.11 without the shim

    assert callable(torch.distributed.set_timeout) and isinstance(
        torch.distributed.fsdp.DataParallelMeshDims, type
    )


@on_cpu
def test_coming_too_late_is_an_error_and_not_a_silent_cuda(monkeypatch):
    compat.install()
    import torchtitan.distributed.utils  # noqa: F401  a module that copies the device names
    from torchtitan.tools import utils

    monkeypatch.setattr(utils, "device_module", torch.cpu)
    with pytest.raises(RuntimeError, match="came too late"):
        compat.install()
