"""token_logprob on both paths: float64 parity, typical accuracy, banned tokens, views."""
from functools import partial

import pytest
import torch
from close import DEVICE, PATHS, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels.token_logprob import _op, token_logprob, token_logprob_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about -inf - -inf in masked lanes
SEEDS = st.integers(0, 2**31 - 1)
with_entropy = partial(token_logprob, entropy=True)


def inputs(T, V, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(T, V, generator=g).mul(4).to(DEVICE, dtype)
    return logits_TV, torch.randint(-1, V, (T,), generator=g).to(DEVICE)  # -1 = ignored row


def run(fn, logits_TV, target_T, temperature, dtype):
    """logp, entropy and the gradient under upstream gradients of mixed signs."""
    x_TV = logits_TV.detach().to(dtype).requires_grad_()
    logp_T, entropy_T = fn(x_TV, target_T, temperature=temperature)
    up_T = torch.linspace(-1, 2, len(target_T), device=DEVICE)
    (dx_TV,) = torch.autograd.grad((logp_T * up_T).sum() - 0.5 * (entropy_T * up_T).sum(), x_TV)
    return logp_T.detach(), entropy_T.detach(), dx_TV


@pytest.mark.parametrize("path", PATHS)
@given(T=st.integers(0, 4), V=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       temperature=st.sampled_from([0.5, 1.0, 1.7]), block_v=st.sampled_from([64, 256, 2048]), seed=SEEDS)
def test_values_and_gradient_match_the_definition(path, T, V, dtype, temperature, block_v, seed):
    logits_TV, target_T = inputs(T, V, dtype, seed)
    with running(path, block_v):
        got = run(with_entropy, logits_TV, target_T, temperature, dtype)
    same_dtype = run(token_logprob_ref, logits_TV, target_T, temperature, dtype)
    truth = run(token_logprob_ref, logits_TV, target_T, temperature, torch.float64)
    for what, a, b, c in zip(("logp", "entropy", "dlogits"), got, same_dtype, truth, strict=True):
        assert_no_worse(a, b, c, what)


@pytest.mark.parametrize("path", PATHS)
def test_the_typical_gradient_error_is_torchs(path):
    """A bound on single examples must forgive the worst case; a median over seeds need not."""
    ours, torchs = [], []
    for seed in range(20):
        logits_TV, target_T = inputs(4, 136, torch.float32, seed)
        truth_TV = run(token_logprob_ref, logits_TV, target_T, 0.5, torch.float64)[2]
        with running(path, 256):
            ours.append((run(with_entropy, logits_TV, target_T, 0.5, torch.float32)[2] - truth_TV).abs().max())
        torchs.append((run(token_logprob_ref, logits_TV, target_T, 0.5, torch.float32)[2] - truth_TV).abs().max())
    ours, torchs = torch.stack(ours).median(), torch.stack(torchs).median()
    assert ours <= 4 * torchs, f"median error over 20 seeds {ours:.1e}, torch {torchs:.1e}"


@pytest.mark.parametrize("path", PATHS)
def test_adding_a_constant_to_a_row_changes_nothing_and_gradients_sum_to_zero(path):
    logits_TV, target_T = inputs(3, 70, torch.float32, 1)
    with running(path, 64):
        a, b = (run(with_entropy, logits_TV + c, target_T, 1.0, torch.float32) for c in (0.0, -32.0))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)
    assert a[2].sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_banned_tokens_change_nothing(path):
    logits_TV, target_T = inputs(3, 60, torch.float32, 2)
    wider_TV = torch.cat([logits_TV.new_full((3, 70), -float("inf")), logits_TV], 1)  # whole blocks of -inf
    with running(path, 64):
        got = run(with_entropy, wider_TV, torch.where(target_T < 0, -1, target_T + 70), 1.0, torch.float32)
        want = run(with_entropy, logits_TV, target_T, 1.0, torch.float32)
    assert (got[2][:, :70] == 0).all()
    for x, y in zip((*got[:2], got[2][:, 70:]), want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("T", [0, 1, 5])  # 0: a rank may hold no tokens
def test_a_view_gives_what_its_copy_gives(path, T):
    logits_TV, target_T = inputs(2 * T, 40, torch.float32, seed=1)
    view = logits_TV[::2, 3:36], target_T.clamp(max=32)[::2]
    with running(path, 64):
        pair = [run(with_entropy, *x, 1.0, torch.float32) for x in (view, tuple(x.contiguous() for x in view))]
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    logits_TV, target_T = inputs(3, 20, torch.float32, seed=0)
    with running(path, 64):
        torch.library.opcheck(_op, (logits_TV.requires_grad_(), target_T, 1.0, True))


def test_wrong_shapes_say_how_to_fix_them():
    with pytest.raises(ValueError, match="Flatten batch and time first"):
        token_logprob(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\.contiguous\(\)"):
        token_logprob(torch.zeros(5, 2).t(), torch.zeros(2, dtype=torch.long))
