"""teacher_sample: the drawn fractions are the teacher's probabilities on average."""

import math

import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.teacher_sample import _op, teacher_sample, teacher_sample_ref

SEEDS = st.integers(0, 2**31 - 1)


def inputs(T, V, seed, D=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(DEVICE, torch.float64) for s in ((T, D), (V, D), (V,))]


def seeded(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


def fractions(drawn, V):
    """exp(logp) at its ids, over the whole vocabulary [T, V]."""
    all_T = torch.zeros(len(drawn.ids), V + 1, dtype=drawn.logp.dtype, device=DEVICE)
    return all_T.scatter_(1, drawn.ids.long() % (V + 1), drawn.logp.exp())[:, :V]


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 4),
    V=st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 256])),
    n=st.integers(1, 20),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_draws_invert_the_distribution_function(
    path, T, V, n, temperature, softcap, workspace_mb, seed
):
    x_TD, w_VD, b_V = inputs(T, V, seed)
    junk = torch.cat([w_VD, torch.full((3, 6), 77.0, device=DEVICE, dtype=torch.float64)])  # T15
    bias = torch.cat([b_V, b_V.new_full((3,), 99.0)])
    options = dict(
        temperature=temperature, softcap=softcap, logit_scale=0.5, vocab_size=V, bias=bias
    )
    with running(path):
        got = teacher_sample(
            x_TD, junk, n, generator=seeded(seed), workspace_mb=workspace_mb, **options
        )
    want = teacher_sample_ref(x_TD, junk, n, generator=seeded(seed), **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_fractions_are_the_probabilities_on_average():
    """400 x 50 draws of one row: every token within 5 standard errors, also of 1e-5 and of none."""
    logits_V = torch.tensor([0.0, 2.0, -torch.inf, 3.0, -9.0, 1.0, -torch.inf], device=DEVICE)
    drawn = teacher_sample(logits_V.expand(400, 7), None, 50, generator=seeded())
    p_V, q_V = logits_V.softmax(0), fractions(drawn, 7).mean(0)
    assert ((q_V - p_V).abs() <= 5 * (p_V * (1 - p_V) / 20_000).sqrt() + 1e-7).all() and (
        q_V[[2, 6]] == 0
    ).all()
    total_T = drawn.logp.exp().sum(1)
    torch.testing.assert_close(total_T, torch.ones_like(total_T))
    assert (drawn.tail == -torch.inf).all()
    assert ((drawn.ids < 0) == (drawn.logp == -torch.inf)).all()


def test_the_ends_of_the_unit_interval_draw_tokens_that_exist():
    logits_TV = torch.full((3, 300), -torch.inf, device=DEVICE)
    logits_TV[0, 130], logits_TV[1, [5, 299]], logits_TV[2, [0, 140]] = 3.0, 0.0, 0.0
    uniform_N = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    source, options = (logits_TV, None, None, 1.0, 0.0), (None, 1.0, 300, "", 0, 1200.0)
    ids, _ = _op(*source, uniform_N.expand(3, 3).contiguous(), *options)
    assert [sorted(set(row) - {-1}) for row in ids.tolist()] == [[130], [5, 299], [0, 140]]


def test_the_loss_has_the_gradient_of_the_full_kl_on_average():
    """The claim of arXiv:2503.16870, which the 4 likeliest tokens fail."""
    (x_TD, w_VD, _), (y_TD, v_VD, _) = inputs(1, 20, 1), inputs(1, 20, 2)
    x_ND, y_ND = x_TD.expand(2000, -1), y_TD.expand(2000, -1)
    w_VD.requires_grad_()
    drawn = teacher_sample(y_ND, v_VD, 12, generator=seeded())
    (got,) = torch.autograd.grad(
        linear_topk_kl(x_ND, w_VD, *drawn, tail="sampled").total / 2000, w_VD
    )
    (want,) = torch.autograd.grad(linear_kl(x_TD, w_VD, y_TD, v_VD).total, w_VD)
    assert (got - want).norm() < 0.02 * want.norm(), f"{(got - want).norm() / want.norm():.3f}"


def test_rows_views_chunks_and_memory():
    x_TD, w_VD, _ = inputs(300, 400, 3)
    rows_M = torch.tensor([7, 2, 250], device=DEVICE)
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        whole = teacher_sample(x_TD, w_VD, 5, generator=seeded(), workspace_mb=0.5)
        got = teacher_sample(x_TD, w_VD, 5, generator=seeded(), rows=rows_M)
    assert torch.equal(got.ids[rows_M], whole.ids[rows_M]) and torch.equal(
        got.logp[rows_M], whole.logp[rows_M]
    )
    assert (got.ids >= 0).any(1).sum() == 3 and (got.logp[0] == -torch.inf).all()
    assert not torch.equal(whole.ids, teacher_sample(x_TD, w_VD, 5, generator=seeded(1)).ids)


def on_slices(x_TD, w_VD, b_V):
    from torch import distributed as dist

    out = []
    for edges in ((0, 150, 300), (0, 290, 300)):
        start, end = edges[dist.get_rank()], edges[dist.get_rank() + 1]
        out.append(
            teacher_sample(
                x_TD,
                w_VD[start:end],
                30,
                bias=b_V[start:end],
                generator=seeded(),
                vocab_size=290,
                workspace_mb=0.001,
                shard=VocabShard(dist.group.WORLD.group_name, start),
            )
        )
    return out


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks")
def test_slices_of_a_vocabulary_draw_what_the_whole_one_draws():
    x_TD, w_VD, b_V = inputs(4, 300, 4)
    whole = teacher_sample(x_TD, w_VD, 30, bias=b_V, generator=seeded(), vocab_size=290)
    for ranks in run_on_ranks(on_slices, x_TD, w_VD, b_V):
        for got in ranks:
            assert torch.equal(got.ids, whole.ids) and torch.equal(got.logp, whole.logp)


def test_the_op_keeps_torch_librarys_contract():
    x_TD, w_VD, b_V = (x.float() for x in inputs(3, 20, 5))
    uniform_TN = torch.rand(3, 4, dtype=torch.float64, device=DEVICE)
    rows_M = torch.tensor([1, 0], device=DEVICE)
    torch.library.opcheck(
        _op, (x_TD, w_VD, b_V, 1.0, 0.0, uniform_TN, rows_M, 1.0, 20, "", 0, 1200.0)
    )


def test_compiles_into_one_graph():
    x_TD, w_VD, _ = (x.float() for x in inputs(3, 20, 6))
    drawn = torch.compile(teacher_sample, fullgraph=True, backend="aot_eager")(x_TD, w_VD, 4)
    total = drawn.logp.exp().sum()
    assert math.isclose(total, 3, rel_tol=1e-6)


def test_no_draws():
    with pytest.raises(ValueError, match="at least 1 draw"):
        teacher_sample(torch.zeros(2, 5, device=DEVICE), None, 0)
