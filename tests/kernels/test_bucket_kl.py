"""bucket_kl on both paths: float64 parity of values and gradients, laws of a coarse divergence."""

from unittest.mock import patch

import pytest
import torch
from close import (
    DEVICE,
    PATHS,
    NoLargeTensor,
    assert_compiles,
    assert_losses_close,
    running,
)
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks
from topk_cases import assert_gradient_no_worse
from torch._subclasses import FakeTensorMode

from reflux.kernels import _class_rows
from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._parallel import VocabShard
from reflux.kernels.bucket_kl import _op, bucket_kl, bucket_kl_ref
from reflux.kernels.class_logprob import class_logprob, class_map
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.token_kl import token_kl

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# stores truncate in the interpreter
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = dict(
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.25, 0.5, 0.9]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    student_softcap=st.sampled_from([None, 4.0]),
    scale_t2=st.booleans(),
)


def classes_of(V, N, g):
    """Every class has an id, half of the others are in class 0, some in none."""
    class_V = torch.where(
        torch.rand(V, generator=g) < 0.5, 0, torch.randint(-1, N, (V,), generator=g)
    )
    class_V[torch.randperm(V, generator=g)[:N]] = torch.arange(N, device=DEVICE)
    return class_map(class_V.to(DEVICE), N)


