"""The row functions behind token_kl and linear_kl: what the ops alone would not vary."""

from unittest.mock import patch

import pytest
import torch
from close import DEVICE, PATHS, running

from reflux.kernels import _triton
from reflux.kernels._chunks import padded, project
from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._kl_rows import KLSpec, kl_rows

# numpy, about -inf - -inf in masked lanes
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not _triton.HAS_TRITON, reason="rows of kernels"),
]
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def block(C, V, seed=0):
    """A block with pads, made by project from random hidden states; call it inside running()."""
    g = torch.Generator().manual_seed(seed)
    return project(
        torch.randn(C, 4, generator=g).to(DEVICE), torch.randn(V, 4, generator=g).to(DEVICE)
    )


def spec_of(divergence, scale, softcap=0.0):
    return KLSpec(divergence, 0.25, (scale, scale), softcap, "")


def rows_of(z_CV, u_CV, divergence, dz_CV, softcap=0.0):
    coeff_C = torch.linspace(-1, 2, len(z_CV), device=DEVICE)
    return kl_rows(z_CV, u_CV, coeff_C, spec_of(divergence, 0.5, softcap), dz_CV)


@each_divergence
def test_pads_change_nothing_to_the_bit(divergence):
    with running("kernel", 64):
        z_CV, u_CV = block(3, 70), block(3, 70, seed=1)
        assert (
            z_CV.shape == (3, 70)
            and z_CV.stride() == (128, 1)
            and (padded(z_CV)[:, 70:] == -torch.inf).all()
        )
        dz_CV, wide_CV = torch.empty(3, 70, device=DEVICE), torch.empty(3, 128, device=DEVICE)
        kl_C = rows_of(z_CV, u_CV, divergence, dz_CV, softcap=30.0)
        same_C = rows_of(padded(z_CV), padded(u_CV), divergence, wide_CV, softcap=30.0)
    assert kl_C.equal(same_C) and dz_CV.equal(wide_CV[:, :70])
    assert (wide_CV[:, 70:] == 0).all()  # finite: a GEMM over pads would not meet NaN


@pytest.mark.parametrize("path", PATHS)
@each_divergence
def test_a_row_knows_nothing_of_its_neighbours_or_of_where_its_gradient_goes(path, divergence):
    """In a chunk or alone, in place or beside, with a gradient or without: the same bits."""
    with running(path, 128):
        z_CV, u_CV = padded(block(3, 180)), padded(block(3, 180, seed=1))
        dz_CV, alone_CV = torch.empty_like(z_CV), z_CV[1:2].clone()
        kl_C = rows_of(z_CV, u_CV, divergence, dz_CV)
        coeff_C = torch.linspace(-1, 2, 3, device=DEVICE)[1:2]
        alone_C = kl_rows(alone_CV, u_CV[1:2], coeff_C, spec_of(divergence, 0.5), alone_CV)
        assert alone_C.equal(kl_C[1:2]) and alone_CV.equal(dz_CV[1:2])
        assert rows_of(z_CV[:1], u_CV[:1], divergence, None).equal(kl_C[:1])


@pytest.mark.parametrize("path", PATHS)
def test_a_bf16_gradient_of_fp32_logits_is_the_rounded_one(path):
    with running(path, 64):
        z_CV, u_CV = block(3, 100), block(3, 100, seed=1)
        dz_CV, half_CV = (
            torch.empty(3, 100, device=DEVICE),
            torch.empty(3, 100, device=DEVICE, dtype=torch.bfloat16),
        )
        rows_of(z_CV, u_CV, "jsd", dz_CV)
        rows_of(z_CV, u_CV, "jsd", half_CV)
    assert (
        (half_CV.float() - dz_CV).abs() <= 2**-7 * dz_CV.abs()
    ).all() and half_CV.abs().max() > 0


@each_divergence
def test_a_row_that_was_not_chosen_has_no_gradient_whatever_lay_in_memory(divergence):
    """Its statistics are never written: ones lie there, as NaN would hide a missing check."""
    real = torch.Tensor.new_empty

    def ones(x, *args, **options):
        return real(x, *args, **options).fill_(1.0)

    with running("kernel", 64), patch.object(torch.Tensor, "new_empty", ones):
        z_CV, u_CV, chosen_C = (
            block(2, 70),
            block(2, 70, seed=1),
            torch.tensor([False, True], device=DEVICE),
        )
        dz_CV = torch.empty(2, 70, device=DEVICE)
        coeff_C = torch.ones(2, device=DEVICE)
        kl_C = kl_rows(z_CV, u_CV, coeff_C, spec_of(divergence, 1.0), dz_CV, chosen_C)
    assert kl_C[0] == 0 and (dz_CV[0] == 0).all() and kl_C[1] > 0 and dz_CV[1].abs().max() > 0


def test_rows_beyond_two_to_the_31_elements():
    """int32 offsets would wrap. 4 GB of addresses, of which three rows are ever touched."""
    far_CV = torch.empty(2 * 2**30 + 40, dtype=torch.float16, device=DEVICE).as_strided(
        (3, 40), (2**30, 1)
    )
    near_CV = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(
        DEVICE, torch.float16
    )
    far_CV.copy_(near_CV)
    u_CV, dz_CV, far_dz_CV = near_CV.flip(0), torch.empty_like(near_CV), far_CV
    with running("kernel", 64):
        kl_C = rows_of(near_CV, u_CV, "skew_forward", dz_CV)
        assert rows_of(far_CV, u_CV, "skew_forward", far_dz_CV).equal(kl_C) and far_dz_CV.equal(
            dz_CV
        )
