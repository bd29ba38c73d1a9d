"""linear_kl on both paths: values and gradients against float64 autograd, and the laws of a divergence."""
import subprocess
import sys

import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, assert_gradient_close, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels._divergence import MODES
from reflux.kernels.linear_kl import _op, linear_kl, linear_kl_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about -inf - -inf in masked lanes
SEEDS = st.integers(0, 2**31 - 1)
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}
GRAD = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}  # the interpreter truncates bf16


def inputs(T, V, D, E, dtype, seed):
    """student hidden [T, D] and head [V, D], teacher hidden [T, E] and head [V, E], weight [T] with zeros and signs."""
    g = torch.Generator().manual_seed(seed)
    shapes = (T, D), (V, D), (T, E), (V, E)
    weight_T = torch.randn(T, generator=g) * (torch.rand(T, generator=g) > 0.3)
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes], weight_T.to(DEVICE)


def run(fn, tensors, dtype, **options):
    x_TD, w_VD, *teacher = (t.detach().to(dtype) for t in tensors)
    x_TD, w_VD = x_TD.requires_grad_(), w_VD.requires_grad_()
    out = fn(x_TD, w_VD, *teacher, **options)
    assert not out.kl.requires_grad
    return out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, (x_TD, w_VD))


@pytest.mark.parametrize("path", PATHS)
@given(T=st.integers(0, 3), V=st.integers(1, 300), dims=st.tuples(st.integers(1, 8), st.integers(1, 8)),
       dtype=st.sampled_from(list(LOSS)), mode=st.sampled_from(MODES), beta=st.sampled_from([0.25, 0.5, 0.9]),
       temperature=st.sampled_from([0.5, 1.0, 2.0]), softcap=st.sampled_from([None, 4.0]), padded=st.integers(0, 3),
       block_v=st.sampled_from([64, 256, 2048]), workspace_mb=st.sampled_from([0.001, 1200]), seed=SEEDS)
