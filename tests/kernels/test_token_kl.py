"""token_kl on both paths: float64 parity on logits, banned tokens, gradients in place, strides."""

import pytest
import torch
from close import DEVICE, PATHS, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reflux.kernels import _chunks
from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._parallel import VocabShard
from reflux.kernels.token_kl import _op, token_kl, token_kl_ref

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(T, V, dtype, seed, size=3.0):
    """Normal logits times size on both sides; in the last row each side is sure of one token."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(T, V, generator=g).mul(size) for _ in range(2)]
    for x in logits if T else []:
        x[-1, torch.randint(V, (1,), generator=g)] += 40
    return [x.to(DEVICE, dtype) for x in logits], torch.randn(T, generator=g).to(DEVICE)


def run(fn, logits, dtype, **options):
    z_TV, u_TV = (x.detach().to(dtype) for x in logits)
    out = fn(z_TV.requires_grad_(), u_TV, **options)
    return out.kl, torch.autograd.grad(out.total * -0.7, z_TV)[0]


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 3),
    V=st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129]) | st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    scale_t2=st.booleans(),
    chosen=st.sampled_from([None, [], [2, 0]]),
    padded=st.sampled_from([(0, 0), (3, 5)]),
    size=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    block_v=st.sampled_from([64, 256, 2048]),
    seed=st.integers(0, 2**31 - 1),
)
def test_values_and_gradient_match_the_definition(
    path, T, V, dtype, divergence, temperature, scale_t2, chosen, padded, size, block_v, seed
):
    logits, weight_T = inputs(T, V, dtype, seed, size)
    # junk behind the vocabulary (T15)
    logits = [torch.cat([x, x.new_full((T, n), 77.0)], 1) for x, n in zip(logits, padded)]
    rows_M = (
        None
        if chosen is None
        else torch.tensor([t for t in chosen if t < T], dtype=torch.long, device=DEVICE)
    )
    options = dict(
        divergence=divergence,
        temperature=temperature,
        weight=weight_T,
        scale_t2=scale_t2,
        rows=rows_M,
        vocab_size=V,
    )
    with running(path, block_v):
        got = run(token_kl, logits, dtype, **options)
    same_dtype = run(token_kl_ref, logits, dtype, **options)
    truth = run(token_kl_ref, logits, torch.float64, **options)
    for what, a, b, c in zip(("kl", "dlogits"), got, same_dtype, truth, strict=True):
        assert_no_worse(a, b, c, what)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_no_loss_and_no_gradient(path, divergence):  # T1
    logits, _ = inputs(3, 90, torch.float32, 5)
    logits[1] = logits[0] + 7  # equal up to a constant, which changes nothing
    with running(path, 64):
        kl_T, dz_TV = run(token_kl, logits, torch.float32, divergence=divergence)
    assert kl_T.abs().max() < 2e-5 and dz_TV.abs().max() < 2e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_is_the_slope(path, divergence):
    (z_TV, u_TV), weight_T = inputs(2, 9, torch.float64, 6, size=1.0)
    with running(path, 64):
        assert torch.autograd.gradcheck(
            lambda z: (
                token_kl(
                    z,
                    u_TV,
                    divergence=divergence,
                    beta=0.25,
                    temperature=0.5,
                    scale_t2=True,
                    weight=weight_T,
                ).total
            ),
            z_TV.requires_grad_(),
            fast_mode=True,
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_banned_on_both_sides_change_nothing(path, divergence):  # T16
    logits, weight_T = inputs(3, 60, torch.float32, 1)
    wider = [torch.cat([x.new_full((3, 70), -torch.inf), x], 1) for x in logits]
    with running(path, 64):
        kl_T, dz_TV = run(token_kl, logits, torch.float32, divergence=divergence, weight=weight_T)
        same_T, dwider_TV = run(
            token_kl, wider, torch.float32, divergence=divergence, weight=weight_T
        )
    torch.testing.assert_close(same_T, kl_T)
    torch.testing.assert_close(dwider_TV[:, 70:], dz_TV, atol=1e-6, rtol=1e-5)
    assert (dwider_TV[:, :70] == 0).all() and dz_TV.sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_banned_on_one_side(path, divergence):
    """forward is inf where the student bans, reverse where the teacher does; mixtures never."""
    for side, infinite in ((0, "forward"), (1, "reverse")):
        logits, _ = inputs(2, 40, torch.float32, 2)
        logits[side][0, 7] = -torch.inf
        with running(path, 64):
            kl_T, dz_TV = run(token_kl, logits, torch.float32, divergence=divergence)
        assert kl_T[0].isinf() == (divergence == infinite) and kl_T[1].isfinite()
        assert dz_TV.isfinite().all() and (dz_TV[0] == 0).all() == (divergence == infinite)


@pytest.mark.parametrize("path", PATHS)
def test_close_distributions_keep_their_gradient(path):
    """Max and log-sum apart: near p = q subtracting two logsumexps would lose most digits."""
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
        torch.library.opcheck(
            _op,
            (
                logits[0].requires_grad_(),
                logits[1],
                weight_T,
                None,
                "jsd",
                0.5,
                1.0,
                False,
                20,
                "",
                0,
                True,
            ),
        )


class OnlyIn(TorchDispatchMode):
    """Fails on results of `limit` elements or more that do not lie in the given tensors."""

    def __init__(self, limit, *tensors):
        super().__init__()
        self.limit, self.known = limit, {x.untyped_storage().data_ptr() for x in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            large = isinstance(x, torch.Tensor) and x.numel() >= self.limit
            assert not large or x.untyped_storage().data_ptr() in self.known, (
                f"{func} made {list(x.shape)}"
            )
        return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options", [{}, {"rows": [3, 1], "vocab_size": 290, "divergence": "jsd"}], ids=["all", "rows"]
)
def test_inplace_is_the_same_in_the_memory_of_the_logits(path, options, monkeypatch):
    monkeypatch.setattr(_chunks, "CPU_CHUNK_BYTES", 0)  # chunks of 128 rows at most
    T = 4 if path == "kernel" else 200
    (x_TV, u_TV), weight_T = inputs(T, 300, torch.float32, 7)
    options = options | (
        {"rows": torch.tensor(options["rows"], device=DEVICE)} if "rows" in options else {}
    )
    want = run(token_kl, (x_TV, u_TV), torch.float32, weight=weight_T, **options)
    z_TV = x_TV.requires_grad_() * 1.0
    grads = []
    z_TV.register_hook(grads.append)
    with running(path, 64), OnlyIn(T * 300, z_TV, u_TV):
        out = token_kl(z_TV, u_TV, weight=weight_T, inplace=True, **options)
        loss = out.total * -0.7
    loss.backward(retain_graph=True)
    torch.testing.assert_close(out.kl, want[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x_TV.grad, want[1], atol=1e-6, rtol=1e-5)
    assert grads[0].data_ptr() == z_TV.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # it would scale the gradient twice


@pytest.mark.parametrize("path", PATHS)
def test_inplace_is_loud_where_the_logits_are_still_needed(path):
    (x_TV, u_TV), _ = inputs(2, 30, torch.float32, 8)
    x_TV.requires_grad_()
    with running(path, 64):
        capped_TV = torch.tanh(x_TV)  # saves its result for the backward
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            token_kl(capped_TV, u_TV, inplace=True).total.backward()
        with pytest.raises(ValueError, match="overwrite a leaf"):
            token_kl(x_TV, u_TV, inplace=True)
        with pytest.raises(ValueError, match="overlap in memory"):
            token_kl((x_TV[:1] * 1).expand(2, 30), u_TV, inplace=True)
        with torch.no_grad():
            before_TV = x_TV.clone()
            token_kl(x_TV, u_TV, inplace=True)  # nobody wants a gradient, so nothing is overwritten
            assert x_TV.equal(before_TV)


@pytest.mark.parametrize("path", PATHS)
def test_rows_may_lie_anywhere(path):
    """Views with gaps, rows in reverse order of memory's, one teacher row for all."""
    (z_TV, u_TV), _ = inputs(3, 130, torch.float32, 9)
    wide_TV, one_TV = torch.full((6, 200), torch.nan, device=DEVICE), u_TV[:1].expand(3, 130)
    wide_TV[::2, 5:135] = z_TV
    with running(path, 64):
        kl_T, dz_TV = run(
            token_kl, (z_TV, u_TV[:1].repeat(3, 1)), torch.float32, divergence="reverse"
        )
        view_TV = wide_TV[::2, 5:135].requires_grad_()
        out = token_kl(view_TV, one_TV, divergence="reverse")
        torch.testing.assert_close(out.kl, kl_T, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(out.total * -0.7, view_TV)[0], dz_TV, rtol=0, atol=0
        )


