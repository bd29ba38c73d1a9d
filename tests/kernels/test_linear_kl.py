"""linear_kl on both paths: values and gradients against float64 autograd, laws of a divergence."""

import subprocess
import sys

import pytest
import torch
from close import (
    DEVICE,
    PATHS,
    NoLargeTensor,
    assert_compiles,
    assert_gradient_close,
    assert_losses_close,
    running,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from reflux.kernels import _triton
from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels.linear_kl import _op, linear_kl, linear_kl_ref

# numpy, about -inf - -inf in masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**31 - 1)
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# the interpreter truncates bf16
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = dict(
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.25, 0.5, 0.9]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    student_softcap=st.sampled_from([None, 4.0]),
    teacher_softcap=st.sampled_from([None, 4.0]),
    student_logit_scale=st.sampled_from([1.0, 0.5]),
    teacher_logit_scale=st.sampled_from([1.0, 2.0]),
    scale_t2=st.booleans(),
)
# around tiles and pads
SIZES = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]) | st.integers(1, 300)


def inputs(T, V, D, E, dtype, seed):
    """[student hidden and head, teacher hidden and head], weight [T] with zeros and signs."""
    g = torch.Generator().manual_seed(seed)
    shapes = (T, D), (V, D), (T, E), (V, E)
    weight_T = torch.randn(T, generator=g) * (torch.rand(T, generator=g) > 0.3)
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes], weight_T.to(DEVICE)


