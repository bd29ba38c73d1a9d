"""Lets torchtitan 0.3.0 run without an accelerator and on torch 2.11 and 2.13; the only file that
patches anything.

The room's __init__.py calls install(). It must come before any other torchtitan import: several of
torchtitan's modules copy the names `device_type` and `device_module` when they are imported. It is
idempotent, and adds nothing on torch >= 2.14 with an accelerator.
"""

import dataclasses
import os
import resource
import sys
import types

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp


class CpuModule:
    """torch.cpu plus the calls torchtitan makes on its device module (the names of torch.cuda)."""

    __name__ = "torch.cpu"

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    # torch.cpu answers "cpu"; barrier(device_ids=[...]) wants an int
    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        pass

    def get_device_name(self, device=None) -> str:
        return "cpu"

    def get_device_properties(self, device=None) -> types.SimpleNamespace:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(name="cpu", total_memory=memory_bytes)

    def memory_stats(self, device=None) -> dict[str, int]:
        """The process's peak resident memory stands in for the allocator's."""
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "active_bytes.all.peak": peak_bytes,
            "reserved_bytes.all.peak": peak_bytes,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device=None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def _set_timeout(timeout, group=None) -> None:
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def _fill_torch_gaps() -> None:
    """Adds names that torchtitan 0.3.0 uses and older torch lacks."""
    # torch 2.11; only SPMD back ends never selected here build one
    if not hasattr(fsdp, "DataParallelMeshDims"):
        fields = [("shard", object, None), ("replicate", object, None)]
        added = dataclasses.make_dataclass("DataParallelMeshDims", fields)
        fsdp.DataParallelMeshDims = added  # type: ignore[misc, assignment]  # no stub to satisfy
    if not hasattr(dist, "set_timeout"):  # torch <= 2.13 has the private form only
        dist.set_timeout = _set_timeout  # type: ignore[attr-defined]  # the name is new


def install() -> bool:
    """Fills the gaps. True if the CPU device module is in place, False where an accelerator is
    present.

    RuntimeError if torchtitan's device-dependent modules were imported first: they would keep
    device "cuda".
    """
    _fill_torch_gaps()
    if torch.accelerator.is_available():
        return False
    late = "torchtitan.distributed.utils" in sys.modules
    from torchtitan.tools import utils  # imports nothing that copies the device names

    if isinstance(utils.device_module, CpuModule):
        return True
    if late:
        raise RuntimeError(
            "compat.install() came too late: torchtitan was imported before it. Import "
            "reflux.trainer.engine before torchtitan."
        )
    utils.device_type, utils.device_module = "cpu", CpuModule()
    return True
