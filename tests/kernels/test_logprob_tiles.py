"""Log-probability without logits in memory: float64 parity, the same bits, what it is used for."""

import runpy
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from close import DEVICE, NoLargeTensor, assert_gradient_close, assert_no_worse, running
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels import _logprob_tiles, _triton
from reflux.kernels._logprob_tiles import Tiles, tile_plan, tiles_for
from reflux.kernels._parallel import VocabShard
from reflux.kernels._plan import MIB
from reflux.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from reflux.kernels.linear_nll import linear_nll, linear_nll_ref

pytest.importorskip("triton")
# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SMALL = Tiles(16, 64, 16, 2, 4, 2)
HALF = [torch.bfloat16, torch.float16]
OPTIONS = dict(logit_scale=0.25, softcap=4.0, temperature=2.0)


@contextmanager
def fused(tiles: Tiles | None = SMALL, on: bool = True, **settings):
    """linear_logprob through head_tiles, launched like this; `on=False`: through logits."""
    changes = dict(TILES=tiles) | settings
    with running("kernel"), patch.object(_triton, "FUSED", on):
        with patch.multiple(_logprob_tiles, **changes):
            yield


def inputs(T, V, D, K, dtype, seed, padded=0):
    """hidden [T, D], head [V + padded, D], bias, target; junk in the head's padded rows."""
    g = torch.Generator().manual_seed(seed)
    x_TD, w_VD, b_V = (torch.randn(s, generator=g) for s in ((T, D), (V, D), (V,)))
    w_VD = torch.cat([w_VD, torch.full((padded, D), 99.0)])
    b_V = torch.cat([b_V, torch.full((padded,), 77.0)])
    target = torch.randint(-1, V + 1, (T, K) if K > 1 else (T,), generator=g)
    return [t.to(DEVICE, dtype) for t in (x_TD, w_VD, b_V)], target.to(DEVICE)


def reference(tensors, target, **options):
    x_TD, w_VD, b_V = (t.double() for t in tensors)
    return linear_logprob_ref(x_TD, w_VD, target, bias=b_V, **options)