def run(fn, tensors, dtype, biases=None, **options):
    """total, kl, the student's dhidden and dhead; dbias if biases (student, teacher) are given."""
    x_TD, w_VD, *teacher = (t.detach().to(dtype) for t in tensors)
    leaves = [x_TD.requires_grad_(), w_VD.requires_grad_()]
    if biases:
        options["student_bias"], options["teacher_bias"] = (b.detach().to(dtype) for b in biases)
        leaves.append(options["student_bias"].requires_grad_())
    out = fn(x_TD, w_VD, *teacher, **options)
    assert not out.kl.requires_grad
    return out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, leaves)


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 3),
    V=SIZES,
    dims=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dtype=st.sampled_from(list(LOSS)),
    options=st.fixed_dictionaries(OPTIONS),
    biased=st.booleans(),
    chosen=st.sampled_from([None, [], [1], [2, 0]]),
    padded=st.integers(0, 3),
    strided=st.booleans(),
    block_v=st.sampled_from([64, 256, 2048]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_values_and_gradients_match_float64(
    path, T, V, dims, dtype, options, biased, chosen, padded, strided, block_v, workspace_mb, seed
):
    tensors, weight_T = inputs(T, V, *dims, dtype, seed)
    for head in (1, 3):  # junk in padded columns, another on each side (T15)
        junk = torch.full((padded, tensors[head].shape[1]), 33.0 * head, device=DEVICE, dtype=dtype)
        tensors[head] = torch.cat([tensors[head], junk])
    options = options | dict(weight=weight_T, vocab_size=V)
    if biased:
        bias_V = torch.randn(V + padded, generator=torch.Generator().manual_seed(seed))
        options["biases"] = [(bias_V * i).to(DEVICE, dtype) for i in (1, 2)]
    if chosen is not None:
        chosen = [t for t in chosen if t < T]
        options["rows"] = torch.tensor(chosen, dtype=torch.long, device=DEVICE)
    mine = [t.t().contiguous().t() for t in tensors] if strided else tensors
    with running(path, block_v):
        got = run(linear_kl, mine, dtype, workspace_mb=workspace_mb, **options)
    truth = run(linear_kl_ref, tensors, torch.float64, **options)
    assert_losses_close(got, truth, LOSS[dtype])
    for what, a, b in zip(("dhidden", "dhead", "dbias"), got[2:], truth[2:]):
        if V > 1:  # one class: every gradient is 0, and no error is small relative to 0
            assert_gradient_close(a, b, what, GRAD[dtype])
    assert len(got) == len(truth) and all((g[V:] == 0).all() for g in got[3:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_is_the_slope(path, divergence):
    (x_TD, w_VD, y_TE, v_VE), weight_T = inputs(2, 11, 3, 2, torch.float64, seed=9)
    leaves = [
        t.requires_grad_()
        for t in (x_TD, w_VD, torch.linspace(-1, 1, 11, device=DEVICE, dtype=torch.float64))
    ]

    def total(x_TD, w_VD, b_V):
        return linear_kl(
            x_TD,
            w_VD,
            y_TE,
            v_VE,
            student_bias=b_V,
            divergence=divergence,
            beta=0.25,
            temperature=2.0,
            scale_t2=True,
            weight=weight_T,
            student_softcap=4.0,
            student_logit_scale=0.5,
        ).total

    with running(path, 64):
        assert torch.autograd.gradcheck(total, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "path, divergence",
    [(PATHS[0], "jsd"), *((PATHS[-1], divergence) for divergence in DIVERGENCES)],
)
def test_laws_of_the_softmax(path, divergence):
    """Shifted logits change nothing, permuted ones permute the gradient, gradients sum to 0."""
    tensors, weight_T = inputs(3, 70, 5, 4, torch.float64, seed=10)
    order_V = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias_V = torch.linspace(-2, 2, 70, device=DEVICE, dtype=torch.float64)
    options = dict(divergence=divergence, weight=weight_T)
    with running(path, 64):
        plain = run(linear_kl, tensors, torch.float64, (bias_V, -bias_V), **options)
        shifted = run(linear_kl, tensors, torch.float64, (bias_V + 50, -bias_V - 20), **options)
        permuted = run(
            linear_kl,
            [t[order_V] if len(t) == 70 else t for t in tensors],
            torch.float64,
            (bias_V[order_V], -bias_V[order_V]),
            **options,
        )
    for a, b, c in zip(plain, shifted, permuted, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            c, a[order_V] if len(a.shape) and len(a) == 70 else a, rtol=1e-9, atol=1e-11
        )
    assert plain[4].sum().abs() < 1e-12 and plain[4].abs().sum() > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_were_not_chosen_are_not_computed(path):
    """Their hidden states may hold anything: an ignored prompt costs and changes nothing."""
    tensors, weight_T = inputs(5, 40, 4, 3, torch.float32, seed=11)
    tensors[0][1], tensors[2][3] = torch.nan, torch.inf
    rows_M = torch.tensor([4, 0, 2], device=DEVICE)
    with running(path, 64):
        total, kl_T, dx_TD, dw_VD = run(
            linear_kl, tensors, torch.float32, rows=rows_M, weight=weight_T, workspace_mb=0.001
        )
        alone = run(
            linear_kl,
            [t[rows_M] if len(t) == 5 else t for t in tensors],
            torch.float32,
            weight=weight_T[rows_M],
        )
    torch.testing.assert_close(total, alone[0])
    torch.testing.assert_close(kl_T[rows_M], alone[1])
    torch.testing.assert_close(dx_TD[rows_M], alone[2])
    torch.testing.assert_close(dw_VD, alone[3])
    assert (kl_T[[1, 3]] == 0).all() and (dx_TD[[1, 3]] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_the_loss_of_a_token_does_not_depend_on_its_chunk(path, divergence):
    """To the bit. Whole numbers make the GEMM exact in any order: only the row function is left."""
    tensors, weight_T = inputs(3, 100, 4, 4, torch.float32, seed=12)
    tensors = [(t * 2).round() for t in tensors]
    with running(path, 64):
        whole, again = (
            linear_kl(*tensors, divergence=divergence, weight=weight_T) for _ in range(2)
        )
        cut = linear_kl(*tensors, divergence=divergence, weight=weight_T, workspace_mb=0.001)
    assert whole.kl.equal(cut.kl) and whole.kl.equal(again.kl) and whole.total.equal(again.total)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_have_no_loss_and_no_gradient(path, divergence):  # T1
    (x_TD, w_VD, _, _), _ = inputs(4, 70, 6, 6, torch.float32, seed=1)
    with running(path, 64):
        total, kl_T, dx_TD, dw_VD = run(
            linear_kl, (x_TD, w_VD, x_TD, w_VD), torch.float32, divergence=divergence
        )
    assert max(t.abs().max() for t in (total, kl_T, dx_TD, dw_VD)) < 1e-5


@given(
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.25, 0.75]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=SEEDS,
)
def test_a_divergence_is_never_negative(divergence, beta, scale, seed):  # T1
    (x_TD, *others), _ = inputs(3, 60, 5, 4, torch.float32, seed)
    with running("torch"):
        kl_T = linear_kl(x_TD * scale, *others, divergence=divergence, beta=beta).kl
    assert (kl_T > -1e-5 * max(1.0, scale)).all()


@pytest.mark.parametrize("path", PATHS)
def test_beta_weighs_the_teacher(path):  # T29: conventions differ between libraries
    (x_TD, w_VD, xt_TE, wt_VE), _ = inputs(3, 40, 5, 4, torch.float64, seed=2)
    logp_TV, logq_TV = (x_TD @ w_VD.t()).log_softmax(1), (xt_TE @ wt_VE.t()).log_softmax(1)
    m_TV = 0.2 * logq_TV.exp() + 0.8 * logp_TV.exp()
    jsd_T = (
        0.2 * logq_TV.exp() * (logq_TV - m_TV.log()) + 0.8 * logp_TV.exp() * (logp_TV - m_TV.log())
    ).sum(1)
    skew_T = (logq_TV.exp() * (logq_TV - m_TV.log())).sum(1)
    with running(path, 64):
        torch.testing.assert_close(
            linear_kl(x_TD, w_VD, xt_TE, wt_VE, divergence="jsd", beta=0.2).kl, jsd_T
        )
        torch.testing.assert_close(
            linear_kl(xt_TE, wt_VE, x_TD, w_VD, divergence="jsd", beta=0.8).kl, jsd_T
        )
        torch.testing.assert_close(
            linear_kl(x_TD, w_VD, xt_TE, wt_VE, divergence="skew_forward", beta=0.2).kl, skew_T
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_that_is_not_finite_is_reported_and_left_out(path, divergence):
    (x_TD, w_VD, xt_TE, wt_VE), _ = inputs(4, 30, 3, 3, torch.float32, seed=3)
    xt_TE[1] = float("nan")
    rows = torch.tensor([0, 2, 3], device=DEVICE)
    with running(path, 64):
        _, kl_T, dx_TD, dw_VD = run(
            linear_kl, (x_TD, w_VD, xt_TE, wt_VE), torch.float32, divergence=divergence
        )
        _, chosen_T, dchosen_TD, dw_chosen_VD = run(
            linear_kl, (x_TD[rows], w_VD, xt_TE[rows], wt_VE), torch.float32, divergence=divergence
        )
        without = linear_kl(
            x_TD,
            w_VD,
            xt_TE,
            wt_VE,
            divergence=divergence,
            weight=torch.tensor([1.0, 0, 1, 1], device=DEVICE),
        )
    assert kl_T[1].isnan() and (dx_TD[1] == 0).all()
    torch.testing.assert_close(kl_T[rows], chosen_T)
    torch.testing.assert_close(dx_TD[rows], dchosen_TD)
    torch.testing.assert_close(dw_VD, dw_chosen_VD)
    # weight 0 leaves the row out of the total
    torch.testing.assert_close(without.total, chosen_T.sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "rows_M", [None, torch.arange(0, 300, 2, device=DEVICE)], ids=["all", "rows"]
)
def test_the_full_logits_never_exist(divergence, rows_M):  # T25
    tensors, weight_T = inputs(300, 400, 8, 8, torch.float32, seed=4)
    bias_V = torch.zeros(400, device=DEVICE, requires_grad=True)
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    rows_M = None if rows_M is None else rows_M.to(DEVICE)
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        linear_kl(
            *tensors,
            divergence=divergence,
            weight=weight_T,
            workspace_mb=0.5,
            rows=rows_M,
            student_bias=bias_V,
            teacher_bias=bias_V,
            student_softcap=9.0,
        ).total.backward()
    with pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 400 // 2):
        linear_kl_ref(*tensors)
    large = pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 400 // 2)
    with large[0], large[1], running("torch"):  # a workspace that holds all rows is seen
        linear_kl(*tensors, divergence=divergence)


def test_nothing_waits_for_the_gpu():
    """Fake tensors have no values: reading one (item, nonzero, boolean indexing) raises."""
    tensors, weight_T = inputs(3, 20, 4, 5, torch.float32, seed=13)
    bias_V, rows_M = torch.zeros(20, device=DEVICE), torch.tensor([2, 0], device=DEVICE)
    with running("torch"), FakeTensorMode() as mode:
        x_TD, w_VD, y_TE, v_VE, b_V, weight_T, rows_M = (
            mode.from_tensor(t) for t in (*tensors, bias_V, weight_T, rows_M)
        )
        sides = x_TD, w_VD, b_V, 1.0, 4.0, y_TE, v_VE, b_V, 1.0, 0.0
        for name in DIVERGENCES:
            options = weight_T, rows_M, name, 0.5, 2.0, True, 18, "", 0, 0.0001, True
            _op._init_fn(*sides, *options, True, True, True)


def test_no_gradient_is_made_that_nobody_wants():
    tensors, weight_T = inputs(3, 20, 4, 5, torch.float32, seed=14)
    with running("torch"), torch.profiler.profile() as profile:
        assert not linear_kl(*tensors, weight=weight_T).total.requires_grad
    # the two heads, nothing back
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::mm") == 2


def test_autocast_is_what_a_linear_layer_would_do():
    tensors, weight_T = inputs(3, 40, 8, 6, torch.float32, seed=15)
    bias_V = torch.linspace(-1, 1, 40, device=DEVICE)
    with running("torch"):
        want = run(linear_kl, tensors, torch.bfloat16, (bias_V, bias_V), divergence="jsd")
        with torch.autocast(DEVICE, torch.bfloat16):
            got = run(linear_kl, tensors, torch.float32, (bias_V, bias_V), divergence="jsd")
    for a, b in zip(got, want, strict=True):
        # and the gradient of logits has not been rounded to 16 bits on its way back
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=0, atol=0)


def test_a_tied_head_adds_to_the_gradient_it_has():
    tensors, _ = inputs(3, 20, 4, 5, torch.float32, seed=16)
    w_VD = tensors[1].requires_grad_()
    with running("torch"):
        out = linear_kl(w_VD[:3] * 1.5, w_VD, *tensors[2:])
        same = torch.autograd.grad(linear_kl_ref(w_VD[:3] * 1.5, w_VD, *tensors[2:]).total, w_VD)[0]
        w_VD.grad = torch.ones_like(w_VD)
        out.total.backward()
    torch.testing.assert_close(w_VD.grad, 1 + same)


def test_who_gets_a_gradient():
    (x_TD, w_VD, xt_TE, wt_VE), _ = inputs(3, 20, 4, 4, torch.float32, seed=5)
    tensors = [t.requires_grad_() for t in (x_TD, w_VD, xt_TE, wt_VE)]
    with running("torch"):
        linear_kl(*tensors, frozen_student_head=True).total.backward()
        assert x_TD.grad is not None and all(t.grad is None for t in tensors[1:])
        total = linear_kl(*tensors).total
        total.backward(retain_graph=True)
        assert w_VD.grad is not None and xt_TE.grad is None and wt_VE.grad is None
        first_VD = w_VD.grad.clone()
        total.backward()
        torch.testing.assert_close(w_VD.grad, 2 * first_VD)  # a retained graph goes backward again
        with torch.no_grad():
            assert not linear_kl(*tensors).total.requires_grad


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("full", [False, True])
def test_the_op_keeps_torch_librarys_contract(path, full):
    tensors, weight_T = inputs(3, 20, 4, 5, torch.float32, seed=7)
    x_TD, w_VD, b_V = (t.requires_grad_() for t in (*tensors[:2], torch.zeros(20, device=DEVICE)))
    rows_M = torch.tensor([2, 1], device=DEVICE) if full else None
    sides = x_TD, w_VD, b_V if full else None, 1.0, 0.0, *tensors[2:], None, 1.0, 0.0
    options = weight_T, rows_M, "jsd", 0.5, 2.0, full, 20, "", 0, 1200.0, full
    with running(path, 64):
        torch.library.opcheck(_op, (*sides, *options, True, True, full))


def test_it_compiles_into_a_full_graph():
    tensors, weight_T = inputs(3, 20, 4, 5, torch.float32, seed=8)

    def loss(x_TD, w_VD):
        return linear_kl(x_TD * 2, w_VD, *tensors[2:], divergence="jsd", weight=weight_T).total * 3

    assert_compiles(loss, [t.requires_grad_() for t in tensors[:2]])


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(divergence="kl"), "want one of forward"),
        (dict(divergence="jsd", beta=1.0), "use divergence='forward'"),
        (dict(weight=torch.ones(2, 1, device=DEVICE)), r"want \[T\]"),
        (dict(teacher_head_VE=torch.zeros(6, 3, device=DEVICE)), "pass vocab_size"),
        (dict(teacher_hidden_TE=torch.zeros(3, 3, device=DEVICE)), "3 teacher rows"),
        (dict(temperature=-1.0), "want > 0"),
        (dict(student_logit_scale=-1.0), "logit_scale is -1.0; want > 0"),
        (dict(student_bias=torch.zeros(4, device=DEVICE)), "a head of 5 rows"),
        (dict(rows=torch.ones(2, dtype=torch.bool, device=DEVICE)), "mask.nonzero"),
        (dict(vocab_size=6), "1 <= vocab_size"),
        (dict(student_softcap=0.0), "None for no cap"),
    ],
)
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(
        student_hidden_TD=torch.zeros(2, 4, device=DEVICE),
        student_head_VD=torch.zeros(5, 4, device=DEVICE),
        teacher_hidden_TE=torch.zeros(2, 3, device=DEVICE),
        teacher_head_VE=torch.zeros(5, 3, device=DEVICE),
    )
    with pytest.raises(ValueError, match=match):
        linear_kl(**(args | options))


