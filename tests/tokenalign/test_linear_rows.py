"""The chunked driver gives the values and gradients of the losses on whole logits."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocab_pairs import table_of

from reflux.kernels._divergence import divergence_ref
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.teacher_topk import teacher_topk
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import (
    ClassLogProb,
    class_kl,
    class_logprob_of_logits,
    hybrid,
    partition_index,
    uld,
)
from reflux.tokenalign.linear_rows import Linear, linear_rows
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Vocabulary

f64 = torch.float64
STUDENT = Vocabulary(table_of([b"a", b"b", b" ", b"ab", b"ba", b"a "]), (6,))
TEACHER = Vocabulary(table_of([b"b", b"a", b" ", b"ab", b"bb"]), (5,))
COMMON, PREFIX = (
    partition_index(f(STUDENT, TEACHER)) for f in (vocab_map.common, vocab_map.prefix)
)
LOSSES = {
    "common": partial(class_kl, partition=COMMON),
    "prefix": partial(class_kl, partition=PREFIX, divergence="jsd", temperature=1.7),
    "projection": partial(
        class_kl,
        partition=partition_index(Projection.build(STUDENT, TEACHER)),
        divergence="skew_forward",
    ),
    "uld": partial(uld, temperature=0.8),
    "hybrid": partial(hybrid, partition=COMMON),
}


def case(T=5, D=3, E=4, seed=0, dtype=f64, pad=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=f64).to(dtype)

    student = Linear(draw(T, D).requires_grad_(), draw(7 + pad, D).requires_grad_(), vocab_size=7)
    return (
        student,
        Linear(draw(T, E), draw(6 + pad, E), vocab_size=6),
        torch.randn(T, generator=g, dtype=f64),
    )


def logits(x):
    z = x.hidden_TD @ x.head_VD[: x.vocab_size].T
    return x.softcap * torch.tanh(z / x.softcap) if x.softcap else z


@pytest.mark.parametrize("name", LOSSES)
@given(
    T=st.integers(1, 9),
    seed=st.integers(0, 99),
    workspace=st.sampled_from([1e-9, 0.002, 100.0]),
    caps=st.sampled_from([(None, None), (2.0, 1.5)]),
)
def test_chunks_give_what_whole_logits_give(name, T, seed, workspace, caps):
    student, teacher, weight = case(T, seed=seed, pad=2)
    student, teacher = student._replace(softcap=caps[0]), teacher._replace(softcap=caps[1])
    got = linear_rows(LOSSES[name], student, teacher, weight=weight, workspace_mb=workspace)
    want = LOSSES[name](logits(student), logits(teacher))
    torch.testing.assert_close(got.kl, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.total, (weight * want).sum(), rtol=0, atol=1e-10)
    leaves = (student.hidden_TD, student.head_VD)
    for a, b in zip(
        torch.autograd.grad(3 * got.total, leaves),
        torch.autograd.grad((3 * weight * want).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_top_k_and_stored_teachers_are_cut_with_the_rows():
    student, teacher, weight = case(6)
    for rows in (
        teacher_topk(teacher.hidden_TD, teacher.head_VD, 3),
        ClassLogProb(class_logprob_of_logits(logits(teacher), COMMON.teacher)),
    ):
        got = linear_rows(LOSSES["common"], student, rows, workspace_mb=1e-9)
        torch.testing.assert_close(got.kl, LOSSES["common"](logits(student), rows).detach())


def test_agrees_with_linear_kl_on_one_vocabulary():
    student, _, weight = case(5)
    other, _, _ = case(5, seed=1)
    want = linear_kl(*student[:2], *other[:2], divergence="reverse", weight=weight)

    def token_kl(z, u):
        return divergence_ref(z.log_softmax(1), u.log_softmax(1), "reverse", 0.5)

    got = linear_rows(token_kl, student, Linear(other.hidden_TD, other.head_VD), weight=weight)
    torch.testing.assert_close(got.total, want.total)
    leaves = (student.hidden_TD, student.head_VD)
    for a, b in zip(
        torch.autograd.grad(got.total, leaves), torch.autograd.grad(want.total, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_row_that_is_not_finite_teaches_nothing_and_stays_visible():
    student, teacher, _ = case(4)

    def infinite(z, u):
        return LOSSES["common"](z, u) * torch.tensor([1, math.inf, math.nan, 1])

    got = linear_rows(infinite, student, teacher)
    assert got.kl[1] == math.inf and got.kl[2].isnan()
    (grad,) = torch.autograd.grad(got.total, student.hidden_TD)
    assert not grad[1:3].any() and grad[[0, 3]].any(1).all() and grad.isfinite().all()


def test_a_weight_of_zero_leaves_its_row_out():
    student, teacher, _ = case(3)

    def bad(z, u):
        return LOSSES["common"](z, u) * torch.tensor([1.0, math.inf, 1.0])

    weight = torch.tensor([1.0, 0.0, 2.0])
    got = linear_rows(bad, student, teacher, weight=weight)
    assert got.total.isfinite() and all(
        g.isfinite().all() for g in torch.autograd.grad(got.total, student[:2])
    )


def test_a_frozen_head_gets_no_gradient():
    student, teacher, _ = case(3)
    linear_rows(LOSSES["uld"], student, teacher, frozen_student_head=True).total.backward()
    assert student.hidden_TD.grad is not None and student.head_VD.grad is None
    with torch.no_grad():
        assert not linear_rows(LOSSES["uld"], student, teacher).total.requires_grad


def test_half_precision_heads_and_no_rows():
    student, teacher, _ = case(4, dtype=torch.bfloat16)
    got = linear_rows(LOSSES["common"], student, teacher)
    got.total.backward()
    assert got.kl.dtype == torch.float32 and student.head_VD.grad.dtype == torch.bfloat16
    wide = [
        x._replace(hidden_TD=x.hidden_TD.detach().double(), head_VD=x.head_VD.detach().double())
        for x in (student, teacher)
    ]
    torch.testing.assert_close(
        got.kl.double(), LOSSES["common"](*map(logits, wide)), rtol=1e-5, atol=1e-5
    )
    student, teacher, _ = case(0)
    assert linear_rows(LOSSES["common"], student, teacher).total.item() == 0


def test_anything_with_the_four_fields_is_a_model():
    student, teacher, _ = case(3)
    outputs = [SimpleNamespace(**x._asdict()) for x in (student, teacher)]
    assert (
        linear_rows(LOSSES["uld"], *outputs).total
        == linear_rows(LOSSES["uld"], student, teacher).total
    )


def test_what_people_get_wrong():
    student, teacher, weight = case(3)
    with pytest.raises(ValueError, match=r"3 student rows and \[2\] teacher rows"):
        linear_rows(LOSSES["uld"], student, teacher._replace(hidden_TD=teacher.hidden_TD[:2]))
    with pytest.raises(ValueError, match=r"weight is \[2\] for 3 rows"):
        linear_rows(LOSSES["uld"], student, teacher, weight=weight[:2])
    with pytest.raises(ValueError, match="for a partition of 7 ids"):
        linear_rows(LOSSES["common"], student._replace(vocab_size=5), teacher)