@settings(max_examples=16)
@given(
    T=st.integers(0, 20),
    V=st.sampled_from([1, 15, 16, 63, 64, 65, 129, 150]),
    D=st.sampled_from([1, 8, 16, 24, 40]),
    K=st.sampled_from([1, 1, 3]),
    dtype=st.sampled_from(HALF),
    softcap=st.sampled_from([None, 4.0]),
    temperature=st.sampled_from([0.5, 2.0]),
    entropy=st.booleans(),
    padded=st.integers(0, 3),
    rows=st.sampled_from([16, 32]),
    columns=st.sampled_from([64, 128]),
    group=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_kernels_statistics_match_float64(
    T, V, D, K, dtype, softcap, temperature, entropy, padded, rows, columns, group, seed
):
    tensors, target = inputs(T, V, D, K, dtype, seed, padded)
    options = dict(temperature=temperature, softcap=softcap, logit_scale=0.25, vocab_size=V)
    x_TD, w_VD, b_V = tensors
    with fused(Tiles(rows, columns, 16, group, 4, 2)):
        got = linear_logprob(x_TD, w_VD, target, bias=b_V, entropy=entropy, **options)
    with running("torch"):
        logits = linear_logprob(x_TD, w_VD, target, bias=b_V, entropy=entropy, **options)
    truth = reference(tensors, target, **options)
    live_T = ((target >= 0) & (target < V)).view(T, K).any(1)
    for what, a, b, c in zip(("logp", "lse", "entropy"), got, logits, truth, strict=True):
        if a is None:
            assert not entropy and what == "entropy"
            continue
        assert_no_worse(a[live_T], b[live_T], c[live_T], what)
        assert a.dtype == torch.float32 and (a[~live_T] == 0).all()


def test_the_kernels_launch_changes_no_bit_of_a_row():
    """Two runs, pointers for descriptors, groups, programs, chunks of rows, rows by number."""
    tensors, target = inputs(20, 130, 16, 2, torch.float16, seed=1)
    x_TD, w_VD, b_V = tensors

    def call(**options):
        return linear_logprob(x_TD, w_VD, target, bias=b_V, entropy=True, **options)

    with fused():
        want = call()
        others = [call(), call(workspace_mb=0.001), call(rows=torch.arange(20, device=DEVICE))]
    for changes in (
        dict(DESCRIPTORS=False),
        dict(tiles=SMALL._replace(group=1)),
        dict(tiles=SMALL._replace(programs=2)),
        dict(MERGE_ROWS=8),
    ):
        with fused(**changes):
            others.append(call())
    for other in others:
        for a, b in zip(want, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "capability, name", [(8, "AMPERE"), (9, "HOPPER"), (10, "HOPPER"), (12, "AMPERE")]
)
def test_tiles_fit_the_shared_memory_of_the_gpu(capability, name, monkeypatch):
    """Both operands of every stage, 16 bits: at most 99 KB where a GPU has no more."""
    monkeypatch.setattr(_logprob_tiles, "_capability", lambda x: capability)
    tiles = tiles_for(SimpleNamespace(is_cuda=True))
    assert tiles is getattr(_logprob_tiles, name)
    needed = tiles.stages * (tiles.rows + tiles.columns) * tiles.depth * 2
    assert needed <= (227 if name == "HOPPER" else 99) * 1024


def test_the_kernel_with_the_tiles_of_a_gpu_and_strided_operands():
    """HOPPER and AMPERE as they are; views whose rows a descriptor cannot read."""
    (x_TD, w_VD, b_V), target_T = inputs(8, 300, 20, 1, torch.float16, seed=2)
    view = x_TD[::2, ::2], w_VD.t().contiguous().t()[:, ::2], b_V.repeat_interleave(2)[::2]
    truth = reference(view, target_T[::2])
    live_T = (target_T[::2] >= 0) & (target_T[::2] < 300)
    assert live_T.any()
    for tiles in (_logprob_tiles.HOPPER, _logprob_tiles.AMPERE):
        with fused(tiles):
            assert tiles_for(x_TD) is tiles
            got = linear_logprob(view[0], view[1], target_T[::2], bias=view[2])
        torch.testing.assert_close(got.logp.double()[live_T], truth.logp[live_T], rtol=0, atol=5e-6)


def test_the_kernels_ignored_rows_are_exactly_zero_and_banned_tokens_minus_infinity():
    (x_TD, w_VD, b_V), _ = inputs(5, 150, 16, 1, torch.bfloat16, seed=3)
    x_TD[1] = torch.nan
    b_V[64:128] = -torch.inf  # a tile of nothing else
    target_TK = torch.tensor([[5, -1], [-1, 150], [70, 7], [140, 70], [99, 999]], device=DEVICE)
    with fused():
        out = linear_logprob(x_TD, w_VD, target_TK, bias=b_V, entropy=True)
    truth = reference((x_TD, w_VD, b_V), target_TK)
    for part in out:
        assert (part[1] == 0).all() and not part.isnan().any()
    live_T = torch.tensor([0, 2, 3, 4], device=DEVICE)
    for a, b in zip(out, truth, strict=True):
        torch.testing.assert_close(a[live_T].double(), b[live_T], rtol=0, atol=5e-6)
    assert (out.logp[2:, 0][[0, 2]] == -torch.inf).all() and out.logp[3, 1] == -torch.inf


def test_the_kernel_computes_only_chosen_rows_and_a_nan_stays_in_its_row():
    (x_TD, w_VD, _), target_T = inputs(40, 70, 16, 1, torch.float16, seed=4)
    target_T = target_T.clamp(0, 69)
    rows_M = torch.tensor([33, 1, 7, 20], device=DEVICE)
    broken = x_TD.clone()
    broken[[0, 7, 39]] = torch.nan
    with fused():
        want = linear_logprob(x_TD, w_VD, target_T)
        got = linear_logprob(broken, w_VD, target_T, rows=rows_M)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[[33, 1, 20]], b[[33, 1, 20]]) and a[7].isnan()
        left_out_T = torch.ones_like(a).index_fill_(0, rows_M, 0) == 1
        assert (a[left_out_T] == 0).all()


