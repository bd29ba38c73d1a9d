"""Peak memory of a call by counting tensors, for a CPU, where there is no allocator to ask."""

import weakref
from collections.abc import Callable

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors of one device type that are alive, their largest sum, the largest one.

    Looks inside our custom ops. What a PyTorch operator uses and frees by itself is not seen, nor
    what was made before; a view counts as the memory it looks at, once.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.alive, self.peak, self.largest = 0, 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = OPDEFS.get(func._schema.name)
        if ours is not None:
            with self:
                return ours._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.device.type == self.device:
                self.count(x)
        return result

    def count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def peak_mib(fn: Callable[[], object], given: list[Tensor]) -> float:
    """Peak in MiB above `given`, the inputs."""
    with PeakMemory() as memory:
        for x in given:
            memory.count(x.detach())
        before = memory.alive
        memory.peak = before
        fn()
    return (memory.peak - before) / 2**20
