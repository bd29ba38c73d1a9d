"""What the tests of the truncated divergences share: allowed combinations, kept teacher rows, runs
with gradients.
"""

import torch
from close import DEVICE
from torch import Tensor

from reflux.kernels._divergence import MODES
from reflux.kernels._topk_rows import TAILS

ALLOWED = [(m, t) for m in MODES for t in TAILS if m == "forward" or t in ("bucket", "renorm")]
# 0 at p = q, and nowhere negative
PROPER = [(m, t) for m, t in ALLOWED if t in ("bucket", "renorm")]


def keep(
    teacher_logits_TV: Tensor, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [T, k], logp [T, k], tail [T]) of the k largest classes, in float64."""
    logq_TV = (teacher_logits_TV.double() / temperature).log_softmax(1)
    logp_TK, ids_TK = logq_TV.topk(k, dim=1)
    return ids_TK.int(), logp_TK, logq_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)


def pad_some(ids_TK: Tensor, logp_TK: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Padding of each kind, in columns that keep a live id, and one row of nothing else."""
    ids_TK, logp_TK = ids_TK.clone(), logp_TK.clone()
    if ids_TK.shape[1] > 2:
        ids_TK[::3, -1], ids_TK[1::3, 0] = -1, V
        logp_TK[2::3, 1] = -torch.inf
    ids_TK[1:2] = -1
    return ids_TK, logp_TK


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(DEVICE, dtype)


def signed_weights(T: int, seed: int) -> Tensor:
    """Of both signs, and some 0."""
    w_T = randn(T, seed=seed, dtype=torch.float32)
    return w_T * (w_T.abs() > 0.3)


def run(fn, tensors: list[Tensor], kept, dtype: torch.dtype, **options) -> list[Tensor]:
    """[total, kl, *gradients] of fn at copies of the tensors in `dtype`; upstream gradient -0.7."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = fn(*leaves, *kept, **options)
    assert not out.kl.requires_grad
    return [out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, leaves)]


def assert_gradient_no_worse(
    got: Tensor, same_dtype: Tensor, truth: Tensor, what: str, relative: float
) -> None:
    """|got - truth| <= relative |truth| + 2 |torch at this dtype - truth| in the Euclidean norm: a
    GEMM's tolerance, and what the definition itself loses where p - q is small.
    """
    assert got.shape == truth.shape and not got.isnan().any(), (
        f"{what}: NaN, or shape {list(got.shape)}"
    )
    error, torchs, size = (
        (a.double() - b).norm() for a, b in ((got, truth), (same_dtype, truth), (truth, 0 * truth))
    )
    allowed = relative * size + 2 * torchs + 1e-12 * got.numel() ** 0.5
    assert error <= allowed, (
        f"{what}: error {error:.1e} of {size:.1e}, allowed {allowed:.1e} (torch at this dtype: "
        f"{torchs:.1e})"
    )
