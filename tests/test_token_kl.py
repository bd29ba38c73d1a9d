"""token_kl on both paths: float64 parity on logits, banned tokens, what is shared with linear_kl."""
import pytest
import torch
from close import DEVICE, PATHS, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels._divergence import MODES
from reflux.kernels.token_kl import _op, token_kl, token_kl_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about -inf - -inf in masked lanes


def inputs(T, V, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(T, V, generator=g).mul(3).to(DEVICE, dtype) for _ in range(2)]
    return logits, torch.randn(T, generator=g).to(DEVICE)


def run(fn, logits, dtype, **options):
    z_TV, u_TV = (x.detach().to(dtype) for x in logits)
    out = fn(z_TV.requires_grad_(), u_TV, **options)
    return out.kl, torch.autograd.grad(out.total * -0.7, z_TV)[0]


@pytest.mark.parametrize("path", PATHS)
@given(T=st.integers(0, 3), V=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       mode=st.sampled_from(MODES), temperature=st.sampled_from([0.5, 1.0, 2.0]),
       block_v=st.sampled_from([64, 256, 2048]), seed=st.integers(0, 2**31 - 1))
def test_values_and_gradient_match_the_definition(path, T, V, dtype, mode, temperature, block_v, seed):
    logits, weight_T = inputs(T, V, dtype, seed)
    options = dict(mode=mode, temperature=temperature, weight=weight_T)
    with running(path, block_v):
        got = run(token_kl, logits, dtype, **options)
    same_dtype = run(token_kl_ref, logits, dtype, **options)
    truth = run(token_kl_ref, logits, torch.float64, **options)
    for what, a, b, c in zip(("kl", "dlogits"), got, same_dtype, truth, strict=True):
        assert_no_worse(a, b, c, what)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_banned_on_both_sides_change_nothing(path, mode):  # T16
    logits, weight_T = inputs(3, 60, torch.float32, 1)
    wider = [torch.cat([x.new_full((3, 70), -torch.inf), x], 1) for x in logits]
    with running(path, 64):
        kl_T, dz_TV = run(token_kl, logits, torch.float32, mode=mode, weight=weight_T)
        same_T, dwider_TV = run(token_kl, wider, torch.float32, mode=mode, weight=weight_T)
    torch.testing.assert_close(same_T, kl_T)
    torch.testing.assert_close(dwider_TV[:, 70:], dz_TV, atol=1e-6, rtol=1e-5)
    assert (dwider_TV[:, :70] == 0).all() and dz_TV.sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_a_token_banned_on_one_side(path, mode):
    """forward is inf where the student bans, reverse where the teacher does; mixtures stay finite."""
    for side, infinite in ((0, "forward"), (1, "reverse")):
        logits, _ = inputs(2, 40, torch.float32, 2)
        logits[side][0, 7] = -torch.inf
        with running(path, 64):
            kl_T, dz_TV = run(token_kl, logits, torch.float32, mode=mode)
        assert kl_T[0].isinf() == (mode == infinite) and kl_T[1].isfinite()
        assert dz_TV.isfinite().all() and (dz_TV[0] == 0).all() == (mode == infinite)


@pytest.mark.parametrize("path", PATHS)
def test_close_distributions_keep_their_gradient(path):
    """Max and log-sum apart: near p = q subtracting two logsumexps would cost most of the digits."""
    logits, _ = inputs(3, 200, torch.float32, 3)
    logits[1] = logits[0] + 50 + 1e-3 * logits[1]
    with running(path, 64):
        _, dz_TV = run(token_kl, logits, torch.float32)
    _, truth_TV = run(token_kl_ref, logits, torch.float64)
    assert (dz_TV - truth_TV).norm() < 2e-3 * truth_TV.norm()


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    logits, weight_T = inputs(3, 20, torch.float32, 4)
    with running(path, 64):
        torch.library.opcheck(_op, (logits[0].requires_grad_(), logits[1], weight_T, None, "jsd", 0.5, 1.0, False, 20, "", 0,
                                          True))


def test_wrong_shapes_say_how_to_fix_them():
    with pytest.raises(ValueError, match="pass vocab_size"):
        token_kl(torch.zeros(2, 3), torch.zeros(2, 4))
