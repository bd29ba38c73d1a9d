"""linear_topk_kl on both paths: float64 parity with every option; dhead, dbias, chunks, slices.

The laws of the tails themselves are in test_tail_laws.py.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from close import DEVICE, PATHS, NoLargeTensor, assert_compiles, assert_losses_close, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks
from topk_cases import (
    ALLOWED,
    PROPER,
    assert_gradient_no_worse,
    floats,
    pad_some,
    randn,
    run,
    signed_weights,
    student,
    top_k,
    with_bias,
    with_junk,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from reflux.kernels import linear_topk_kl as module
from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.linear_topk_kl import _op, linear_topk_kl, linear_topk_kl_ref
from reflux.kernels.renormalised_topk_kl import gather_is_cheaper, renormalised_topk_kl
from reflux.kernels.teacher_topk import teacher_topk

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# the interpreter truncates bf16
GRAD = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = dict(
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    scale_t2=st.booleans(),
)
both_paths = pytest.mark.parametrize("path", PATHS)
linear_topk = partial(linear_topk_kl, allow_drop=True)


@both_paths
@given(
    T=st.integers(0, 4),
    V=st.one_of(st.integers(2, 300), st.sampled_from([63, 64, 65, 129])),
    D=st.integers(1, 8),
    K=st.integers(2, 9),
    case=st.sampled_from(ALLOWED),
    dtype=st.sampled_from(list(LOSS)),
    drawn=st.fixed_dictionaries(OPTIONS),
    pads=st.booleans(),
    rows=st.booleans(),
    transposed=st.booleans(),
    block_v=st.sampled_from([64, 256, 2048]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_values_and_gradients_match_float64(
    path, T, V, D, K, case, dtype, drawn, pads, rows, transposed, block_v, workspace_mb, seed
):
    (divergence, tail), K = case, min(K, V)
    x_TD, w_VD, b_V = student(T, V, D, seed, dtype)
    w_VD, b_V = with_junk(w_VD, b_V)
    if transposed:
        x_TD, w_VD = (t.t().contiguous().t() for t in (x_TD, w_VD))
    leaves = [x_TD, w_VD, b_V]
    ids_TK, logp_TK, tail_T = top_k(randn(T, V, seed=seed + 3), K, drawn["temperature"])
    # K = V: a padded id has no mass anywhere; reverse is infinite then, autograd's gradient NaN
    if pads and K < V:
        ids_TK, logp_TK = pad_some(ids_TK, logp_TK, V)
    topk = floats((ids_TK, logp_TK, tail_T), torch.promote_types(dtype, torch.float32))
    options = drawn | dict(
        divergence=divergence,
        tail=tail,
        beta=0.25,
        weight=signed_weights(T, seed),
        vocab_size=V,
        rows=torch.arange(T, device=DEVICE)[::2].flip(0) if rows else None,
    )
    ours = partial(linear_topk, workspace_mb=workspace_mb)
    with running(path, block_v):
        got = run(with_bias(ours), leaves, topk, dtype, **options)
    same_dtype = run(with_bias(linear_topk_kl_ref), leaves, topk, dtype, **options)
    truth = run(with_bias(linear_topk_kl_ref), leaves, topk, torch.float64, **options)
    assert_losses_close(got, truth, LOSS[dtype])
    for what, a, b, c in zip(
        ("dhidden", "dhead", "dbias"), got[2:], same_dtype[2:], truth[2:], strict=True
    ):
        assert_gradient_no_worse(a, b, c, what, GRAD[dtype])
    assert (
        (got[3][V:] == 0).all()
        and (got[4][V:] == 0).all()
        and (not rows or (got[2][1::2] == 0).all())
    )


@both_paths
@pytest.mark.parametrize("divergence, tail", ALLOWED)
def test_gradcheck(path, divergence, tail):  # T3
    topk = top_k(randn(3, 20, seed=1), 4, 2.0)
    with running(path, 64):
        torch.autograd.gradcheck(
            lambda *s: (
                with_bias(linear_topk)(
                    *s,
                    *topk,
                    divergence=divergence,
                    tail=tail,
                    beta=0.25,
                    temperature=2.0,
                    softcap=3.0,
                    logit_scale=0.5,
                    weight=signed_weights(3, 2),
                ).total
            ),
            [t.requires_grad_() for t in student(3, 20, 4, 3)],
            fast_mode=True,
        )


@both_paths
@pytest.mark.parametrize("divergence, tail", PROPER)
def test_a_student_equal_to_its_teacher_learns_nothing(path, divergence, tail):  # T1
    x_TD, w_VD, _ = student(3, 60, 5, 2)
    with running(path, 64):
        out = run(
            linear_topk,
            [x_TD, w_VD],
            teacher_topk(x_TD, w_VD, 5, softcap=4.0),
            torch.float64,
            divergence=divergence,
            tail=tail,
            softcap=4.0,
        )
    assert max(t.abs().max() for t in out) < 1e-12


@both_paths
def test_the_whole_vocabulary_is_the_full_divergence(path):  # T2
    (x_TD, w_VD, _), (y_TD, v_VD, _) = student(3, 40, 5, 4), student(3, 40, 5, 7)
    with running(path, 64):
        got = run(
            linear_topk, [x_TD, w_VD], teacher_topk(y_TD, v_VD, 40), torch.float64, divergence="jsd"
        )
        want = run(linear_kl, [x_TD, w_VD], (y_TD, v_VD), torch.float64, divergence="jsd")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@both_paths
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_the_loss_of_a_token_does_not_depend_on_its_chunk(path, tail):
    """To the bit. Whole numbers make the GEMM exact in any order: only the row kernels are left."""
    x_TD, w_VD, _ = (t.mul(2).round() for t in student(5, 100, 4, 9, torch.float32))
    topk = floats(top_k(randn(5, 100, seed=10), 7))
    with running(path, 64):
        first, again, chunked = (
            run(
                linear_topk,
                [x_TD, w_VD],
                topk,
                torch.float32,
                divergence="jsd",
                tail=tail,
                workspace_mb=mb,
            )
            for mb in (1200, 1200, 0.0001)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], chunked[1])


def test_few_ids_are_gathered_and_many_are_not():
    """renorm takes the path that moves fewer bytes, with the same numbers."""
    (x_TD, w_VD, b_V), topk = student(3, 1300, 4, 11), top_k(randn(3, 1300, seed=12), 3)
    options = dict(
        divergence="jsd",
        tail="renorm",
        softcap=3.0,
        logit_scale=0.5,
        temperature=2.0,
        rows=torch.tensor([2, 0], device=DEVICE),
        scale_t2=True,
        weight=signed_weights(3, 13),
    )
    results = []
    for k, gathered in ((2, True), (3, False)):
        with (
            running("torch"),
            patch.object(module, "renormalised_topk_kl", wraps=renormalised_topk_kl) as spy,
        ):
            some = [x[:, :k] if x.ndim == 2 else x for x in topk]
            results.append(
                run(with_bias(linear_topk), [x_TD, w_VD, b_V], some, torch.float64, **options)
            )
        assert spy.called == gathered == gather_is_cheaper(k, 1300)
        with running("torch"), patch.object(module, "gather_is_cheaper", return_value=not gathered):
            other = run(with_bias(linear_topk), [x_TD, w_VD, b_V], some, torch.float64, **options)
        torch.testing.assert_close(other, results[-1], rtol=1e-10, atol=1e-13)


def arguments():
    leaves = [t.requires_grad_() for t in student(3, 20, 4, 14, torch.float32)]
    topk = floats(top_k(randn(3, 20, seed=15), 4))
    options = signed_weights(3, 16), None, "jsd", 0.5, 1.0, False, "bucket", 20, "", 0, 1200.0
    return *leaves, 1.0, 0.0, *topk, *options, True, True, True


# T25; a dispatch mode does not see inside an op, so it is unwrapped
def test_the_full_logits_never_exist():
    tensors = *student(300, 400, 8, 5, torch.float32), 1.0, 4.0
    topk = floats(top_k(randn(300, 400, seed=6), 8))
    for tail in ("bucket", "renorm"):
        options = (
            torch.ones(300, device=DEVICE),
            None,
            "jsd",
            0.5,
            1.0,
            False,
            tail,
            400,
            "",
            0,
            0.5,
        )
        with running("torch"), NoLargeTensor(300 * 400 // 2):
            _op._init_fn(*tensors, *topk, *options, True, True, True)


@both_paths
def test_the_op_keeps_torch_librarys_contract(path):
    with running(path, 64):
        torch.library.opcheck(_op, arguments())


def test_nothing_waits_for_the_device():
    """Fake tensors have no values to wait for: reading one raises."""
    with running("torch"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = [
            mode.from_tensor(x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments()
        ]
        for rows_M in (None, torch.arange(2, device=DEVICE)):
            _, kl_T, *gradients = _op._init_fn(*args[:9], rows_M, *args[10:])
            shapes = [list(d.shape) for d in gradients]
            assert kl_T.shape == (3,) and shapes == [[3, 4], [20, 4], [20]]


def test_it_compiles_into_a_full_graph():
    topk = top_k(randn(3, 20, seed=18), 4)
    options = dict(divergence="jsd", rows=torch.tensor([2, 0], device=DEVICE))

    def loss(x_TD, w_VD, b_V):
        return linear_topk_kl(x_TD * 2, w_VD, *topk, bias=b_V, **options).total * 3

    assert_compiles(loss, [t.requires_grad_() for t in student(3, 20, 4, 19)])


def test_who_gets_a_gradient():
    (x_TD, w_VD, b_V), topk = (
        (t.requires_grad_() for t in student(3, 20, 4, 20)),
        top_k(randn(3, 20, seed=23), 4),
    )
    topk = [t.requires_grad_() if t.is_floating_point() else t for t in topk]
    with running("torch"):
        linear_topk_kl(x_TD, w_VD, *topk, bias=b_V, frozen_student_head=True).total.backward()
        assert x_TD.grad is not None and w_VD.grad is None and b_V.grad is None
        w_VD.grad = torch.ones_like(w_VD)  # a tied embedding's gradient is there first
        total = linear_topk_kl(x_TD.detach(), w_VD, *topk, bias=b_V).total
        total.backward(retain_graph=True)
        first_VD = w_VD.grad - 1
        total.backward()
        # a retained graph goes backward again
        torch.testing.assert_close(w_VD.grad, 1 + 2 * first_VD)
        assert (
            first_VD.abs().max() > 1e-3
            and b_V.grad is not None
            and all(t.grad is None for t in topk)
        )
        with torch.no_grad():
            assert not linear_topk_kl(x_TD, w_VD, *topk).total.requires_grad


@both_paths
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_autocast_casts_as_a_linear_layer_does(path, tail):
    (x_TD, w_VD, _), topk = (
        student(3, 20, 4, 24, torch.float32),
        floats(top_k(randn(3, 20, seed=25), 4)),
    )
    leaves = [t.detach().requires_grad_() for t in (x_TD, w_VD)]
    with running(path, 64):
        want = run(linear_topk, [x_TD, w_VD], topk, torch.bfloat16, tail=tail)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = linear_topk(*leaves, *topk, tail=tail)
        gradients = torch.autograd.grad(out.total * -0.7, leaves)
    assert torch.equal(out.kl, want[1]) and all(d.dtype == torch.float32 for d in gradients)
    torch.testing.assert_close(gradients, tuple(d.float() for d in want[2:]), rtol=1e-2, atol=1e-3)


def on_a_slice(path: str, cuts: list[int], tensors, topk, weight_T, cases) -> list:
    start, end = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    shard, (x_TD, w_VD, b_V) = VocabShard(dist.group.WORLD.group_name, start), tensors
    with running(path, 64):
        return [
            run(
                with_bias(linear_topk),
                [x_TD, w_VD[start:end], b_V[start:end]],
                topk,
                x_TD.dtype,
                divergence=divergence,
                tail=tail,
                weight=weight_T,
                shard=shard,
                vocab_size=37,
                softcap=3.0,
                logit_scale=0.5,
                workspace_mb=0.0005,
            )
            for divergence, tail in cases
        ]


@both_paths
@pytest.mark.parametrize("cuts", [[0, 23, 40], [0, 37, 40]], ids=["uneven", "a slice of padding"])
def test_slices_of_the_vocabulary_give_what_the_whole_gives(path, cuts):
    T, V = 3, 37
    tensors, (ids_TK, logp_TK, tail_T) = student(T, 40, 5, 26), top_k(randn(T, V, seed=29), 6)
    topk, weight_T = (*pad_some(ids_TK, logp_TK, V), tail_T), signed_weights(T, 30)
    cases = [
        ("forward", "bucket"),
        ("reverse", "bucket"),
        ("jsd", "renorm"),
        ("forward", "sampled"),
        ("forward", "drop"),
    ]
    ranks = run_on_ranks(
        on_a_slice, path, cuts, tensors, topk, weight_T, cases if cuts[1] == 23 else cases[:1]
    )
    for (divergence, tail), *parts in zip(cases, *ranks):
        with running("torch"):
            whole = run(
                with_bias(linear_topk),
                tensors,
                topk,
                torch.float64,
                divergence=divergence,
                tail=tail,
                weight=weight_T,
                vocab_size=V,
                softcap=3.0,
                logit_scale=0.5,
            )
        for part in parts:  # dhidden, too, is that of the whole vocabulary
            torch.testing.assert_close(part[:3], whole[:3], rtol=1e-10, atol=1e-13)
        for i in (3, 4):
            torch.testing.assert_close(
                torch.cat([part[i] for part in parts]), whole[i], rtol=1e-10, atol=1e-13
            )


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(tail="tail"), "want one of bucket"),
        (
            dict(
                tail="renorm",
                ids_TK=torch.zeros(2, 1, dtype=torch.int32, device=DEVICE),
                teacher_logp_TK=torch.zeros(2, 1, device=DEVICE),
            ),
            "K = 1",
        ),
        (dict(tail="drop", divergence="reverse"), "use tail='bucket'"),
        (dict(tail="drop"), "allow_drop=True"),
        (dict(tail="sampled", divergence="jsd"), "use tail='bucket'"),
        (dict(teacher_tail_T=None), "teacher_topk returns it"),
        (dict(teacher_tail_T=torch.zeros(3, device=DEVICE)), r"want \[T\]"),
        (
            dict(
                ids_TK=torch.zeros(2, 6, dtype=torch.int32, device=DEVICE),
                teacher_logp_TK=torch.zeros(2, 6, device=DEVICE),
            ),
            "1 <= K <= V",
        ),
        (dict(teacher_logp_TK=torch.zeros(2, 3, device=DEVICE)), r"want \[T, K\] both"),
        (dict(teacher_logp_TK=torch.zeros(2, 2, device=DEVICE).bfloat16()), "want float32"),
        (dict(ids_TK=torch.zeros(2, 2, device=DEVICE)), "want int32 or int64"),
        (dict(temperature=0.0), "want > 0"),
        (dict(temperature=2.0, teacher_temperature=1.0), "do not give the tail"),
        (dict(bias=torch.zeros(4, device=DEVICE)), "one a row"),
        (dict(logit_scale=0.0), "1 for none"),
    ],
)
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(
        student_hidden_TD=torch.zeros(2, 4, device=DEVICE),
        student_head_VD=torch.zeros(5, 4, device=DEVICE),
        ids_TK=torch.zeros(2, 2, dtype=torch.int32, device=DEVICE),
        teacher_logp_TK=torch.zeros(2, 2, device=DEVICE),
        teacher_tail_T=torch.zeros(2, device=DEVICE),
    )
    with pytest.raises(ValueError, match=match):
        linear_topk_kl(**(args | options))
    assert linear_topk_kl_ref(**args).kl.shape == (2,)