def inputs(T, V, W, N, dtype, seed, D=5, E=4):
    """[hidden, head, classes] of student and teacher, student bias [V], weight [T] of any sign."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        [torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((T, d), (v, d))]
        for d, v in ((D, V), (E, W))
    )
    weight_T = torch.randn(T, generator=g) * (torch.rand(T, generator=g) > 0.3)
    return (
        [*student, classes_of(V, N, g), *teacher, classes_of(W, N, g)],
        torch.randn(V, generator=g).to(DEVICE, dtype),
        weight_T.to(DEVICE),
    )


def run(fn, args, bias_V, dtype, **options):
    args = [t.detach().to(dtype) if isinstance(t, torch.Tensor) else t for t in args]
    leaves = [t.requires_grad_() for t in (args[0], args[1], bias_V.detach().to(dtype))]
    out = fn(*args, student_bias=leaves[2], **options)
    assert not out.kl.requires_grad
    return out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, leaves)


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 2),
    V=st.sampled_from([1, 2, 17, 129, 260]),
    W=st.sampled_from([3, 16, 150]),
    N=st.integers(1, 9),
    dtype=st.sampled_from(list(LOSS)),
    drawn=st.fixed_dictionaries(OPTIONS),
    padded=st.integers(0, 3),
    chosen=st.booleans(),
    block_v=st.sampled_from([64, 2048]),
    long=st.sampled_from([4, 16, 128]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_values_and_gradients_match_float64(
    path, T, V, W, N, dtype, drawn, padded, chosen, block_v, long, workspace_mb, seed
):
    with patch.object(_class_rows, "LONG", long):  # whatever counts as a long class
        args, bias_V, weight_T = inputs(T, V, W, min(N, V, W), dtype, seed)
    for head in (1, 4):  # junk in padded rows, another on each side (T15)
        junk = torch.full((padded, args[head].shape[1]), 33.0 * head, device=DEVICE, dtype=dtype)
        args[head] = torch.cat([args[head], junk])
    bias_V = torch.cat([bias_V, bias_V.new_zeros(padded)])
    rows = torch.arange(T, device=DEVICE)[1:].flip(0) if chosen else None
    options = drawn | dict(weight=weight_T, rows=rows, teacher_logit_scale=0.5)
    only_fused = dict(workspace_mb=workspace_mb, student_vocab_size=V, teacher_vocab_size=W)
    with running(path, block_v), patch.object(_class_rows, "LONG", long):
        got = run(bucket_kl, args, bias_V, dtype, **only_fused, **options)
    same_dtype = run(bucket_kl_ref, args, bias_V, dtype, **options)
    truth = run(bucket_kl_ref, args, bias_V, torch.float64, **options)
    assert_losses_close(got, truth, LOSS[dtype])
    gradients = zip(("dhidden", "dhead", "dbias"), got[2:], same_dtype[2:], truth[2:], strict=True)
    for what, a, b, c in gradients:
        if min(N, V, W) > 1:  # one class: every gradient is 0, and no error is small relative to 0
            assert_gradient_no_worse(a, b, c, what, GRAD[dtype])
    assert (got[3][V:] == 0).all() and (got[4][V:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_class_masses_have_no_loss_and_no_gradient(path, divergence):  # T1
    """Not equal models: the teacher's ids are the student's, each split into two of half mass."""
    args, bias_V, _ = inputs(3, 40, 80, 6, torch.float64, seed=1, D=4)
    x_TD, head_VD, classes = args[:3]
    twice = class_map(classes.class_V.repeat(2), 6)
    with running(path, 64):
        total, kl_T, *grads = run(
            bucket_kl,
            [x_TD, head_VD, classes, x_TD, head_VD.repeat(2, 1), twice],
            bias_V * 0,
            torch.float64,
            divergence=divergence,
        )
    assert max(t.abs().max() for t in (total, kl_T, *grads)) < 1e-12


@given(divergence=st.sampled_from(DIVERGENCES), beta=st.sampled_from([0.25, 0.75]), seed=SEEDS)
def test_never_negative_and_finer_partitions_see_more(divergence, beta, seed):  # T1, T2
    (x_TD, w_VD, fine, y_TE, v_WE, fine_W), _, _ = inputs(2, 50, 40, 8, torch.float64, seed)
    coarse, coarse_W = (
        class_map(torch.where(m.class_V < 0, -1, m.class_V // 3), 3) for m in (fine, fine_W)
    )
    with running("torch"):
        options = dict(divergence=divergence, beta=beta)
        finer_T = bucket_kl(x_TD, w_VD, fine, y_TE, v_WE, fine_W, **options).kl
        coarser_T = bucket_kl(x_TD, w_VD, coarse, y_TE, v_WE, coarse_W, **options).kl
        # one tokenizer: classes that both sides use lose information
        full_T = linear_kl(x_TD, w_VD[:40], y_TE, v_WE, **options).kl
        shared = class_map(torch.arange(40, device=DEVICE) % 5, 5)
        shared_T = bucket_kl(x_TD, w_VD[:40], shared, y_TE, v_WE, shared, **options).kl
    assert (
        (coarser_T >= -1e-12).all()
        and (finer_T >= coarser_T - 1e-12).all()
        and (full_T >= shared_T - 1e-12).all()
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_for_every_id_is_linear_kl_and_one_class_is_nothing(path, divergence):
    args, bias_V, weight_T = inputs(3, 60, 60, 2, torch.float64, seed=2)
    own, one = (
        class_map(torch.arange(60, device=DEVICE), 60),
        class_map(torch.zeros(60, dtype=torch.long, device=DEVICE), 1),
    )
    pairs = [args[0], args[1], args[3], args[4]]
    with running(path, 64):
        got = run(
            bucket_kl,
            [*pairs[:2], own, *pairs[2:], own],
            bias_V,
            torch.float64,
            divergence=divergence,
            weight=weight_T,
        )
        want = run(linear_kl, pairs, bias_V, torch.float64, divergence=divergence, weight=weight_T)
        none = run(
            bucket_kl,
            [*pairs[:2], one, *pairs[2:], one],
            bias_V,
            torch.float64,
            divergence=divergence,
            weight=weight_T,
        )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert max(t.abs().max() for t in none) < 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_the_forward_gradient_is_the_closed_form(path):  # T3
    """tokenalign: dL/dz_i = p_i (1 - Q_c(i) / P_c(i)), times 1 / temperature."""
    (x_TD, w_VD, classes, y_TE, v_WE, classes_W), bias_V, _ = inputs(
        1, 50, 40, 6, torch.float64, seed=3
    )
    with running(path, 64):
        *_, dbias_V = run(
            bucket_kl,
            [x_TD, w_VD, classes, y_TE, v_WE, classes_W],
            bias_V,
            torch.float64,
            temperature=2.0,
        )
    p_V = (
        ((x_TD @ w_VD.t() + bias_V) / 2).masked_fill(classes.class_V < 0, -torch.inf).softmax(1)[0]
    )
    q_W = (y_TE @ v_WE.t() / 2).masked_fill(classes_W.class_V < 0, -torch.inf).softmax(1)[0]
    P_N, Q_N = (
        torch.stack([x[m.class_V == c].sum() for c in range(6)])
        for x, m in ((p_V, classes), (q_W, classes_W))
    )
    torch.testing.assert_close(
        dbias_V, -0.7 / 2 * p_V * (1 - (Q_N / P_N)[classes.class_V.clamp(min=0)])
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_stored_teacher_of_class_probabilities_gives_the_same(path, divergence):
    """Offline: store class_logprob's N floats a position, and compare with token_kl."""
    args, bias_V, weight_T = inputs(3, 70, 60, 6, torch.float64, seed=4)
    x_TD, w_VD = (t.detach().requires_grad_() for t in args[:2])
    with running(path, 64):
        stored_TN = class_logprob(*args[3:])
        stored = token_kl(
            class_logprob(x_TD, w_VD, args[2], bias=bias_V),
            stored_TN,
            divergence=divergence,
            weight=weight_T,
        )
        grads = torch.autograd.grad(stored.total * -0.7, (x_TD, w_VD))
        total, kl_T, *fused = run(
            bucket_kl, args, bias_V, torch.float64, divergence=divergence, weight=weight_T
        )
    torch.testing.assert_close(stored.kl, kl_T)
    for a, b in zip(grads, fused):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_that_one_side_lacks(path, divergence):
    """Refused where every row would be infinite; else its probability is 0 and all is finite."""
    args, bias_V, _ = inputs(2, 40, 30, 4, torch.float64, seed=5)
    lacking = {
        side: class_map(torch.where(args[side].class_V == 2, 1, args[side].class_V), 4)
        for side in (2, 5)
    }
    for side, infinite in ((2, "forward"), (5, "reverse")):
        case = [lacking[side] if i == side else a for i, a in enumerate(args)]
        with running(path, 64):
            if divergence == infinite:
                with pytest.raises(
                    ValueError, match="such as 2, have ids of the (teacher|student) only"
                ):
                    run(bucket_kl, case, bias_V, torch.float64, divergence=divergence)
                continue
            got = run(bucket_kl, case, bias_V, torch.float64, divergence=divergence)
            truth = run(bucket_kl_ref, case, bias_V, torch.float64, divergence=divergence)
        assert got[1].isfinite().all()
        for a, b in zip(got[:2], truth[:2]):
            torch.testing.assert_close(a, b)
        for a, b in zip(got[2:], truth[2:]):
            if side == 5:  # autograd of the definition has 0 * inf in an empty student class
                torch.testing.assert_close(a, b)
            assert a.isfinite().all()
    both = [lacking.get(i, a) for i, a in enumerate(args)]
    with running(path, 64):
        assert (
            run(bucket_kl, both, bias_V, torch.float64, divergence=divergence)[1].isfinite().all()
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_that_is_not_finite_is_reported_and_left_out(path, divergence):
    args, bias_V, _ = inputs(4, 40, 30, 5, torch.float32, seed=6)
    args[3][1] = float("nan")
    rows = torch.tensor([0, 2, 3], device=DEVICE)
    with running(path, 64):
        _, kl_T, dx_TD, *grads = run(bucket_kl, args, bias_V, torch.float32, divergence=divergence)
        _, chosen_T, dchosen_TD, *chosen_grads = run(
            bucket_kl,
            [args[0][rows], *args[1:3], args[3][rows], *args[4:]],
            bias_V,
            torch.float32,
            divergence=divergence,
        )
        without = bucket_kl(
            *args,
            divergence=divergence,
            weight=torch.tensor([1.0, 0, 1, 1], device=DEVICE),
            student_bias=bias_V,
        )
        chosen = bucket_kl(*args, divergence=divergence, rows=rows, student_bias=bias_V)
    assert kl_T[1].isnan() and (dx_TD[1] == 0).all() and chosen.kl[1] == 0
    for a, b in zip(
        (kl_T[rows], dx_TD[rows], *grads, without.total, chosen.total),
        (chosen_T, dchosen_TD, *chosen_grads, chosen_T.sum(), chosen_T.sum()),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_twice_and_shuffled_ids_change_nothing(path):
    args, bias_V, weight_T = inputs(3, 90, 80, 7, torch.float32, seed=7)
    order_V = torch.randperm(90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = [args[0], args[1][order_V], class_map(args[2].class_V[order_V], 7), *args[3:]]
    with running(path, 64):
        want = run(bucket_kl, args, bias_V, torch.float32, divergence="jsd", weight=weight_T)
        again = run(bucket_kl, args, bias_V, torch.float32, divergence="jsd", weight=weight_T)
        other = run(
            bucket_kl, shuffled, bias_V[order_V], torch.float32, divergence="jsd", weight=weight_T
        )
    assert all(torch.equal(a, b) for a, b in zip(want, again))
    for a, b in zip((*want[:3], want[3][order_V], want[4][order_V]), other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_full_logits_never_exist():  # T25
    args, bias_V, weight_T = inputs(300, 400, 380, 9, torch.float32, seed=8)
    with running("torch"), NoLargeTensor(300 * 380 // 2):
        run(bucket_kl, args, bias_V, torch.float32, weight=weight_T, workspace_mb=0.5)
    with pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 380 // 2):
        bucket_kl_ref(*args)


def test_who_gets_a_gradient():
    args, bias_V, _ = inputs(3, 30, 20, 4, torch.float32, seed=9)
    tensors = [args[0], args[1], bias_V, args[3], args[4]]
    for t in tensors:
        t.requires_grad_()
    with running("torch"):
        bucket_kl(*args, student_bias=bias_V, frozen_student_head=True).total.backward()
        assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])
        tensors[0].grad = None
        total = bucket_kl(*args, student_bias=bias_V).total
        total.backward(retain_graph=True)
        first = [t.grad.clone() for t in tensors[:3]]
        # a retained graph goes backward again, and lands on what is there (tied weights)
        total.backward()
        assert all(torch.allclose(t.grad, 2 * f) for t, f in zip(tensors, first)) and all(
            t.grad is None for t in tensors[3:]
        )
        with torch.autocast(DEVICE, torch.bfloat16):
            kl_T = bucket_kl(*args).kl
        torch.testing.assert_close(
            kl_T, bucket_kl(*(a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args)).kl
        )
        with torch.no_grad():
            assert not bucket_kl(*args).total.requires_grad


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    args, bias_V, weight_T = inputs(3, 20, 15, 4, torch.float32, seed=10)
    x_TD, w_VD, classes, y_TE, v_WE, classes_W = args
    for t in (x_TD, w_VD, bias_V):
        t.requires_grad_()
    student = x_TD, w_VD, bias_V, 1.0, 0.0, classes.columns, 20, ""
    teacher = y_TE, v_WE, None, 1.0, 0.0, classes_W.columns, 15, ""
    options = weight_T, None, "jsd", 0.5, 2.0, True, 1200.0
    call = *student, *teacher, *options, True, True, True
    # AOT dispatch is checked below: here it would return the gradients that backward scales
    with running(path, 64):
        torch.library.opcheck(
            _op, call, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_it_compiles_into_a_full_graph_and_never_waits_for_the_device():
    args, bias_V, weight_T = inputs(3, 20, 15, 4, torch.float32, seed=11)

    def loss(x_TD, w_VD):
        return bucket_kl(x_TD * 2, w_VD, *args[2:], divergence="jsd", weight=weight_T).total * 3

    assert_compiles(loss, [t.requires_grad_() for t in args[:2]])
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no values: reading one raises
        x_TD, w_VD = (
            torch.randn(3, 5, requires_grad=True, device=DEVICE),
            torch.randn(20, 5, requires_grad=True, device=DEVICE),
        )
        y_TE, v_WE = torch.randn(3, 4, device=DEVICE), torch.randn(15, 4, device=DEVICE)
        bucket_kl(x_TD, w_VD, args[2], y_TE, v_WE, args[5]).total.backward()
    assert x_TD.grad.shape == x_TD.shape and w_VD.grad.shape == w_VD.shape


def of_slices(args, bias_V, weight_T, cuts, options):
    """On one rank of two: head rows up to a cut, or those after it; cut 0 leaves a side whole."""
    group, rank = torch.distributed.group.WORLD.group_name, torch.distributed.get_rank()
    x_TD, w_VD, classes, y_TE, v_WE, classes_W = args
    (a, b), V, W = cuts, len(w_VD), len(v_WE)
    mine, theirs = (
        slice(0, cut) if rank == 0 else slice(cut, size) for cut, size in ((a, V), (b, W))
    )
    options = dict(options, weight=weight_T)
    if a:
        w_VD, classes, bias_V = w_VD[mine], classes.slice(mine.start, mine.stop), bias_V[mine]
        options["student_shard"] = VocabShard(group, mine.start)
    if b:
        v_WE, classes_W = v_WE[theirs], classes_W.slice(theirs.start, theirs.stop)
        options["teacher_shard"] = VocabShard(group, theirs.start)
    return [
        t.numpy()
        for t in run(
            bucket_kl,
            [x_TD, w_VD, classes, y_TE, v_WE, classes_W],
            bias_V,
            torch.float64,
            **options,
        )
    ]


def all_slices(*cases):
    return [of_slices(*case) for case in cases]


def test_slices_of_both_vocabularies_equal_the_whole():
    cases = []
    for seed, cuts, divergence in (
        (0, (20, 10), "jsd"),
        (1, (1, 29), "forward"),
        (2, (30, 0), "reverse"),
        (3, (0, 10), "forward"),
    ):
        args, bias_V, weight_T = inputs(3, 40, 30, 5, torch.float64, seed)
        cases.append(
            (
                args,
                bias_V,
                weight_T,
                cuts,
                dict(
                    divergence=divergence, temperature=2.0, student_softcap=4.0, workspace_mb=0.001
                ),
            )
        )
    both = run_on_ranks(all_slices, *cases)
    for (args, bias_V, weight_T, cuts, options), ranks in zip(cases, zip(*both)):
        options.pop("workspace_mb")
        want = run(bucket_kl_ref, args, bias_V, torch.float64, weight=weight_T, **options)
        for got in ranks:
            for a, b in zip(got[:3], want[:3]):
                torch.testing.assert_close(torch.as_tensor(a), b)
        for i in (3, 4):
            parts = [torch.from_numpy(got[i]) for got in ranks]
            torch.testing.assert_close(torch.cat(parts) if cuts[0] else parts[0], want[i])


MAPS = (
    class_map(torch.tensor([0, 1, 1, -1], device=DEVICE), 3),
    class_map(torch.tensor([0, 1, 0], device=DEVICE), 3),
)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(divergence="kl"), "want one of forward"),
        (dict(divergence="jsd", beta=1.0), "use divergence='forward'"),
        (dict(weight=torch.ones(2, 1, device=DEVICE)), r"want \[T\]"),
        (
            dict(teacher_head_WE=torch.zeros(6, 3, device=DEVICE)),
            r"\(teacher\): the class map has 3 ids",
        ),
        (dict(teacher_hidden_TE=torch.zeros(3, 3, device=DEVICE)), "3 teacher rows"),
        (
            dict(teacher_classes=class_map(torch.tensor([0, 1, 0], device=DEVICE), 2)),
            "one numbering",
        ),
        (dict(student_bias=torch.zeros(3, device=DEVICE)), "one a row"),
        (dict(temperature=-1.0), "want > 0"),
    ],
)
def test_mistakes_say_how_to_fix_them(change, match):
    args = dict(
        student_hidden_TD=torch.zeros(2, 4, device=DEVICE),
        student_head_VD=torch.zeros(4, 4, device=DEVICE),
        student_classes=MAPS[0],
        teacher_hidden_TE=torch.zeros(2, 3, device=DEVICE),
        teacher_head_WE=torch.zeros(3, 3, device=DEVICE),
        teacher_classes=MAPS[1],
    )
    with pytest.raises(ValueError, match=match):
        bucket_kl(**(args | change))