@pytest.mark.parametrize("descriptors", [True, False])
def test_the_kernel_uses_nothing_beyond_its_operands(descriptors):
    (x_TD, w_VD, _), target_T = inputs(5, 70, 9, 1, torch.float16, seed=11)

    def within_nan(x):
        pad = torch.nn.functional.pad(x, (0, 7, 0, 3), value=torch.nan)
        return pad[: len(x), : x.shape[1]]

    with fused(DESCRIPTORS=descriptors):
        want = linear_logprob(x_TD, w_VD, target_T)
        got = linear_logprob(within_nan(x_TD), within_nan(w_VD), target_T)
    assert torch.equal(got.lse, want.lse) and torch.equal(got.logp, want.logp)


@pytest.mark.parametrize("options", [dict(entropy=True), dict(OPTIONS)])
def test_gradients_are_those_of_float64(options):
    """The backward recomputes from the statistics that the tiles left."""
    tensors, target = inputs(9, 70, 8, 3, torch.bfloat16, seed=5)
    entropy = "entropy" in options

    def gradients(fn, dtype):
        x_TD, w_VD, b_V = (t.to(dtype).requires_grad_() for t in tensors)
        out = fn(x_TD, w_VD, target, bias=b_V, **options)
        total = (out.logp * torch.linspace(-1, 2, 27, device=DEVICE).view(9, 3)).sum()
        total = total + out.lse.sum() - (out.entropy.sum() if entropy else 0)
        return torch.autograd.grad(total, (x_TD, w_VD, b_V))

    with fused():
        got = gradients(linear_logprob, torch.bfloat16)
    options = {k: v for k, v in options.items() if k != "entropy"}
    truth = gradients(linear_logprob_ref, torch.float64)
    for what, a, b in zip(("dhidden", "dhead", "dbias"), got, truth, strict=True):
        assert_gradient_close(a, b, what, 8e-3)  # the interpreter truncates bf16


@pytest.mark.parametrize("options", [dict(z_loss=0.1, label_smoothing=0.2), dict(OPTIONS)])
def test_a_loss_that_nobody_differentiates(options):
    (x_TD, w_VD, b_V), target_T = inputs(9, 70, 8, 1, torch.bfloat16, seed=10)
    weight_T = torch.linspace(-1, 2, 9, device=DEVICE)
    with fused():
        got = linear_nll(x_TD, w_VD, target_T, bias=b_V, weight=weight_T, **options)
        assert calls_of_tiles(x_TD, w_VD, linear_nll) == 1
        assert calls_of_tiles(x_TD, w_VD.clone().requires_grad_(), linear_nll) == 0
    tensors = x_TD.double(), w_VD.double(), target_T
    truth = linear_nll_ref(*tensors, bias=b_V.double(), weight=weight_T.double(), **options)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def calls_of_tiles(hidden, head, op=linear_logprob, **options):
    """How often an op launches head_tiles."""
    target = torch.zeros(len(hidden), dtype=torch.long, device=DEVICE)
    launched = []

    def launch(kernel, *args, **constants):
        launched.append(kernel)
        return _triton.launch(kernel, *args, **constants)

    with patch.object(_logprob_tiles, "launch", launch):
        op(hidden, head, target, **options)
    return sum(kernel is _logprob_tiles.head_tiles for kernel in launched)


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch):
    (x_TD, w_VD, _), _ = inputs(3, 20, 8, 1, torch.bfloat16, seed=6)
    leaf_TD = x_TD.clone().requires_grad_()
    with fused():
        assert calls_of_tiles(x_TD, w_VD) == 1
        assert calls_of_tiles(leaf_TD, w_VD, entropy=True) == 1
        # makes dlogp/dhidden from logits
        assert calls_of_tiles(leaf_TD, w_VD, frozen_head=True) == 0
        assert calls_of_tiles(x_TD.float(), w_VD.float()) == 0
    with fused(on=False):
        assert calls_of_tiles(x_TD, w_VD) == 0
    with running("torch"), patch.object(_triton, "FUSED", True):
        assert calls_of_tiles(x_TD, w_VD) == _triton.runs_triton(x_TD)
    for value in ("1", "0", ""):
        monkeypatch.setenv("REFLUX_KERNELS_FUSED", value)
        assert runpy.run_path(_triton.__file__)["FUSED"] == (value == "1")


