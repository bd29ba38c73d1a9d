"""What every kernel test shares: tolerances, poisoned memory, the switch into the interpreter."""

from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from reflux.kernels import _chunks, _triton

GUARD = 64  # elements
_EMPTY = torch.empty
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a GPU has no PyTorch path: both names mean kernel
PATHS = ("kernel", "torch") if _triton.HAS_TRITON else ("torch",)


def assert_no_worse(got: Tensor, same_dtype: Tensor, truth: Tensor, what: str) -> None:
    """max|got - truth| <= 2 max|torch at this dtype - truth| + 8 ulp(max(1, largest entry)).

    truth is fp64; if got is, too, 16 ulp. They pay for exp/log approximations, and for Triton's CPU
    interpreter, which stores bf16 by truncation.
    """
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, want {list(truth.shape)}"
    if got.numel() == 0:
        return
    assert not got.isnan().any(), f"{what}: NaN"
    ours = (got.double() - truth).abs().max()
    torchs = (same_dtype.double() - truth).abs().max()
    ulps = 16 if got.dtype == torch.float64 else 8  # in fp64 the truth is rounded as well
    allowed = 2 * torchs + ulps * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=1)
    assert ours <= allowed, (
        f"{what}: error {ours:.1e}, allowed {allowed:.1e} (torch at this dtype: {torchs:.1e})"
    )


def assert_gradient_close(got: Tensor, truth: Tensor, what: str, relative: float) -> None:
    """|got - truth| <= relative |truth| in the Euclidean norm: for gradients through GEMMs."""
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, want {list(truth.shape)}"
    assert not got.isnan().any(), f"{what}: NaN"
    error, size = (got.double() - truth).norm(), truth.norm()
    assert error <= relative * size + 1e-12 * got.numel() ** 0.5 + torch.finfo(got.dtype).tiny, (
        f"{what}: error {error:.1e} of {size:.1e}, allowed {relative:.0e} of it"
    )


def assert_losses_close(got: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """total and kl, the first two results of a divergence op, against those in fp64."""
    for name, a, b in zip(("total", "kl"), got, truth):
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, w=name: f"{w}: {m}"
        )


def assert_compiles(loss: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """loss(*leaves) becomes one graph, with the gradients that it has without."""
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with running("torch"):
        got = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


def _poisoned(
    allocate: Callable[..., Tensor], guards: list[Tensor], fill: float | None
) -> Callable[..., Tensor]:
    """allocate with GUARD NaNs behind its result, which holds `fill` or, if None, what it held."""

    def guarded(*args, **options):
        x = allocate(*args, **options)
        if not x.is_floating_point():
            return x
        if type(x) is Tensor and not x.is_meta and x.is_contiguous():
            with _disable_current_modes():  # who counts allocations has seen x
                room = _EMPTY(x.numel() + GUARD, dtype=x.dtype, device=x.device).fill_(float("nan"))
                guards.append(room[x.numel() :])
                x = room[: x.numel()].view(x.shape).copy_(x)
        return x if fill is None else x.fill_(fill)

    return guarded


@contextmanager
def running(path: str, block_v: int = 2048):
    """Run kernels, in the interpreter without a GPU, or the PyTorch path.

    torch.empty fills its memory with NaN. An element that nobody wrote then fails loudly, and so
    does a write behind the end of a tensor. block_v is drawn by tests: a fixed one hides a missing
    rescale.
    """
    assert "new_empty" not in vars(torch.Tensor), (
        "an earlier test left torch.Tensor.new_empty patched"
    )
    guards: list[Tensor] = []

    def poisoned(allocate, fill: float | None = float("nan")):
        return _poisoned(allocate, guards, fill)

    with (
        patch.object(_triton, "FORCE_INTERPRET", path == "kernel"),
        patch.object(_triton, "BLOCK_V", block_v),
        patch.object(torch, "empty", poisoned(torch.empty)),
        patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        patch.object(torch.Tensor, "new_zeros", poisoned(torch.Tensor.new_zeros, None)),
        patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield
    assert all(guard.isnan().all() for guard in guards), "a kernel wrote behind the end of a tensor"


class NoLargeTensor(TorchDispatchMode):
    """Fails on any result of `limit` elements or more, inside our custom ops, too: no [T, V]."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = OPDEFS.get(func._schema.name)
        if ours is None:
            out = func(*args, **(kwargs or {}))
        else:  # dispatching it whole would hide what its body allocates
            with self:
                out = ours._init_fn(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:
            return out  # another view of memory that is there: how the interpreter copies
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dtype == torch.uint8:
                continue  # the interpreter's copy of a tensor that is there
            assert not isinstance(x, Tensor) or x.numel() < self.limit, (
                f"{func} made {list(x.shape)}"
            )
        return out


def wide_gemms() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """torch.mm and torch.addmm with the `out_dtype` that only CUDA builds have: a product of 16-bit
    matrices in fp32.
    """
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a: Tensor, b: Tensor, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        product = mm(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)

    def wide_addmm(c: Tensor, a: Tensor, b: Tensor, *, out_dtype=None, out=None, **factors):
        if out_dtype is None:
            options = factors if out is None else factors | {"out": out}
            return addmm(c, a, b, **options)
        total = addmm(c, a.to(out_dtype), b.to(out_dtype), **factors)
        return total if out is None else out.copy_(total)

    return wide_mm, wide_addmm


@contextmanager
def tensor_cores():
    """What ops do with 16-bit inputs on a GPU, on a CPU: GEMMs with fp32 output, chunks in groups,
    lifted fp16 gradients. Nothing to do where there is a GPU.
    """
    if DEVICE != "cpu":
        yield
        return
    mm, addmm = wide_gemms()
    asked, code = _chunks.on_tensor_cores, _chunks.on_tensor_cores.__code__
    # the code object, so that modules that imported the function by name see it, too
    asked.__code__ = (lambda x: x.dtype.itemsize == 2).__code__
    try:
        with patch.object(torch, "mm", mm), patch.object(torch, "addmm", addmm):
            yield
    finally:
        asked.__code__ = code
