"""class_logprob on both paths: float64 parity of values and gradients; unusual class maps."""

from unittest.mock import patch

import pytest
import torch
from close import (
    DEVICE,
    PATHS,
    NoLargeTensor,
    assert_compiles,
    assert_gradient_close,
    assert_no_worse,
    running,
)
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks
from torch._subclasses import FakeTensorMode

from reflux.kernels import _class_rows
from reflux.kernels._class_rows import class_rows, class_rows_backward
from reflux.kernels._parallel import VocabShard
from reflux.kernels.class_logprob import _op, class_logprob, class_logprob_ref, class_map

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# stores truncate in the interpreter
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = dict(
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.5]),
)


def inputs(T, V, N, dtype, seed, D=5):
    """[hidden, head, bias] and classes: half of the ids in class 0, some in none, some empty."""
    g = torch.Generator().manual_seed(seed)
    class_V = torch.where(
        torch.rand(V, generator=g) < 0.5, 0, torch.randint(-1, N, (V,), generator=g)
    )
    class_V[torch.randint(V, (1,), generator=g)] = N - 1
    tensors = [
        torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in ((T, D), (V, D), (V,))
    ]
    return tensors, class_map(class_V.to(DEVICE), N)


def run(fn, tensors, classes, dtype, upstream_TN, **options):
    x_TD, w_VD, bias_V = (t.detach().to(dtype).requires_grad_() for t in tensors)
    logp_TN = fn(x_TD, w_VD, classes, bias=bias_V, **options)
    return logp_TN.detach(), *torch.autograd.grad(
        logp_TN, (x_TD, w_VD, bias_V), upstream_TN.to(logp_TN.dtype)
    )


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 2),
    V=st.sampled_from([1, 2, 17, 127, 129, 260]),
    N=st.sampled_from([1, 2, 7, 130]),
    dtype=st.sampled_from(list(LOSS)),
    drawn=st.fixed_dictionaries(OPTIONS),
    padded=st.integers(0, 3),
    chosen=st.booleans(),
    block_v=st.sampled_from([64, 256, 2048]),
    long=st.sampled_from([4, 16, 128]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_values_and_gradients_match_float64(
    path, T, V, N, dtype, drawn, padded, chosen, block_v, long, workspace_mb, seed
):
    with patch.object(_class_rows, "LONG", long):  # whatever counts as a long class
        tensors, classes = inputs(T, V, N, dtype, seed)
    for i in (1, 2):  # junk in padded rows (T15)
        junk = torch.full((padded, *tensors[i].shape[1:]), 33.0, device=DEVICE, dtype=dtype)
        tensors[i] = torch.cat([tensors[i], junk])
    upstream_TN = torch.randn(T, N, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    rows = torch.arange(T, device=DEVICE)[1:].flip(0) if chosen else None
    options, only_fused = drawn | dict(rows=rows), dict(vocab_size=V, workspace_mb=workspace_mb)
    with running(path, block_v), patch.object(_class_rows, "LONG", long):
        got = run(class_logprob, tensors, classes, dtype, upstream_TN, **only_fused, **options)
    truth = run(class_logprob_ref, tensors, classes, torch.float64, upstream_TN, **options)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=LOSS[dtype], atol=LOSS[dtype])
    for what, a, b in zip(("dhidden", "dhead", "dbias"), got[1:], truth[1:], strict=True):
        # one class: every gradient is 0, and no error is small relative to 0
        if len(set(range(N)) - classes.empty) > 1:
            assert_gradient_close(a, b, what, GRAD[dtype])
    assert (got[2][V:] == 0).all() and (got[3][V:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_large_logits_lose_no_digits(path, scale):
    """With hidden = 1 the head is the logits; a logsumexp per class would round at their size."""
    (_, w_VD, _), classes = inputs(1, 200, 9, torch.float32, seed=3, D=1)
    one_TD, w_VD = torch.ones(2, 1, device=DEVICE), w_VD * scale - 5
    upstream_TN = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def values(fn, dtype):
        w = w_VD.to(dtype).requires_grad_()
        logp_TN = fn(one_TD.to(dtype), w, classes)
        return logp_TN.detach(), *torch.autograd.grad(logp_TN, w, upstream_TN.to(dtype))

    with running(path, 64):
        got = values(class_logprob, torch.float32)
    for what, a, b, c in zip(
        ("logp", "dlogits"),
        got,
        values(class_logprob_ref, torch.float32),
        values(class_logprob_ref, torch.float64),
        strict=True,
    ):
        assert_no_worse(
            torch.where(c.isfinite(), a, 0.0),
            torch.where(c.isfinite(), b, 0.0),
            torch.where(c.isfinite(), c, 0.0),
            what,
        )
        assert (a.isfinite() == c.isfinite()).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_typical_gradient_of_an_id_is_exact(path):
    """z is relative to the row's largest logit: with absolute ones the median is 20 times this."""
    errors = []
    for seed in range(5):
        (_, w_VD, _), classes = inputs(1, 120, 6, torch.float32, seed, D=1)
        w_VD = (w_VD + 300).requires_grad_()
        with running(path, 64):
            logp_1N = class_logprob(torch.ones(1, 1, device=DEVICE), w_VD, classes)
            (dlogits_VD,) = torch.autograd.grad(logp_1N[:, 0].sum(), w_VD)
        wide_VD = w_VD.detach().double().requires_grad_()
        (truth_VD,) = torch.autograd.grad(
            class_logprob_ref(torch.ones(1, 1, device=DEVICE).double(), wide_VD, classes)[
                :, 0
            ].sum(),
            wide_VD,
        )
        errors.append(((dlogits_VD - truth_VD).abs() / truth_VD.abs().clamp(min=1e-9)).median())
    assert torch.stack(errors).median() < 2e-7


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_classes_and_long_classes_meet(path, seed, monkeypatch):
    """Whatever counts as long, and whatever fits a program: the same sums."""
    (x_TD, w_VD, _), classes = inputs(2, 150, 40, torch.float64, seed)
    want_TN = class_logprob_ref(x_TD, w_VD, classes)
    for long, block, step in ((0, 16, 1), (1, 8, 2), (20, 64, 4)):
        for name, value in (("LONG", long), ("CLASSES", block), ("STEP", step)):
            monkeypatch.setattr(_class_rows, name, value)
        prepared = class_map(classes.class_V, 40)
        assert prepared.long_H.tolist() == [
            c for c in range(40) if (classes.class_V == c).sum() > long
        ]
        with running(path, 16):
            got_TN = class_logprob(x_TD, w_VD, prepared)
        torch.testing.assert_close(got_TN, want_TN)


@pytest.mark.parametrize("path", PATHS)
def test_one_class_each_is_log_softmax_and_one_class_is_certain(path):
    (x_TD, w_VD, _), _ = inputs(3, 70, 2, torch.float64, seed=4)
    x_TD.requires_grad_()
    with running(path, 64):
        own_TN = class_logprob(x_TD, w_VD, class_map(torch.arange(70, device=DEVICE), 70))
        (dx_TD,) = torch.autograd.grad(own_TN[:, 3].sum(), x_TD)
        all_T1 = class_logprob(
            x_TD, w_VD, class_map(torch.zeros(70, dtype=torch.long, device=DEVICE), 1)
        )
        (none_TD,) = torch.autograd.grad(all_T1.sum(), x_TD)
    logp_TV = (x_TD @ w_VD.t()).log_softmax(1)
    torch.testing.assert_close(own_TN, logp_TV)
    torch.testing.assert_close(dx_TD, torch.autograd.grad(logp_TV[:, 3].sum(), x_TD)[0])
    assert (all_T1 == 0).all() and none_TD.abs().max() < 1e-14


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_classes_add_up_when_merged(path, seed):
    (x_TD, w_VD, _), classes = inputs(2, 90, 6, torch.float64, seed)
    coarse = class_map(torch.where(classes.class_V < 0, -1, classes.class_V // 2), 3)
    with running(path, 64):
        fine_TN, coarse_TN = class_logprob(x_TD, w_VD, classes), class_logprob(x_TD, w_VD, coarse)
    torch.testing.assert_close(coarse_TN, torch.logaddexp(fine_TN[:, ::2], fine_TN[:, 1::2]))
    torch.testing.assert_close(
        fine_TN.exp().sum(1), torch.ones(2, dtype=torch.float64, device=DEVICE)
    )


@pytest.mark.parametrize("path", PATHS)
def test_banned_ids_banned_classes_and_banned_rows(path):  # T16
    _, classes = inputs(1, 60, 4, torch.float32, seed=5, D=1)
    w_VD = torch.randn(60, 3, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    bias_V = torch.where(classes.class_V == 2, -torch.inf, 0.0)
    bias_V[classes.order_L[0]] = -torch.inf  # one id of class 0
    x_TD = torch.randn(3, 3, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    upstream_TN = torch.randn(3, 4, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    with running(path, 16):
        logp_TN, dx_TD, dw_VD, dbias_V = run(
            class_logprob, (x_TD, w_VD, bias_V), classes, torch.float32, upstream_TN
        )
        dead = run(
            class_logprob,
            (x_TD, w_VD, torch.full_like(bias_V, -torch.inf)),
            classes,
            torch.float32,
            upstream_TN,
        )
    live_V = bias_V > -torch.inf
    want_TN = class_logprob_ref(x_TD, w_VD[live_V], class_map(classes.class_V[live_V], 4))
    torch.testing.assert_close(logp_TN, want_TN)
    assert (logp_TN[:, 2] == -torch.inf).all() and dx_TD.isfinite().all() and (dx_TD != 0).all()
    assert (
        (dw_VD[~live_V] == 0).all()
        and (dbias_V[~live_V] == 0).all()
        and (dw_VD[live_V & (classes.class_V >= 0)] != 0).any(1).all()
    )
    assert dead[0].isnan().all() and all((g == 0).all() for g in dead[1:])  # no distribution at all


@pytest.mark.parametrize("path", PATHS)
def test_one_bad_row_leaves_the_others_alone(path):
    tensors, classes = inputs(3, 60, 5, torch.float32, seed=6)
    clean, upstream_TN = [t.clone() for t in tensors], torch.ones(3, 5, device=DEVICE).tril()
    tensors[0][1] = float("nan")
    others = torch.tensor([0, 2], device=DEVICE)
    with running(path, 64):
        got = run(class_logprob, tensors, classes, torch.float32, upstream_TN)
        clean[0] = clean[0][others]
        want = run(class_logprob, clean, classes, torch.float32, upstream_TN[others])
    assert got[0][1].isnan().all() and (got[1][1] == 0).all()
    torch.testing.assert_close(got[0][others], want[0])
    torch.testing.assert_close(got[1][others], want[1])


@pytest.mark.parametrize("path", PATHS)
def test_a_head_can_be_put_in_order_for_good(path):
    (x_TD, w_VD, _), classes = inputs(2, 90, 7, torch.float32, seed=7)
    ready = class_map(classes.class_V[classes.order_L], 7)
    assert ready.in_order and not classes.in_order and ready.columns[0].numel() == 0
    with running(path, 64):
        assert torch.equal(
            class_logprob(x_TD, w_VD[classes.order_L], ready), class_logprob(x_TD, w_VD, classes)
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_whatever_the_chunk_the_layout_and_the_run(path):
    tensors, classes = inputs(5, 130, 9, torch.float32, seed=8)
    upstream_TN = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    views = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    views[1] = views[1].t().contiguous().t()
    with running(path, 64):
        want = run(class_logprob, tensors, classes, torch.float32, upstream_TN)
        again = run(class_logprob, tensors, classes, torch.float32, upstream_TN)
        other = run(class_logprob, views, classes, torch.float32, upstream_TN)
        halves_TN = torch.cat(
            [
                class_logprob(
                    tensors[0][c], tensors[1], classes, bias=tensors[2], workspace_mb=1e-4
                )
                for c in (slice(0, 2), slice(2, 5))
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(want, again))
    for a, b in zip(want, other):
        torch.testing.assert_close(a, b)
    # a GEMM of another height may round otherwise
    torch.testing.assert_close(halves_TN, want[0], rtol=2e-6, atol=2e-6)


def test_rows_of_a_block_do_not_know_each_other():
    """Given the same logits, a row's classes are the same bits in any block."""
    g = torch.Generator().manual_seed(9)
    logits_CL, (_, class_L, first_N1, long_H) = (
        torch.randn(5, 64, generator=g).to(DEVICE),
        inputs(1, 64, 5, torch.float32, 9)[1].columns,
    )
    logits_CL = logits_CL[:, : class_L.shape[0]]
    for path in PATHS:
        with running(path, 16):
            whole = class_rows(logits_CL, class_L, first_N1, long_H, 0.7, "")
            parts = [
                class_rows(logits_CL[c], class_L, first_N1, long_H, 0.7, "")
                for c in (slice(0, 1), slice(1, 5))
            ]
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts)))


def test_rows_that_lie_far_apart_are_read():
    """Row 2 begins at 2**31: 32-bit offsets would wrap. Only the pages that are touched exist."""
    class_L, first_N1, long_H = class_map((torch.arange(64) > 9).long().to(DEVICE), 2).columns[1:]
    far_CL = torch.empty(2 * 2**30 + 64, dtype=torch.float16, device=DEVICE).as_strided(
        (3, 64), (2**30, 1)
    )
    near_CL = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, torch.float16
    )
    with running(PATHS[0], 64), patch.object(_class_rows, "LONG", 20):
        results = []
        for logits_CL in (near_CL.clone(), far_CL.copy_(near_CL)):
            z_CN, top_C = class_rows(
                logits_CL, class_L, first_N1, torch.tensor([1], device=DEVICE), 1.0, ""
            )
            d_CL = class_rows_backward(
                logits_CL, class_L, top_C, z_CN, z_CN.new_ones(3, 2), (1.0, 1.0), 0.0, logits_CL
            )
            results.append((z_CN, d_CL.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and results[0][1].isfinite().all()


def test_the_full_logits_never_exist():  # T25
    tensors, classes = inputs(300, 400, 9, torch.float32, seed=4)
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        run(
            class_logprob,
            tensors,
            classes,
            torch.float32,
            torch.ones(300, 9, device=DEVICE),
            workspace_mb=0.5,
        )
    with pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 400 // 2):
        class_logprob_ref(*tensors[:2], classes)


def test_gradients_go_where_they_are_wanted():
    tensors, classes = inputs(3, 40, 5, torch.float32, seed=5)
    x_TD, w_VD, bias_V = (t.requires_grad_() for t in tensors)
    with running("torch"):
        loss = class_logprob(x_TD, w_VD, classes, bias=bias_V)[:, 0].sum()
        loss.backward(retain_graph=True)
        first = [t.grad.clone() for t in tensors]
        # a retained graph goes backward again, and lands on what is there (tied weights)
        loss.backward()
        assert all(torch.allclose(t.grad, 2 * f) for t, f in zip(tensors, first))
        x_TD.grad = w_VD.grad = bias_V.grad = None
        class_logprob(x_TD, w_VD, classes, bias=bias_V, frozen_head=True)[:, 0].sum().backward()
        assert torch.allclose(x_TD.grad, first[0]) and w_VD.grad is None and bias_V.grad is None
        with torch.autocast(DEVICE, torch.bfloat16):
            logp_TN = class_logprob(x_TD, w_VD, classes)
        torch.testing.assert_close(
            logp_TN, class_logprob(x_TD.bfloat16(), w_VD.bfloat16(), classes)
        )
    with running("torch"):
        assert torch.autograd.gradcheck(
            lambda x, w: class_logprob(x, w, classes)[:, ~torch.isneginf(logp_TN[0])],
            (x_TD.detach().double().requires_grad_(), w_VD.detach().double().requires_grad_()),
            fast_mode=True,
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    tensors, classes = inputs(3, 20, 4, torch.float32, seed=7)
    x_TD, w_VD, bias_V = (t.requires_grad_() for t in tensors)
    # opcheck compares gradients, and -inf has none
    full = class_map(torch.arange(20, device=DEVICE) % 4, 4)
    rows_M = torch.tensor([2, 0], device=DEVICE)
    args = x_TD, w_VD, bias_V, 0.5, 3.0, full.columns, rows_M, 20, 2.0, "", 1200.0
    with running(path, 64):
        torch.library.opcheck(_op, args)


def test_it_compiles_into_a_full_graph_and_never_waits_for_the_device():
    tensors, classes = inputs(3, 20, 4, torch.float32, seed=8)
    x_TD, w_VD, bias_V = (t.requires_grad_() for t in tensors)
    rows_M = torch.tensor([0, 2], device=DEVICE)

    def loss(x_TD, w_VD):
        logp_TN = class_logprob(x_TD * 2, w_VD, classes, bias=bias_V, rows=rows_M)
        return logp_TN[:, 0].sum() * 3

    assert_compiles(loss, [x_TD, w_VD])
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no values: reading one raises
        x_TD, w_VD = (
            torch.randn(3, 5, requires_grad=True, device=DEVICE),
            torch.randn(20, 5, requires_grad=True, device=DEVICE),
        )
        class_logprob(x_TD, w_VD, classes)[:, 0].sum().backward()
    assert x_TD.grad.shape == x_TD.shape and w_VD.grad.shape == w_VD.shape


def of_slices(tensors, classes, cut, upstream_TN, options):
    """On one rank of two: rows up to `cut` of the head, or those after it."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    V = classes.class_V.shape[0]
    mine = slice(0, cut) if rank == 0 else slice(cut, V)
    x_TD, w_VD, bias_V = (
        t.detach().clone().requires_grad_()
        for t in (tensors[0], tensors[1][mine], tensors[2][mine])
    )
    shard = VocabShard(group.group_name, mine.start)
    logp_TN = class_logprob(
        x_TD, w_VD, classes.slice(mine.start, mine.stop), bias=bias_V, shard=shard, **options
    )
    grads = torch.autograd.grad(logp_TN, (x_TD, w_VD, bias_V), upstream_TN)
    return [t.numpy() for t in (logp_TN.detach(), *grads)]


def all_slices(*cases):
    return [of_slices(*case) for case in cases]


def test_slices_of_a_vocabulary_equal_the_whole():
    cases = []
    for seed, cut in ((0, 30), (1, 1), (2, 59)):
        tensors, classes = inputs(3, 60, 7, torch.float64, seed)
        cases.append(
            (
                tensors,
                classes,
                cut,
                torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)).double(),
                dict(
                    softcap=4.0,
                    logit_scale=0.5,
                    temperature=2.0,
                    rows=torch.tensor([2, 0], device=DEVICE),
                    workspace_mb=0.001,
                ),
            )
        )
    both = run_on_ranks(all_slices, *cases)
    for case, (a, b) in zip(cases, zip(*both)):
        tensors, classes, _, upstream_TN, options = case
        logp_TN, dx_TD, dw_VD, dbias_V = run(
            class_logprob_ref,
            tensors,
            classes,
            torch.float64,
            upstream_TN,
            **{k: v for k, v in options.items() if k != "workspace_mb"},
        )
        for rank in (a, b):
            torch.testing.assert_close(torch.from_numpy(rank[0]), logp_TN)
            torch.testing.assert_close(torch.from_numpy(rank[1]), dx_TD)
        torch.testing.assert_close(torch.cat([torch.from_numpy(r[2]) for r in (a, b)]), dw_VD)
        torch.testing.assert_close(torch.cat([torch.from_numpy(r[3]) for r in (a, b)]), dbias_V)


MAP = class_map(torch.tensor([0, 1, 1, -1], device=DEVICE), 3)


@pytest.mark.parametrize(
    "head, options, match",
    [
        (torch.zeros(5, 2, device=DEVICE), {}, "4 ids and the head 5 rows"),
        (torch.zeros(4, 2, device=DEVICE), dict(vocab_size=3), "Pass vocab_size"),
        (
            torch.zeros(4, 2, device=DEVICE),
            dict(shard=VocabShard("g", 4)),
            "starts at id 0 and the head at 4",
        ),
        (torch.zeros(4, 2, device=DEVICE), dict(bias=torch.zeros(3, device=DEVICE)), "one a row"),
        (torch.zeros(4, 2, device=DEVICE), dict(temperature=0.0), "want > 0"),
        (torch.zeros(4, 2, device=DEVICE), dict(softcap=-1.0), "softcap"),
        (torch.zeros(4, 2, device=DEVICE), dict(logit_scale=0.0), "logit_scale"),
        (torch.zeros(4, 3, device=DEVICE), {}, "Flatten batch"),
    ],
)
def test_mistakes_say_how_to_fix_them(head, options, match):
    with pytest.raises(ValueError, match=match):
        class_logprob(torch.zeros(2, 2, device=DEVICE), head, MAP, **options)


@pytest.mark.parametrize(
    "class_V, N, match",
    [
        (torch.tensor([0, 3], device=DEVICE), 3, r"want -1 .. 2"),
        (torch.tensor([0, -2], device=DEVICE), 3, r"from \[-2\]"),
        (torch.tensor([-1, -1], device=DEVICE), 3, "at least one id"),
        (torch.tensor([0.0, 1.0], device=DEVICE), 3, "integers"),
        (torch.zeros(2, 2, device=DEVICE).long(), 3, "integers"),
    ],
)
def test_class_maps_are_checked_when_they_are_made(class_V, N, match):
    with pytest.raises(ValueError, match=match):
        class_map(class_V, N)
    with pytest.raises(ValueError, match="0 <= start"):
        MAP.slice(3, 5)