def test_compiles_into_one_graph():
    (x_TD, w_VD, b_V), target_T = inputs(5, 70, 8, 1, torch.float16, seed=7)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    with fused():
        want, got = (
            fn(x_TD, w_VD, target_T, bias=b_V, entropy=True, temperature=2.0)
            for fn in (linear_logprob, compiled)
        )
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_neither_the_logits_nor_a_chunk_of_them_exists():
    (x_TD, w_VD, _), target_T = inputs(300, 400, 8, 1, torch.float16, seed=8)
    with fused(None), NoLargeTensor(300 * 16):  # statistics: 2 tiles of columns, 3 numbers
        linear_logprob(x_TD, w_VD, target_T, entropy=True)


@given(
    T=st.integers(1, 10**6),
    V=st.sampled_from([1, 100, 151_936]),
    D=st.sampled_from([1, 4096]),
    mib=st.sampled_from([1e-6, 1.0, 1200.0]),
)
def test_a_chunk_fits_its_workspace(T, V, D, mib):
    x_TD = torch.empty(1, D, dtype=torch.bfloat16, device=DEVICE).expand(T, D)
    plan = tile_plan(x_TD, V, mib)
    bytes_of_row = 12 * -(-V // tiles_for(x_TD).columns) + 2 * D
    assert plan.chunk == plan.group >= 1
    assert plan.chunk == 1 or plan.chunk * bytes_of_row <= mib * MIB
    assert plan.chunk < 128 or plan.chunk % 128 == 0
    assert (plan.chunk + 128) * bytes_of_row > mib * MIB  # no smaller than it must be


def on_slices(tensors, target, cases):
    from torch import distributed as dist

    results = []
    for edges, options in cases:
        start, end = edges[dist.get_rank()], edges[dist.get_rank() + 1]
        head_VD, bias_V = (t[start:end] for t in tensors[1:])
        shard = VocabShard(dist.group.WORLD.group_name, start)
        with fused():
            out = linear_logprob(
                tensors[0], head_VD, target, bias=bias_V, shard=shard, vocab_size=33, **options
            )
        results.append([o for o in out if o is not None])
    return results


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks, in the interpreter")
def test_slices_of_a_vocabulary_are_the_whole_one():
    """Uneven slices, one of padding only (33 on), chunks of one row."""
    tensors, target_TK = inputs(4, 40, 8, 3, torch.float16, seed=9)
    target_TK = target_TK.clamp(max=33)
    target_TK[1] = -1
    cases = [
        ((0, 20, 40), dict(entropy=True, workspace_mb=1e-5, **OPTIONS)),
        ((0, 33, 40), dict(entropy=True)),
        ((0, 16, 33), {}),
    ]
    left, right = run_on_ranks(on_slices, tensors, target_TK, cases)
    for (_, options), out, out_2 in zip(cases, left, right, strict=True):
        same = {k: v for k, v in options.items() if k in OPTIONS}
        truth = reference(tensors, target_TK, vocab_size=33, **same)
        for a, b, c in zip(out, out_2, truth):
            assert torch.equal(a, b) and (a[1] == 0).all()
            torch.testing.assert_close(a[[0, 2, 3]].double(), c[[0, 2, 3]], rtol=0, atol=5e-6)
