"""token_logprob on both paths: float64 parity, typical accuracy, bans, candidates, slices."""

from functools import partial

import pytest
import torch
from close import DEVICE, PATHS, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels import _triton
from reflux.kernels._parallel import VocabShard
from reflux.kernels.token_logprob import _op, _op_backward, token_logprob, token_logprob_ref

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
with_entropy = partial(token_logprob, entropy=True)


def inputs(T, V, K, dtype, seed, size=4.0):
    g = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(T, V, generator=g).mul(size).to(DEVICE, dtype)
    # -1 and V are padding
    return logits_TV, torch.randint(-1, V + 1, (T, K) if K > 1 else (T,), generator=g).to(DEVICE)


def run(fn, logits_TV, target, dtype, **options):
    """logp, lse, entropy and the gradient under upstream gradients of mixed signs."""
    x_TV = logits_TV.detach().to(dtype).requires_grad_()
    out = fn(x_TV, target, **options)
    up = [torch.linspace(-1, 2, o.numel(), device=DEVICE).to(o.dtype).view_as(o) for o in out]
    (dx_TV,) = torch.autograd.grad(sum((o * u).sum() for o, u in zip(out, up)), x_TV)
    return *(o.detach() for o in out), dx_TV


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 4),
    V=st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129])),
    K=st.sampled_from([1, 1, 3, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    size=st.sampled_from([0.0, 1.0, 30.0]),
    block_v=st.sampled_from([64, 256, 2048]),
    seed=SEEDS,
)
def test_values_and_gradient_match_the_definition(
    path, T, V, K, dtype, temperature, size, block_v, seed
):
    logits_TV, target = inputs(T, V, K, dtype, seed, size)
    with running(path, block_v):
        got = run(with_entropy, logits_TV, target, dtype, temperature=temperature)
    same_dtype = run(token_logprob_ref, logits_TV, target, dtype, temperature=temperature)
    truth = run(token_logprob_ref, logits_TV, target, torch.float64, temperature=temperature)
    for what, a, b, c in zip(
        ("logp", "lse", "entropy", "dlogits"), got, same_dtype, truth, strict=True
    ):
        assert_no_worse(a, b, c, what)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("K", [1, 2])  # no lane of padding beside the candidates
def test_every_id_may_be_the_target(path, K):
    """No id means anything by itself: not 0, not 1, not the last."""
    logits_TV = inputs(5, 5, 1, torch.float32, 7)[0]
    target = (
        torch.arange(5, device=DEVICE)
        if K == 1
        else torch.arange(5, device=DEVICE)[:, None].expand(5, 2).contiguous()
    )
    truth = run(token_logprob_ref, logits_TV, target, torch.float64)
    with running(path, 64):
        got = run(with_entropy, logits_TV, target, torch.float32)
    for what, a, b in zip(("logp", "lse", "entropy", "dlogits"), got, truth, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}"
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_typical_gradient_error_is_torchs(path):
    """A bound on single examples must forgive the worst case; a median over seeds need not."""
    ours, torchs = [], []
    for seed in range(12):
        logits_TV, target_T = inputs(4, 136, 1, torch.float32, seed)
        truth_TV = run(token_logprob_ref, logits_TV, target_T, torch.float64, temperature=0.5)[-1]
        with running(path, 256):
            ours.append(
                (
                    run(with_entropy, logits_TV, target_T, torch.float32, temperature=0.5)[-1]
                    - truth_TV
                )
                .abs()
                .max()
            )
        torchs.append(
            (
                run(token_logprob_ref, logits_TV, target_T, torch.float32, temperature=0.5)[-1]
                - truth_TV
            )
            .abs()
            .max()
        )
    ours, torchs = torch.stack(ours).median(), torch.stack(torchs).median()
    assert ours <= 4 * torchs, f"median error over 12 seeds {ours:.1e}, torch {torchs:.1e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("K", [1, 70])  # 70: two blocks of candidates
def test_gradients_in_float64(path, K):
    logits_TV, target = inputs(3, 37, K, torch.float64, 3)
    with running(path, 64):
        assert torch.autograd.gradcheck(
            lambda x: with_entropy(x, target, temperature=0.5),
            logits_TV.requires_grad_(),
            fast_mode=True,
        )


@pytest.mark.parametrize("path", PATHS)
def test_logits_near_1e4_lose_nothing(path):
    """All is relative to the row's maximum: a shift that rounds no logit changes lse only."""
    logits_TV, target = (x.clamp(max=69) for x in inputs(3, 70, 3, torch.float32, 1))
    logits_TV = logits_TV.mul(64).round() / 64  # exact in fp32 at 1e4, too
    with running(path, 64):
        a, b = (run(with_entropy, logits_TV + c, target, torch.float32) for c in (0.0, 1e4))
    truth = token_logprob_ref(logits_TV.double(), target)
    assert all(torch.equal(a[i], b[i]) for i in (0, 2, 3))
    torch.testing.assert_close(b[0].double(), truth.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b[2].double(), truth.entropy, rtol=1e-6, atol=1e-6)
    # softmax is blind to a shift, lse follows it
    assert (a[3].sum(1) - torch.linspace(-1, 2, 3, device=DEVICE)).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_banned_tokens_change_nothing(path):
    logits_TV, target_T = inputs(3, 60, 1, torch.float32, 2)
    target_T = target_T.clamp(max=59)
    # whole blocks of -inf
    wider_TV = torch.cat([logits_TV.new_full((3, 70), -float("inf")), logits_TV], 1)
    with running(path, 64):
        got = run(
            with_entropy, wider_TV, torch.where(target_T < 0, -1, target_T + 70), torch.float32
        )
        want = run(with_entropy, logits_TV, target_T, torch.float32)
    assert (got[-1][:, :70] == 0).all()
    for x, y in zip((*got[:-1], got[-1][:, 70:]), want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_impossible_targets_and_rows_without_a_distribution_get_no_gradient(path):
    """T16: no 0 * inf. Other rows and other candidates of the row are not affected."""
    logits_TV, _ = inputs(5, 40, 1, torch.float32, 4)
    logits_TV[0, 7] = -torch.inf
    logits_TV[2], logits_TV[3, 5], logits_TV[4] = -torch.inf, torch.inf, torch.nan
    target_TK = torch.tensor([[7, 3], [7, 3], [1, 2], [1, 5], [-1, -100]], device=DEVICE)
    with running(path, 16):
        (logp_TK, lse_T, dx_TV), (*_, alone_TV) = (
            run(lambda *a: token_logprob(*a)[:2], logits_TV, y_TK, torch.float32)
            for y_TK in (target_TK, torch.where(target_TK == 7, -1, target_TK))
        )
    assert logp_TK[0, 0] == -torch.inf and (logp_TK[4] == 0).all() and lse_T[4] == 0
    assert dx_TV.isfinite().all() and (dx_TV[2:] == 0).all() and (dx_TV[:2] != 0).any(1).all()
    assert torch.equal(dx_TV[0, :7], alone_TV[0, :7])


@pytest.mark.parametrize("path", PATHS)
def test_candidates_named_twice_count_twice_however_far_apart(path):
    logits_TV, target_T = inputs(3, 40, 1, torch.float64, seed=2)
    target_T = target_T.clamp(0, 39)
    # 100 candidates between the two namings
    others_TK = torch.arange(40, device=DEVICE).repeat(3, 3)[:, :100]
    twice_TK = torch.cat([target_T[:, None], others_TK, target_T[:, None]], 1)
    weight_K = torch.cat([torch.tensor([2.0]), torch.zeros(100), torch.tensor([-0.5])]).to(
        DEVICE, torch.float64
    )
    with running(path, 16):
        (once,) = run(
            lambda *a: [1.5 * token_logprob(*a).logp.sum()], logits_TV, target_T, torch.float64
        )[1:]
        (twice,) = run(
            lambda *a: [(token_logprob(*a).logp * weight_K).sum()],
            logits_TV,
            twice_TK,
            torch.float64,
        )[1:]
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("T", [0, 1, 5])  # 0: a rank may hold no tokens
def test_a_view_gives_what_its_copy_gives(path, T):
    logits_TV, target_T = inputs(2 * T, 40, 1, torch.float32, seed=1)
    view = logits_TV[::2, 3:36], target_T.clamp(max=32)[::2]
    with running(path, 64):
        pair = [
            run(with_entropy, *x, torch.float32)
            for x in (view, tuple(x.contiguous() for x in view))
        ]
        again = run(with_entropy, *view, torch.float32)
    for a, b, c in zip(*pair, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("path", PATHS)
def test_rows_and_padded_columns(path):
    logits_TV, target_T = inputs(5, 30, 1, torch.float32, seed=5)
    rows_M = torch.tensor([3, 0], device=DEVICE)
    # junk columns (T15)
    wider_TV = torch.cat([logits_TV, torch.full((5, 3), 99.0, device=DEVICE)], 1)
    wider_TV[1] = torch.nan  # a row nobody chose is not read
    with running(path, 16):
        got = run(with_entropy, wider_TV, target_T, torch.float32, rows=rows_M, vocab_size=30)
        want = run(
            with_entropy,
            logits_TV,
            torch.where(torch.tensor([0, 1, 1, 0, 1], device=DEVICE) == 1, -1, target_T),
            torch.float32,
        )
    assert (got[-1][:, 30:] == 0).all()
    for a, b in zip((*got[:-1], got[-1][:, :30]), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not _triton.HAS_TRITON, reason="offsets are the kernels'")
def test_rows_further_apart_than_an_int32_reaches():
    # 4 GiB, untouched
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (2, 40), (2**31, 1)
    )
    logits_TV, target_T = inputs(2, 40, 1, torch.bfloat16, seed=6)
    far.copy_(logits_TV)
    with running("kernel", 16):
        for a, b in zip(
            run(with_entropy, far, target_T, torch.bfloat16),
            run(with_entropy, logits_TV, target_T, torch.bfloat16),
            strict=True,
        ):
            assert torch.equal(a, b)


def on_a_slice(path, logits_TV, target_TK, edges):
    from torch import distributed as dist

    start, end = edges[dist.get_rank()], edges[dist.get_rank() + 1]
    shard = VocabShard(dist.group.WORLD.group_name, start)
    with running(path, 16):
        return run(
            with_entropy,
            logits_TV[:, start:end],
            target_TK,
            torch.float64,
            shard=shard,
            vocab_size=logits_TV.shape[1],
        )


def on_slices(logits_TV, target_TK):
    return [
        on_a_slice(path, logits_TV, target_TK, edges)
        for path in PATHS
        for edges in ((0, 20, 33), (0, 33, 40))
    ]


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks, in the interpreter")
def test_slices_of_a_vocabulary_are_the_whole_one():
    """Uneven slices, and one (33 to 40) of padding only."""
    logits_TV, target_TK = inputs(4, 33, 3, torch.float64, seed=7)
    target_TK[1] = -1
    want = run(token_logprob_ref, logits_TV, target_TK, torch.float64)
    for left, right in zip(*run_on_ranks(on_slices, logits_TV, target_TK), strict=True):
        for a, b, c in zip(left[:-1], right[:-1], want[:-1], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.cat([left[-1], right[-1]], 1)[:, :33], want[-1], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    logits_TV, target_T = inputs(3, 20, 1, torch.float32, seed=0)
    target_TK = target_T.clamp(max=19)[:, None]
    with running(path, 64):
        torch.library.opcheck(_op, (logits_TV.requires_grad_(), target_TK, 1.0, True, 20, ""))
        out = _op(logits_TV.detach(), target_TK, 1.0, True, 20, "")
        torch.library.opcheck(
            _op_backward,
            (out[0], out[1], out[2], logits_TV.detach(), target_TK, out[3], out[4], out[2], 1.0),
        )


def test_compiles_into_one_graph():
    logits_TV, target_T = inputs(3, 20, 1, torch.float32, seed=0)
    want = run(with_entropy, logits_TV, target_T, torch.float32)
    compiled = torch.compile(with_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, logits_TV, target_T, torch.float32), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "logits, target, options, match",
    [
        (
            torch.zeros(2, 3, 5, device=DEVICE),
            torch.zeros(2, 3, dtype=torch.long, device=DEVICE),
            {},
            "Flatten batch and time first",
        ),
        (
            torch.zeros(5, 2, device=DEVICE).t(),
            torch.zeros(2, dtype=torch.long, device=DEVICE),
            {},
            r"\.contiguous\(\)",
        ),
        (torch.zeros(2, 5, device=DEVICE), torch.zeros(2, device=DEVICE), {}, "want integers"),
        (
            torch.zeros(2, 5, device=DEVICE),
            torch.zeros(2, 0, dtype=torch.long, device=DEVICE),
            {},
            "K >= 1",
        ),
        (
            torch.zeros(2, 5, device=DEVICE),
            torch.zeros(2, dtype=torch.long, device=DEVICE),
            {"temperature": 0.0},
            "take the argmax",
        ),
        (
            torch.zeros(2, 5, device=DEVICE),
            torch.zeros(2, dtype=torch.long, device=DEVICE),
            {"vocab_size": 6},
            "1 <= vocab_size <= columns",
        ),
        (
            torch.zeros(2, 5, device=DEVICE),
            torch.zeros(2, dtype=torch.long, device=DEVICE),
            {"rows": torch.zeros(1, device=DEVICE)},
            "distinct row numbers",
        ),
        (
            torch.zeros(2, 5, device=DEVICE),
            torch.zeros(2, dtype=torch.long, device=DEVICE),
            {"shard": VocabShard("", 0)},
            "size of the whole vocabulary",
        ),
    ],
)
def test_mistakes_say_how_to_fix_them(logits, target, options, match):
    with pytest.raises(ValueError, match=match):
        token_logprob(logits, target, **options)


def test_ids_of_another_vocabulary_raise_in_debug_mode(monkeypatch):
    monkeypatch.setattr(_triton, "DEBUG", True)
    with pytest.raises(ValueError, match="id 9 of 5 classes"):
        token_logprob(torch.zeros(2, 5, device=DEVICE), torch.tensor([1, 9], device=DEVICE))
