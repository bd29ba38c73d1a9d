"""linear_topk_kl on both paths: float64 parity, the laws that separate the four tails, refusals."""
import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, assert_gradient_close, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels._divergence import MODES
from reflux.kernels._topk_rows import TAILS, topk_rows_
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.linear_topk_kl import _op, linear_topk_kl, linear_topk_kl_ref
from reflux.kernels.teacher_topk import teacher_topk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about -inf - -inf in masked lanes
SEEDS = st.integers(0, 2**31 - 1)
ALLOWED = [(m, t) for m in MODES for t in TAILS if m == "forward" or t in ("ghost", "renorm")]
LOSS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}
GRAD = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1e-2}  # the interpreter truncates bf16


def inputs(T, V, D, dtype, seed):
    """student hidden [T, D] and head [V, D], teacher hidden and head of the same shapes, weight [T]."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((T, D), (V, D), (T, D), (V, D))]
    return tensors, torch.randn(T, generator=g).to(DEVICE)


def run(fn, x_TD, w_VD, teacher, dtype, **options):
    x_TD, w_VD = (t.detach().to(dtype).requires_grad_() for t in (x_TD, w_VD))
    out = fn(x_TD, w_VD, *teacher, **options)
    return out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, (x_TD, w_VD))


@pytest.mark.parametrize("path", PATHS)
@given(T=st.integers(0, 3), V=st.integers(2, 300), D=st.integers(1, 8), K=st.integers(2, 9), case=st.sampled_from(ALLOWED),
       dtype=st.sampled_from(list(LOSS)), temperature=st.sampled_from([0.5, 1.0, 2.0]),
       softcap=st.sampled_from([None, 4.0]), block_v=st.sampled_from([64, 256, 2048]),
       workspace_mb=st.sampled_from([0.001, 1200]), pads=st.booleans(), seed=SEEDS)
def test_values_and_gradients_match_float64(path, T, V, D, K, case, dtype, temperature, softcap, block_v, workspace_mb,
                                            pads, seed):
    (mode, tail), K = case, min(K, V)
    (x_TD, w_VD, *teacher), weight_T = inputs(T, V, D, dtype, seed)
    ids_TK, logp_TK, tail_T = teacher_topk(*(t.double() for t in teacher), K, temperature=temperature)
    if pads and K < V:
        ids_TK[::2, -1] = -1
        ids_TK[1:2] = -1  # a row of nothing but padding
        logp_TK[2:3, 0] = -torch.inf
    logp_TK, tail_T = logp_TK.to(torch.promote_types(dtype, torch.float32)), tail_T.float()
    w_VD = torch.cat([w_VD, torch.full((2, D), 50.0, device=DEVICE, dtype=dtype)])  # junk columns (T15)
    options = dict(mode=mode, tail=tail, beta=0.25, temperature=temperature, softcap=softcap, weight=weight_T,
                   vocab_size=V)
    with running(path, block_v):
        got = run(linear_topk_kl, x_TD, w_VD, (ids_TK, logp_TK, tail_T), dtype, workspace_mb=workspace_mb, **options)
    truth = run(linear_topk_kl_ref, x_TD, w_VD, (ids_TK, logp_TK, tail_T), torch.float64, **options)
    for what, a, b in zip(("total", "kl"), got, truth):
        torch.testing.assert_close(a.double(), b, rtol=LOSS[dtype], atol=LOSS[dtype], msg=lambda m, w=what: f"{w}: {m}")
    for what, a, b in zip(("dhidden", "dhead"), got[2:], truth[2:], strict=True):
        assert_gradient_close(a, b, what, GRAD[dtype])
    assert (got[3][V:] == 0).all() and (not pads or K == V or (got[2][1:2] == 0).all())


@given(mode=st.sampled_from(MODES), V=st.integers(3, 80), seed=SEEDS)
def test_ghost_grows_with_the_support_up_to_the_full_divergence(mode, V, seed):  # T1, T2
    (x_TD, w_VD, *teacher), _ = inputs(3, V, 4, torch.float64, seed)
    with running("torch"):
        full_T = linear_kl(x_TD, w_VD, *teacher, mode=mode).kl
        ghosts = [linear_topk_kl(x_TD, w_VD, *teacher_topk(*teacher, k), mode=mode).kl for k in (1, 1 + V // 2, V)]
    bounds = [torch.zeros_like(full_T), *ghosts, full_T]
    for smaller, larger in zip(bounds, bounds[1:]):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(ghosts[-1], full_T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_forward_ghost_is_renorm_scaled_plus_the_kl_of_the_masses(path):  # T2: D = P C + KL_bern
    (x_TD, w_VD, *teacher), _ = inputs(4, 50, 5, torch.float64, seed=1)
    ids_TK, logp_TK, tail_T = teacher_topk(*teacher, 6)
    with running(path, 64):
        ghost_T, renorm_T = (linear_topk_kl(x_TD, w_VD, ids_TK, logp_TK, tail_T, tail=t).kl for t in ("ghost", "renorm"))
    P_T = logp_TK.exp().sum(1)
    Q_T = (x_TD @ w_VD.t()).softmax(1).gather(1, ids_TK.long()).sum(1)
    bern_T = P_T * (P_T / Q_T).log() + (1 - P_T) * ((1 - P_T) / (1 - Q_T)).log()
    torch.testing.assert_close(ghost_T, P_T * renorm_T + bern_T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", ["ghost", "renorm"])
def test_equal_distributions_have_no_loss_and_no_gradient(path, mode, tail):  # T1
    (x_TD, w_VD, _, _), _ = inputs(3, 60, 5, torch.float64, seed=2)
    with running(path, 64):
        out = run(linear_topk_kl, x_TD, w_VD, teacher_topk(x_TD, w_VD, 5), torch.float64, mode=mode, tail=tail)
    assert max(t.abs().max() for t in out) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_a_rounded_tail_at_the_whole_vocabulary_is_no_tail(path):  # T5: 1 - sum p is 1e-8, not 0, in fp32
    (x_TD, w_VD, *teacher), _ = inputs(2, 20, 4, torch.float64, seed=7)
    ids_TK, logp_TK, _ = teacher_topk(*teacher, 20)
    with running(path, 64):
        kl_T = linear_topk_kl(x_TD, w_VD, ids_TK, logp_TK, torch.full((2,), -18.0, device=DEVICE)).kl
        torch.testing.assert_close(kl_T, linear_kl(x_TD, w_VD, *teacher).kl)


def test_only_the_bucket_notices_mass_leaving_the_support():  # T4: the exploit that `drop` in reverse would reward
    logits_V = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_V[:8] += 3
    one_11, teacher = torch.ones(1, 1, dtype=torch.float64), logits_V[:, None]
    kept = teacher_topk(one_11, teacher, 8)
    values = {"ghost": [], "renorm": []}
    for shift in (0.0, -2.0, -5.0, -20.0):
        student = teacher + shift * torch.isin(torch.arange(200), kept.ids[0].long())[:, None]
        with running("torch"):
            for tail, seen in values.items():
                seen.append(linear_topk_kl(one_11, student, *kept, mode="reverse", tail=tail).kl.item())
    assert values["ghost"] == sorted(values["ghost"]) and values["ghost"][-1] > 0.3
    assert max(values["renorm"]) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_sampled_gradients_average_to_the_full_forward_kl(path):
    """One id drawn from q with weight 1, enumerated with its probability: the mean gradient is exactly the full one."""
    V, D = 12, 4
    (x_1D, w_VD, *teacher), _ = inputs(1, V, D, torch.float64, seed=3)
    q_V = (teacher[0] @ teacher[1].t()).softmax(1)[0]
    ids_V1, logw_V1 = torch.arange(V, device=DEVICE)[:, None], torch.zeros(V, 1, dtype=torch.float64, device=DEVICE)
    with running(path, 64):
        _, _, dx_VD, dw_VD = run(linear_topk_kl, x_1D.expand(V, D).contiguous(), w_VD, (ids_V1, logw_V1), torch.float64,
                                 tail="sampled", weight=q_V)
        _, _, dx_1D, dw_full_VD = run(linear_kl, x_1D, w_VD, teacher, torch.float64)
    torch.testing.assert_close(dx_VD.sum(0, keepdim=True), dx_1D)
    torch.testing.assert_close(dw_VD, dw_full_VD)


@pytest.mark.parametrize("path", PATHS)
def test_a_tiny_tail_keeps_its_gradient(path):
    """log(1 - sum p) in fp32 has nothing left at 1e-9; knocking out the support keeps every digit that matters."""
    z_CV = torch.zeros(1, 100, device=DEVICE)
    z_CV[0, :2] = 25.0
    ids_CK = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    logq_CK = torch.tensor([[0.3, 0.7 - 2e-9]], device=DEVICE).log()
    tail_C = torch.tensor([2e-9], device=DEVICE).log()
    one_C = torch.ones(1, device=DEVICE)
    exact_V = z_CV[0].double().softmax(0)
    with running(path, 32):
        topk_rows_(z_CV, ids_CK, logq_CK, tail_C, one_C, 1.0, "forward", "ghost", 0.5, 0.0, True)
    want = exact_V[2] * (1 - 2e-9 / exact_V[2:].sum())  # p_i - q_tail p_i / p_tail
    assert abs(z_CV[0, 2].item() - want.item()) < 1e-5 * abs(want.item())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tail", TAILS)
def test_banned_tokens_leave_everything_finite(path, tail):  # T16
    g = torch.Generator().manual_seed(4)
    z_CV = torch.randn(2, 50, generator=g).to(DEVICE)
    z_CV[:, 10:40] = -torch.inf
    ids_CK = torch.tensor([[0, 3, -1], [5, 1, 2]], dtype=torch.int32, device=DEVICE)
    logq_CK = torch.tensor([[0.5, 0.3, 0.9], [0.2, 0.2, 0.2]], device=DEVICE).log()
    tail_C = torch.tensor([0.2, 0.4], device=DEVICE).log()
    with running(path, 32):
        kl_C = topk_rows_(z_CV, ids_CK, logq_CK, tail_C, torch.ones(2, device=DEVICE), 1.0, "forward", tail, 0.5, 0.0,
                          True)
    assert kl_C.isfinite().all() and z_CV.isfinite().all()
    assert (z_CV[:, 10:40] == 0).all() and (z_CV.sum(1).abs() < 1e-6).all()


def test_the_full_logits_never_exist():  # T25
    (x_TD, w_VD, *teacher), _ = inputs(300, 400, 8, torch.float32, seed=5)
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        kept = teacher_topk(*teacher, 8, workspace_mb=0.5)
        linear_topk_kl(x_TD.requires_grad_(), w_VD.requires_grad_(), *kept, workspace_mb=0.5).total.backward()


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    (x_TD, w_VD, *teacher), weight_T = inputs(3, 20, 4, torch.float32, seed=6)
    args = (x_TD.requires_grad_(), w_VD.requires_grad_(), *teacher_topk(*teacher, 4), weight_T, "forward", "ghost", 0.5,
            1.0, 20, 0.0, 1200.0, True, True)
    with running(path, 64):
        torch.library.opcheck(_op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("options, match", [
    (dict(tail="tail"), "want one of ghost"),
    (dict(tail="renorm", ids_TK=torch.zeros(2, 1, dtype=torch.int32), teacher_logp_TK=torch.zeros(2, 1)), "K = 1"),
    (dict(tail="drop", mode="reverse"), "use tail='ghost'"),
    (dict(tail="sampled", mode="jsd"), "use tail='ghost'"),
    (dict(teacher_tail_T=None), "teacher_topk returns it"),
    (dict(teacher_tail_T=torch.zeros(3)), r"want \[T\]"),
    (dict(ids_TK=torch.zeros(2, 6, dtype=torch.int32), teacher_logp_TK=torch.zeros(2, 6)), "1 <= K <= V"),
    (dict(teacher_logp_TK=torch.zeros(2, 3)), r"want \[T, K\] both"),
    (dict(teacher_logp_TK=torch.zeros(2, 2).bfloat16()), "want float32"),
    (dict(ids_TK=torch.zeros(2, 2)), "want int32 or int64"),
    (dict(temperature=0.0), "want > 0"),
])
def test_mistakes_say_how_to_fix_them(options, match):
    args = dict(student_hidden_TD=torch.zeros(2, 4), student_head_VD=torch.zeros(5, 4),
                ids_TK=torch.zeros(2, 2, dtype=torch.int32), teacher_logp_TK=torch.zeros(2, 2),
                teacher_tail_T=torch.zeros(2))
    with pytest.raises(ValueError, match=match):
        linear_topk_kl(**(args | options))
    assert linear_topk_kl_ref(**args).kl.shape == (2,)