def test_it_compiles_into_a_full_graph():
    (x_TV, u_TV), weight_T = inputs(3, 20, torch.float32, 10)

    def loss(x_TV):
        return token_kl(x_TV * 2, u_TV, divergence="skew_reverse", weight=weight_T).total * 3

    x_TV.requires_grad_()
    with running("torch"):
        got = torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(x_TV), x_TV
        )
        torch.testing.assert_close(got, torch.autograd.grad(loss(x_TV), x_TV))
        out = token_kl(x_TV, u_TV)
        out.total.backward(retain_graph=True)
        once_TV = x_TV.grad.clone()
        out.total.backward()
        torch.testing.assert_close(x_TV.grad, 2 * once_TV)


@pytest.mark.parametrize(
    "args, options, match",
    [
        (
            (torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 4, device=DEVICE)),
            {},
            "pass vocab_size",
        ),
        (
            (torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(2, 3, 4, device=DEVICE)),
            {},
            "Flatten first",
        ),
        (
            (torch.zeros(4, 2, device=DEVICE).t(), torch.zeros(2, 4, device=DEVICE)),
            {},
            "contiguous",
        ),
        (
            (torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)),
            {"vocab_size": 5},
            "1 <= vocab_size <= columns",
        ),
        (
            (torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)),
            {"shard": VocabShard("0", 0)},
            "size of the whole vocabulary",
        ),
        (
            (torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)),
            {"temperature": 0.0},
            "take the argmax",
        ),
    ],
)
def test_mistakes_say_how_to_fix_them(args, options, match):
    with pytest.raises(ValueError, match=match):
        token_kl(*args, **options)
