"""linear_logprob on both paths: value and gradients against float64, ignored rows, padded heads, chunks."""
import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, assert_gradient_close, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels.linear_logprob import _op, linear_logprob, linear_logprob_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about -inf - -inf in masked lanes
SEEDS = st.integers(0, 2**31 - 1)
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}  # absolute, of values of order 1 to 30
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3}  # relative; the interpreter truncates bf16


def inputs(T, V, D, K, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=g).to(DEVICE, dtype)
    head_VD = torch.randn(V, D, generator=g).to(DEVICE, dtype)
    target = torch.randint(-1, V, (T, K) if K > 1 else (T,), generator=g).to(DEVICE)  # -1 = ignored
    return hidden_TD, head_VD, target


def run(fn, hidden_TD, head_VD, target, dtype, **options):
    """Outputs and gradients under an upstream gradient of mixed signs."""
    x_TD, w_VD = (t.detach().to(dtype).requires_grad_() for t in (hidden_TD, head_VD))
    out = fn(x_TD, w_VD, target, **options)
    parts = [o for o in out if o is not None]
    total = sum((o * torch.linspace(-1, 2, o.numel(), device=DEVICE, dtype=o.dtype).view_as(o)).sum() for o in parts)
    return [o.detach() for o in out], torch.autograd.grad(total, (x_TD, w_VD))


@pytest.mark.parametrize("path", PATHS)
@given(T=st.integers(0, 3), V=st.integers(1, 300), D=st.integers(1, 9), K=st.sampled_from([1, 3]),
       dtype=st.sampled_from(list(LOSS)), temperature=st.sampled_from([0.5, 1.0, 2.0]),
       softcap=st.sampled_from([None, 4.0]), padded=st.integers(0, 3), block_v=st.sampled_from([64, 256, 2048]),
       workspace_mb=st.sampled_from([0.001, 1200]), seed=SEEDS)