def test_rows_are_checked_when_debugging(monkeypatch):
    tensors, _ = inputs(3, 20, 4, 5, torch.float32, seed=17)
    monkeypatch.setattr(_triton, "DEBUG", True)
    with running("torch"):
        linear_kl(*tensors, rows=torch.tensor([2, 0], device=DEVICE))
        for wrong, match in (([1, 1], "1 of them twice"), ([0, 3], "rows 0 to 3")):
            with pytest.raises(ValueError, match=match):
                linear_kl(*tensors, rows=torch.tensor(wrong, device=DEVICE))


IMPORTS_ALONE = """
import sys

sys.modules["triton"] = None
import torch

from reflux.kernels.linear_kl import linear_kl

x, w = torch.randn(3, 4), torch.randn(9, 4)
assert linear_kl(x, w, x, w).kl.abs().max() < 1e-6
foreign = ("transformers", "torchtitan", "datasets")
ours = ("reflux.trainer", "reflux.tokenalign")
bad = {m for m in sys.modules if m.split(".")[0] in foreign or m.startswith(ours)}
sys.exit(str(bad) if bad else 0)
"""


def test_the_kernels_import_alone():
    """One function needs torch, and triton or not; nothing else of this project or Hugging Face."""
    subprocess.run([sys.executable, "-c", IMPORTS_ALONE], check=True)
