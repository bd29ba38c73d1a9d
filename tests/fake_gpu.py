"""An imaginary GPU: tensors of any size without memory or a driver, for the host code of the ops.

    with FakeGPU() as gpu:
        loss(...).backward()          # hidden, head ... made inside, on device="gpu"
    gpu.peak                          # bytes

Custom ops run their real bodies, not their register_fake, up to the kernel launches, which
`_triton.launch` leaves out for fake tensors after it has compared their devices. A tensor that
stayed behind on the CPU, a read of a value (a synchronisation) and a wrong shape raise as on a GPU.
"""

import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.memory import PeakMemory  # noqa: E402
from reflux.kernels._triton import on_gpu  # noqa: E402

NAME = "gpu"
# torch >= 2.12: a device type without a C++ backend, experimental
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@cache
def register() -> None:
    """Make "gpu" a device of this process."""

    class Module(backend_registration._DummyBackendModule):
        @staticmethod
        def get_amp_supported_dtype():
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())


def is_no_cpu(x):
    return x.device.type != "cpu"


class FakeGPU(PeakMemory):
    """Also counts the bytes of the tensors that are alive, their largest sum and the largest."""

    def __init__(self) -> None:
        super().__init__(NAME)
        register()
        self._fake, self._stack = FakeTensorMode(), ExitStack()

    @property
    def largest_mib(self) -> float:
        return self.largest / 2**20

    def __enter__(self):
        if not self._stack._exit_callbacks:
            self._stack.enter_context(self._fake)
            self._stack.callback(setattr, on_gpu, "__code__", on_gpu.__code__)
            on_gpu.__code__ = is_no_cpu.__code__  # modules imported the function by name
        return super().__enter__()

    def close(self) -> None:
        self._stack.close()

    def reset(self) -> None:
        """Count the peak from what is alive now."""
        self.peak, self.largest = self.alive, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.dtype_out:  # its meta kernel wants a CUDA build
            out, a, b = kwargs["out"], *args[1:3]
            assert out.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
            assert out.dtype == args[3] and a.dtype == b.dtype and out.device == a.device
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)