def test_values_and_gradients_match_float64(path, T, V, dims, dtype, mode, beta, temperature, softcap, padded, block_v,
                                            workspace_mb, seed):
    tensors, weight_T = inputs(T, V, *dims, dtype, seed)
    for head in (1, 3):  # junk in padded columns, another on each side (T15)
        junk = torch.full((padded, tensors[head].shape[1]), 33.0 * head, device=DEVICE, dtype=dtype)
        tensors[head] = torch.cat([tensors[head], junk])
    options = dict(mode=mode, beta=beta, temperature=temperature, weight=weight_T, vocab_size=V,
                   student_softcap=softcap, teacher_softcap=softcap)
    with running(path, block_v):
        got = run(linear_kl, tensors, dtype, workspace_mb=workspace_mb, **options)
    truth = run(linear_kl_ref, tensors, torch.float64, **options)
    for what, a, b in zip(("total", "kl"), got, truth):
        torch.testing.assert_close(a.double(), b, rtol=LOSS[dtype], atol=LOSS[dtype], msg=lambda m, w=what: f"{w}: {m}")
    for what, a, b in zip(("dhidden", "dhead"), got[2:], truth[2:], strict=True):
        if V > 1:  # one class: every gradient is 0, and no error is small relative to 0
            assert_gradient_close(a, b, what, GRAD[dtype])
    assert (got[3][V:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_equal_distributions_have_no_loss_and_no_gradient(path, mode):  # T1
    (x_TD, w_VD, _, _), _ = inputs(4, 70, 6, 6, torch.float32, seed=1)
    with running(path, 64):
        total, kl_T, dx_TD, dw_VD = run(linear_kl, (x_TD, w_VD, x_TD, w_VD), torch.float32, mode=mode)
    assert max(t.abs().max() for t in (total, kl_T, dx_TD, dw_VD)) < 1e-5


@given(mode=st.sampled_from(MODES), beta=st.sampled_from([0.25, 0.75]), scale=st.sampled_from([0.1, 1.0, 20.0]),
       seed=SEEDS)
def test_a_divergence_is_never_negative(mode, beta, scale, seed):  # T1
    (x_TD, *rest), _ = inputs(3, 60, 5, 4, torch.float32, seed)
    with running("torch"):
        kl_T = linear_kl(x_TD * scale, *rest, mode=mode, beta=beta).kl
    assert (kl_T > -1e-5 * max(1.0, scale)).all()


@pytest.mark.parametrize("path", PATHS)
def test_beta_weighs_the_teacher(path):  # T29: conventions differ between libraries
    (x_TD, w_VD, xt_TE, wt_VE), _ = inputs(3, 40, 5, 4, torch.float64, seed=2)
    logp_TV, logq_TV = (x_TD @ w_VD.t()).log_softmax(1), (xt_TE @ wt_VE.t()).log_softmax(1)
    m_TV = 0.2 * logq_TV.exp() + 0.8 * logp_TV.exp()
    jsd_T = (0.2 * logq_TV.exp() * (logq_TV - m_TV.log()) + 0.8 * logp_TV.exp() * (logp_TV - m_TV.log())).sum(1)
    skew_T = (logq_TV.exp() * (logq_TV - m_TV.log())).sum(1)
    with running(path, 64):
        torch.testing.assert_close(linear_kl(x_TD, w_VD, xt_TE, wt_VE, mode="jsd", beta=0.2).kl, jsd_T)
        torch.testing.assert_close(linear_kl(xt_TE, wt_VE, x_TD, w_VD, mode="jsd", beta=0.8).kl, jsd_T)
        torch.testing.assert_close(linear_kl(x_TD, w_VD, xt_TE, wt_VE, mode="skew_forward", beta=0.2).kl, skew_T)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite_is_reported_and_left_out(path, mode):
    (x_TD, w_VD, xt_TE, wt_VE), _ = inputs(4, 30, 3, 3, torch.float32, seed=3)
    xt_TE[1] = float("nan")
    rows = torch.tensor([0, 2, 3], device=DEVICE)
    with running(path, 64):
        _, kl_T, dx_TD, dw_VD = run(linear_kl, (x_TD, w_VD, xt_TE, wt_VE), torch.float32, mode=mode)
        _, kept_T, dkept_TD, dw_kept_VD = run(linear_kl, (x_TD[rows], w_VD, xt_TE[rows], wt_VE), torch.float32, mode=mode)
        without = linear_kl(x_TD, w_VD, xt_TE, wt_VE, mode=mode, weight=torch.tensor([1.0, 0, 1, 1], device=DEVICE))
    assert kl_T[1].isnan() and (dx_TD[1] == 0).all()
    torch.testing.assert_close(kl_T[rows], kept_T)
    torch.testing.assert_close(dx_TD[rows], dkept_TD)
    torch.testing.assert_close(dw_VD, dw_kept_VD)
    torch.testing.assert_close(without.total, kept_T.sum())  # weight 0 leaves the row out of the total


def test_the_full_logits_never_exist():  # T25
    tensors, weight_T = inputs(300, 400, 8, 8, torch.float32, seed=4)
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        linear_kl(*tensors, mode="jsd", weight=weight_T, workspace_mb=0.5).total.backward()
    with pytest.raises(AssertionError, match="made"), NoLargeTensor(300 * 400 // 2):
        linear_kl_ref(*tensors)


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
def test_the_op_keeps_torch_librarys_contract(path):
    tensors, weight_T = inputs(3, 20, 4, 5, torch.float32, seed=7)
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    args = (*tensors[:2], None, *tensors[2:], None, weight_T, None, "jsd", 0.5, 1.0, False, 20, 1.0, 1.0, 0.0, 0.0, "", 0,
            1200.0, True, True, False)
    with running(path, 64):  # AOT dispatch is checked below: here it would return the gradients that backward scales
        torch.library.opcheck(_op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_it_compiles_into_a_full_graph():
    tensors, weight_T = inputs(3, 20, 4, 5, torch.float32, seed=8)

    def loss(x_TD, w_VD):
        return linear_kl(x_TD * 2, w_VD, *tensors[2:], mode="jsd", weight=weight_T).total * 3

    x_TD, w_VD = (t.requires_grad_() for t in tensors[:2])
    with running("torch"):
        got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x_TD, w_VD), (x_TD, w_VD))
        want = torch.autograd.grad(loss(x_TD, w_VD), (x_TD, w_VD))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options, match", [
    (dict(mode="kl"), "want one of forward"),
    (dict(mode="jsd", beta=1.0), "use mode='forward'"),
    (dict(weight=torch.ones(2, 1)), r"want \[T\]"),
    (dict(teacher_head_VE=torch.zeros(6, 3)), "pass vocab_size"),
    (dict(teacher_hidden_TE=torch.zeros(3, 3)), "3 teacher rows"),
    (dict(temperature=-1.0), "want > 0"),
])
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(student_hidden_TD=torch.zeros(2, 4), student_head_VD=torch.zeros(5, 4),
                teacher_hidden_TE=torch.zeros(2, 3), teacher_head_VE=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=match):
        linear_kl(**(args | options))


def test_the_kernels_import_alone():
    """Someone who wants one function gets torch and triton, nothing else of this project or of Hugging Face, and
    without triton still gets the PyTorch path."""
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch; from reflux.kernels.linear_kl import linear_kl\n"
            "x, w = torch.randn(3, 4), torch.randn(9, 4)\n"
            "assert linear_kl(x, w, x, w).kl.abs().max() < 1e-6\n"
            "bad = {m for m in sys.modules if m.split('.')[0] in ('transformers', 'torchtitan', 'datasets') "
            "or m.startswith(('reflux.trainer', 'reflux.tokenalign'))}\n"
            "sys.exit(str(bad) if bad else 0)")
    subprocess.run([sys.executable, "-c", code], check=True)
