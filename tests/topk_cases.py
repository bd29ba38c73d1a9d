"""What the tests of the truncated divergences share: their cases, a teacher's top-k, runs."""

import torch
from close import DEVICE
from torch import Tensor

from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._topk_inputs import TAILS, ZERO

ALLOWED = [
    (d, t) for d in DIVERGENCES for t in TAILS if d == "forward" or t in ("bucket", "renorm")
] + [(d, ZERO) for d in DIVERGENCES if d != "reverse"]
# 0 at p = q, and nowhere negative
PROPER = [(d, t) for d, t in ALLOWED if t in ("bucket", "renorm")]


def top_k(
    teacher_logits_TV: Tensor, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [T, k], logp [T, k], tail [T]) of the k likeliest tokens, in float64."""
    logq_TV = (teacher_logits_TV.double() / temperature).log_softmax(1)
    logp_TK, ids_TK = logq_TV.topk(k, dim=1)
    return ids_TK.int(), logp_TK, logq_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)


def pad_some(ids_TK: Tensor, logp_TK: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Padding of each kind, in columns that other rows use, and one row of nothing else."""
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


def floats(topk, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in topk]


def student(T: int, V: int, D: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden [T, D], head [V, D] and bias [V]."""
    shapes = (T, D), (V, D), (V,)
    return [randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def with_bias(fn):
    """bias as a third tensor, so that `run` differentiates it."""
    return lambda x_TD, w_VD, b_V, *topk, **options: fn(x_TD, w_VD, *topk, bias=b_V, **options)


def with_junk(w_VD: Tensor, b_V: Tensor) -> tuple[Tensor, Tensor]:
    """Two more head rows that vocab_size has to leave out (T15)."""
    return torch.cat([w_VD, torch.full_like(w_VD[:2], 50.0)]), torch.cat([b_V, b_V[:2] * 0 + 9.0])


def signed_weights(T: int, seed: int) -> Tensor:
    """Of both signs, and some 0."""
    w_T = randn(T, seed=seed, dtype=torch.float32)
    return w_T * (w_T.abs() > 0.3)


def run(fn, tensors: list[Tensor], topk, dtype: torch.dtype, **options) -> list[Tensor]:
    """[total, kl, *gradients] of fn at copies of the tensors in `dtype`; upstream gradient -0.7."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = fn(*leaves, *topk, **options)
    assert not out.kl.requires_grad
    return [out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, leaves)]


def assert_gradient_no_worse(
    got: Tensor, same_dtype: Tensor, truth: Tensor, what: str, relative: float
) -> None:
    """|got - truth| <= relative |truth| + 2 |torch at this dtype - truth| in the Euclidean norm.

    A GEMM's tolerance, and what the definition itself loses where p - q is small.
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