def test_values_and_gradients_match_float64(path, T, V, D, K, dtype, temperature, softcap, padded, block_v,
                                            workspace_mb, seed):
    hidden_TD, head_VD, target = inputs(T, V, D, K, dtype, seed)
    head_VD = torch.cat([head_VD, torch.full((padded, D), 99.0, device=DEVICE, dtype=dtype)])  # junk columns (T15)
    options = dict(temperature=temperature, softcap=softcap, vocab_size=V)
    with running(path, block_v):
        got, grads = run(linear_logprob, hidden_TD, head_VD, target, dtype, entropy=True, workspace_mb=workspace_mb,
                         **options)
    truth, true_grads = run(linear_logprob_ref, hidden_TD, head_VD, target, torch.float64, **options)
    for what, a, b in zip(("logp", "lse", "entropy"), got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=LOSS[dtype], atol=LOSS[dtype], msg=lambda m, w=what: f"{w}: {m}")
    for what, a, b in zip(("dhidden", "dhead"), grads, true_grads, strict=True):
        assert_gradient_close(a, b, what, GRAD[dtype])
    assert (grads[1][V:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_are_exactly_zero(path):
    hidden_TD, head_VD, _ = inputs(4, 33, 6, 1, torch.float32, seed=0)
    target_TK = torch.tensor([[5, -1], [-1, -1], [7, 7], [-1, -1]], device=DEVICE)
    with running(path, 16):
        out, (dx_TD, _) = run(linear_logprob, hidden_TD, head_VD, target_TK, torch.float32, entropy=True)
    for part in (*out, dx_TD):
        assert (part[1::2] == 0).all()
    assert out[0][0, 1] == 0 and out[0][0, 0] < 0 and (dx_TD[0] != 0).any()


@pytest.mark.parametrize("path", PATHS)
def test_a_candidate_named_twice_counts_twice(path):
    hidden_TD, head_VD, target_T = inputs(3, 40, 5, 1, torch.float64, seed=2)
    target_T = target_T.clamp(min=0)
    with running(path, 16):
        _, once = run(lambda *a: [2 * linear_logprob(*a).logp.sum()], hidden_TD, head_VD, target_T, torch.float64)
        _, twice = run(lambda *a: [linear_logprob(*a).logp.sum()], hidden_TD, head_VD,
                       target_T[:, None].expand(-1, 2), torch.float64)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_entropy_does_not_cancel_at_large_logits(path):
    hidden_TD = torch.cat([torch.randn(3, 4), torch.full((3, 1), 100.0)], 1).to(DEVICE)
    head_VD = torch.cat([torch.randn(70, 4), torch.full((70, 1), 100.0)], 1).to(DEVICE)  # every logit near 1e4
    head_VD[:, :4] = head_VD[:, :4].round()  # exact in fp32, so only the op's own arithmetic is measured
    hidden_TD[:, :4] = hidden_TD[:, :4].round()
    target_T = torch.zeros(3, dtype=torch.long, device=DEVICE)
    with running(path, 16):
        got = linear_logprob(hidden_TD, head_VD, target_T, entropy=True)
    truth = linear_logprob_ref(hidden_TD.double(), head_VD.double(), target_T)
    torch.testing.assert_close(got.entropy.double(), truth.entropy, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.logp.double(), truth.logp, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_chunks_change_nothing_in_a_row(path):
    """Rows are independent, so a chunk boundary may not show: bitwise for fixed GEMM shapes is a GPU matter."""
    hidden_TD, head_VD, target_T = inputs(9, 65, 4, 1, torch.float64, seed=3)
    with running(path, 64):
        whole, _ = run(linear_logprob, hidden_TD, head_VD, target_T, torch.float64, entropy=True)
        parts, _ = run(linear_logprob, hidden_TD, head_VD, target_T, torch.float64, entropy=True, workspace_mb=1e-3)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_the_full_logits_never_exist():
    hidden_TD, head_VD, target_T = inputs(300, 400, 8, 1, torch.float32, seed=4)
    hidden_TD.requires_grad_(), head_VD.requires_grad_()
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        out = linear_logprob(hidden_TD, head_VD, target_T, entropy=True, workspace_mb=0.5)
        (out.logp.sum() + out.entropy.sum()).backward()
    with pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 400 // 2):
        linear_logprob_ref(hidden_TD, head_VD, target_T)


@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_head_gets_no_gradient(path):
    hidden_TD, head_VD, target_T = inputs(3, 20, 4, 1, torch.float32, seed=5)
    hidden_TD.requires_grad_(), head_VD.requires_grad_()
    with running(path, 16):
        linear_logprob(hidden_TD, head_VD, target_T, frozen_head=True).logp.sum().backward()
    assert head_VD.grad is None and (hidden_TD.grad != 0).any()


def test_views_give_what_their_copies_give():
    hidden_TD, head_VD, target_T = inputs(8, 40, 12, 1, torch.float32, seed=6)
    view = hidden_TD[::2, ::2], head_VD.t().contiguous().t()[:, ::2], target_T[::2]
    copy = tuple(x.contiguous() for x in view)
    for path in PATHS:
        with running(path, 16):
            a, b = (linear_logprob(*x, entropy=True) for x in (view, copy))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    hidden_TD, head_VD, target_T = inputs(3, 20, 4, 1, torch.float32, seed=7)
    args = hidden_TD.requires_grad_(), head_VD.requires_grad_(), target_T[:, None], 1.0, True, 20, 0.0, 1200.0
    with running(path, 16):
        torch.library.opcheck(_op, args)


@pytest.mark.parametrize("change, match", [
    (dict(hidden_TD=torch.zeros(2, 3, 4)), "Flatten batch and time"),
    (dict(head_VD=torch.zeros(5, 3)), r"want \[T, D\] and \[V, D\]"),
    (dict(head_VD=torch.zeros(5, 4, dtype=torch.bfloat16)), "want one floating dtype"),
    (dict(target=torch.zeros(3, dtype=torch.long)), "for 2 rows"),
    (dict(target=torch.zeros(2)), "want integers"),
    (dict(target=torch.zeros(2, 65, dtype=torch.long)), "Split them"),
    (dict(temperature=0.0), "take the argmax"),
    (dict(vocab_size=6), "1 <= vocab_size <= rows"),
    (dict(softcap=-1.0), "None for no cap"),
])
def test_mistakes_say_how_to_fix_them(change, match):
    args = dict(hidden_TD=torch.zeros(2, 4), head_VD=torch.zeros(5, 4), target=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=match):
        linear_logprob(**(args | change))
