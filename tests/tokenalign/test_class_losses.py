"""Losses against dense definitions and closed-form gradients in float64, and their laws."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from class_loss_cases import dense, f64, gradient, logits_of, probs, topk_of
from hypothesis import given
from hypothesis import strategies as st
from vocab_pairs import table_of, vocabularies

from reflux.kernels._divergence import DIVERGENCES, divergence_ref
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.teacher_topk import TopK, teacher_topk
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import (
    ClassLogProb,
    class_kl,
    class_logprob_of_logits,
    hybrid,
    map_topk,
    partition_index,
    uld,
)
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import OUT, Vocabulary, student_id_of

PARTITIONS = {
    "first_byte": vocab_map.first_byte,
    "common": vocab_map.common,
    "prefix": vocab_map.prefix,
    "projection": Projection.build,
}
SEEDS = st.integers(0, 2**32 - 1)
KIND = st.sampled_from(list(PARTITIONS))
DIVERGENCE = st.sampled_from(DIVERGENCES)
TEMPERATURE = st.sampled_from([0.5, 1.0, 1.7])
TOL = dict(rtol=0, atol=1e-10)
pairs = st.tuples(vocabularies(), vocabularies())


@given(
    pair=pairs,
    kind=KIND,
    divergence=DIVERGENCE,
    temperature=TEMPERATURE,
    beta=st.sampled_from([0.2, 0.7]),
    seed=SEEDS,
)
def test_value_and_gradient_are_those_of_the_dense_definition(
    pair, kind, divergence, temperature, beta, seed
):
    built = PARTITIONS[kind](*pair)
    W_s, W_t = dense(built)
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)

    def log(p):
        return torch.where(p > 0, p.clamp(min=1e-300).log(), -math.inf)

    def definition(z, u):
        logp, logq = log(probs(z, W_s, temperature) @ W_s), log(probs(u, W_t, temperature) @ W_t)
        if (
            divergence in ("reverse", "skew_reverse")
            and (torch.isinf(logq) & ~torch.isinf(logp)).any()
        ):
            return None
        return divergence_ref(logp, logq, divergence, beta)

    got = gradient(
        partial(
            class_kl,
            partition=partition_index(built),
            divergence=divergence,
            beta=beta,
            temperature=temperature,
        ),
        z,
        u,
    )
    if definition(z, u) is None and divergence == "reverse":
        assert torch.isinf(got[0]).all(), "the student has classes that the teacher lacks"
        return
    if definition(z, u) is None:
        return
    want = gradient(definition, z, u)
    torch.testing.assert_close(got[0], want[0], **TOL)
    torch.testing.assert_close(got[1], want[1], **TOL)
    assert (got[0] > -1e-12).all()


@given(pair=pairs, kind=KIND, temperature=TEMPERATURE, seed=SEEDS)
def test_the_closed_form_gradient_of_the_forward_kl(pair, kind, temperature, seed):
    """dL/dz = p - p W (Q / P), over the temperature; one-hot W: p_i (1 - Q_c(i) / P_c(i))."""
    built = PARTITIONS[kind](*pair)
    W_s, W_t = dense(built)
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)
    _, got = gradient(
        partial(class_kl, partition=partition_index(built), temperature=temperature), z, u
    )
    p, Q = probs(z, W_s, temperature), probs(u, W_t, temperature) @ W_t
    P = p @ W_s
    ratio = torch.where(P > 0, Q / P.clamp(min=1e-300), 0.0)
    torch.testing.assert_close(got, (p - p * (ratio @ W_s.T)) / temperature, **TOL)
    torch.testing.assert_close(got.sum(1), torch.zeros(len(z), dtype=f64), **TOL)


@given(
    pair=pairs,
    kind=st.sampled_from(["first_byte", "common", "prefix"]),
    divergence=DIVERGENCE,
    seed=SEEDS,
)
def test_at_rest_when_masses_agree(pair, kind, divergence, seed):
    """Equal class masses: value 0 and gradient 0 in every divergence."""
    built = PARTITIONS[kind](*pair)
    z = logits_of(pair[0], seed)
    P = class_logprob_of_logits(z, partition_index(built).student)
    value, grad = gradient(
        partial(class_kl, partition=partition_index(built), divergence=divergence),
        z,
        ClassLogProb(P),
    )
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12


@given(pair=pairs, divergence=DIVERGENCE, seed=SEEDS)
def test_a_finer_map_never_says_less(pair, divergence, seed):
    """One tokenizer on both sides: first byte <= prefix <= the full KL, data processing."""
    z, u = logits_of(pair[0], seed), logits_of(pair[0], seed + 1)
    values = []
    for kind in ("first_byte", "prefix"):
        # built against another vocabulary, so it is coarse
        index = partition_index(PARTITIONS[kind](*pair)).student
        logp, logq = (class_logprob_of_logits(x, index) for x in (z, u))
        values.append(divergence_ref(logp, logq, divergence, 0.3))
    inside = torch.from_numpy(np.arange(pair[0].num_rows) < len(pair[0].table))
    logp, logq = (x[:, inside].log_softmax(1) for x in (z, u))
    values.append(divergence_ref(logp, logq, divergence, 0.3))
    assert (values[0] <= values[1] + 1e-12).all() and (values[1] <= values[2] + 1e-12).all()


def test_the_same_vocabulary_without_duplicates_gives_the_full_kl():
    table = table_of([b"a", b"b", b"ab", b"ba"], controls=1)
    v = Vocabulary(table)
    z, u = logits_of(v, 0), logits_of(v, 1)
    full = divergence_ref(z.log_softmax(1), u.log_softmax(1), "forward", 0.5)
    for kind in ("common", "prefix"):
        torch.testing.assert_close(
            class_kl(z, u, partition_index(PARTITIONS[kind](v, v))), full, **TOL
        )


@given(pair=pairs, kind=KIND, seed=SEEDS)
def test_padding_rows_and_banned_ids_change_nothing(pair, kind, seed):
    built = PARTITIONS[kind](*pair)
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)
    loss = partial(class_kl, partition=partition_index(built))
    value, grad = gradient(loss, z, u)
    shifted, other = z.clone(), u.clone()
    shifted[:, len(pair[0].table) :] = 1e4
    other[:, len(pair[1].table) :] = -math.inf
    moved, moved_grad = gradient(loss, shifted, other)
    assert torch.equal(value, moved) and torch.equal(grad, moved_grad)
    assert not grad[:, len(pair[0].table) :].any()


def test_banned_ids():
    """A logit of -inf is a mass of 0. A class all banned is infinite only where q has mass."""
    table = table_of([b"a", b"a", b"b", b"c"], controls=0)
    partition = partition_index(PARTITIONS["first_byte"](Vocabulary(table), Vocabulary(table)))
    z = torch.tensor(
        [[0.0, -math.inf, 1.0, 2.0], [0.0, 0.5, -math.inf, 2.0], [0.0, 0.5, -math.inf, 2.0]],
        dtype=f64,
    )
    u = torch.tensor(
        [[0.3, 0.1, 1.0, -1.0], [0.3, 0.1, 1.0, -1.0], [0.3, 0.1, -math.inf, -1.0]], dtype=f64
    )
    value, _ = gradient(partial(class_kl, partition=partition), z, u)
    assert value[[0, 2]].isfinite().all() and value[1] == math.inf
    _, grad = gradient(partial(class_kl, partition=partition), z[[0, 2]], u[[0, 2]])
    assert grad.isfinite().all() and grad[0, 1] == 0 and grad[1, 2] == 0


def test_a_class_of_vanishing_mass_keeps_its_gradient():
    """In fp32 a probability of e^-200 is 0, and its logit would have no gradient."""
    table = table_of([b"a", b"b"], controls=0)
    partition = partition_index(PARTITIONS["first_byte"](Vocabulary(table), Vocabulary(table)))
    value, grad = gradient(
        partial(class_kl, partition=partition),
        torch.tensor([[0.0, -200.0]]),
        torch.tensor([[0.0, 0.0]]),
    )
    assert value.item() == pytest.approx(100 - math.log(2), rel=1e-6) and grad[
        0
    ].tolist() == pytest.approx([0.5, -0.5])


@given(pair=pairs, kind=KIND, seed=SEEDS)
def test_fp32_and_bf16_are_close_to_fp64(pair, kind, seed):
    partition = partition_index(PARTITIONS[kind](*pair))
    z, u = logits_of(pair[0], seed).bfloat16(), logits_of(pair[1], seed + 1).bfloat16()
    want, want_grad = gradient(partial(class_kl, partition=partition), z.double(), u.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        got, grad = gradient(partial(class_kl, partition=partition), z.to(dtype), u.to(dtype))
        assert got.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), want_grad, rtol=tolerance, atol=tolerance)


def test_the_partial_kl_is_no_divergence():
    """It goes below zero and pushes every unmatched token down by p_i Q_C at agreement."""
    z = torch.tensor([0.4, 0.4, 0.2], dtype=f64).log().requires_grad_()
    q = torch.tensor([0.2, 0.2, 0.6], dtype=f64)
    partial_kl = (q[:2] * (q[:2].log() - z.softmax(0)[:2].log())).sum()
    (grad,) = torch.autograd.grad(partial_kl, z)
    assert partial_kl < 0 and grad[2].item() == pytest.approx(0.2 * 0.4)
    table = table_of([b"a", b"b", b"c"], controls=0)
    other = table_of([b"a", b"b", b"d"], controls=0)
    partition = partition_index(PARTITIONS["common"](Vocabulary(table), Vocabulary(other)))
    value, grad = gradient(
        partial(class_kl, partition=partition),
        torch.tensor([[0.2, 0.2, 0.6]], dtype=f64).log(),
        q.log()[None],
    )
    assert abs(value.item()) < 1e-15 and grad.abs().max() < 1e-15


def test_a_first_piece_projection_is_infinite_and_the_real_one_is_not():
    student, teacher = (
        Vocabulary(table_of([b"a", b"b"], 0)),
        Vocabulary(table_of([b"a", b"b", b"ab"], 0)),
    )
    z, u = logits_of(student, 0), logits_of(teacher, 1)
    first_pieces = torch.eye(2, 3, dtype=f64)  # a -> a, b -> b, none -> ab
    p_hat = z.softmax(1) @ first_pieces
    assert torch.isinf(divergence_ref(p_hat.log(), u.log_softmax(1), "forward", 0.5)).all()
    assert class_kl(z, u, partition_index(Projection.build(student, teacher))).isfinite().all()


@given(
    pair=pairs,
    kind=st.sampled_from(["common", "projection"]),
    divergence=DIVERGENCE,
    temperature=TEMPERATURE,
    seed=SEEDS,
)
def test_a_top_k_teacher_grows_to_the_whole_one(pair, kind, divergence, temperature, seed):
    """Refinement: D over {top-k classes, tail bucket} rises with k to the whole loss."""
    built = PARTITIONS[kind](*pair)
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)[:, : len(pair[1].table)]
    u = torch.nn.functional.pad(u, (0, pair[1].num_rows - u.shape[1]), value=-math.inf)
    loss = partial(
        class_kl, partition=partition_index(built), divergence=divergence, temperature=temperature
    )
    several = (
        np.bincount(built.teacher_class[built.teacher_class != OUT], minlength=built.num_classes)
        > 1
    )
    # the uncommon ids are in the tail bucket, whether in the top k or not
    several[built.num_classes - 1] &= kind == "projection"
    distinct = not several.any()  # otherwise the mass of one class arrives in two parts
    before = torch.zeros(len(z), dtype=f64)
    for k in (1, 3, len(pair[1].table)):
        value = loss(z, topk_of(u, k, temperature))
        assert (value >= -1e-12).all()
        assert not distinct or (value >= before - 1e-12).all()
        before = value
    torch.testing.assert_close(before, loss(z, u), rtol=1e-9, atol=1e-10)


@given(pair=pairs, k=st.integers(1, 5), seed=SEEDS)
def test_the_projection_of_a_top_k_teacher_in_closed_form(pair, k, seed):
    """Tail term tau log(tau / (1 - sum_A p_hat)).

    y_i gains tau p_i (1 - sum_A W_it) / (1 - sum_A p_hat).
    """
    built = Projection.build(*pair)
    W, W_t = dense(built)
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)
    u[:, len(pair[1].table) :] = -math.inf
    top = topk_of(u, k)
    value, grad = gradient(partial(class_kl, partition=partition_index(built)), z, top)
    p = probs(z, W)
    for s in range(len(z)):
        A = sorted({int(c) for c in built.teacher_class[top.ids[s].numpy()]})
        q = torch.zeros(built.num_classes, dtype=f64).index_add(
            0,
            torch.from_numpy(built.teacher_class[top.ids[s].numpy()].astype(np.int64)),
            top.logp[s].exp(),
        )
        tau, p_hat = top.tail[s].exp(), p[s] @ W
        inside = W[:, A].sum(1)
        tail = (p[s] * (1 - inside)).sum()
        if tau < 1e-12 or (inside - 1).abs().max() < 1e-12 and tail < 1e-12:
            continue
        want = (q[A] * (q[A] / p_hat[A]).log()).sum() + tau * (tau / tail).log()
        y = p[s] * (W[:, A] @ (q[A] / p_hat[A])) + tau * p[s] * (1 - inside) / tail
        y = torch.where(torch.from_numpy(np.arange(len(y)) < len(pair[0].table)), y, 0.0)
        torch.testing.assert_close(value[s], want, **TOL)
        torch.testing.assert_close(grad[s], p[s] - y, **TOL)


@given(pair=pairs, k=st.integers(1, 6), divergence=DIVERGENCE, seed=SEEDS)
def test_mapped_ids_give_the_row_form(pair, k, divergence, seed):
    """map_topk + linear_topk_kl = class_kl with a top-k teacher, where no spelling is double."""
    v_s, v_t = pair
    z, u = logits_of(v_s, seed)[:, : len(v_s.table)], logits_of(v_t, seed + 1)[:, : len(v_t.table)]
    v_s, v_t = (Vocabulary(v.table, v.stop_ids) for v in pair)
    if any(len(set(v.table.pieces)) < len(v.table) for v in pair):
        return
    top = topk_of(u, k)
    mapped = map_topk(top, torch.from_numpy(student_id_of(v_s, v_t)))
    total_mass = torch.where(mapped.ids >= 0, mapped.logp.exp(), 0).sum(1) + mapped.tail.exp()
    torch.testing.assert_close(total_mass, torch.ones(len(z), dtype=f64), **TOL)
    hidden, head = z.clone().requires_grad_(), torch.eye(z.shape[1], dtype=f64)
    ids, logp = mapped.ids[:, : z.shape[1]], mapped.logp[:, : z.shape[1]]
    if (mapped.ids >= 0).sum(1).max() != (ids >= 0).sum(1).max():
        return
    fused = linear_topk_kl(
        hidden, head, ids, logp, mapped.tail, divergence=divergence, frozen_student_head=True
    )
    fused.total.backward()
    want, grad = gradient(
        partial(
            class_kl, partition=partition_index(vocab_map.common(v_s, v_t)), divergence=divergence
        ),
        z,
        top,
    )
    torch.testing.assert_close(fused.kl, want, **TOL)
    torch.testing.assert_close(hidden.grad, grad, **TOL)


def test_a_tail_of_banned_ids():
    """All ids outside the top k are banned on both sides: the tail has no mass and gives no NaN."""
    v = Vocabulary(table_of([b"a", b"b", b"c"], 0))
    z = torch.tensor([[0.3, 1.0, -math.inf]], dtype=f64)
    top = topk_of(torch.tensor([[0.0, 0.5, -math.inf]], dtype=f64), 2)
    value, grad = gradient(
        partial(class_kl, partition=partition_index(vocab_map.common(v, v))), z, top
    )
    p, q = z.softmax(1), torch.cat([top.logp.exp().flip(1), torch.zeros(1, 1, dtype=f64)], 1)
    torch.testing.assert_close(grad, p - q, **TOL)
    assert value.isfinite().all()


def test_map_topk_with_padding_and_ids_outside_the_table():
    top = TopK(
        torch.tensor([[3, 1, -1], [0, 2, 9]], dtype=torch.int32),
        torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -math.inf, -3.0]]),
        torch.tensor([-3.0, -math.inf]),
    )
    got = map_topk(top, torch.tensor([5, OUT, 6, 7], dtype=torch.int32))
    assert got.ids.tolist() == [[7, -1, -1], [5, -1, -1]]
    want = [math.log(math.exp(-2) + math.exp(0.0) + math.exp(-3)), -3.0]
    assert got.tail.tolist() == pytest.approx(want)


def test_teacher_topk_plugs_in():
    pair = Vocabulary(table_of([b"a", b"b", b"ab"])), Vocabulary(table_of([b"b", b"a", b"ba"]))
    partition, u = partition_index(vocab_map.common(*pair)), logits_of(pair[1], 1)
    top = teacher_topk(u, torch.eye(4, dtype=f64), 3)
    assert (
        class_kl(logits_of(pair[0], 0), top, partition)
        <= class_kl(logits_of(pair[0], 0), u, partition) + 1e-12
    ).all()


@pytest.mark.parametrize("kind", ["first_byte", "prefix"])
def test_a_top_k_list_is_refused_where_it_bounds_a_class_only_from_below(kind):
    v = Vocabulary(table_of([b"a", b"ab", b"b"]))
    partition, z, u = partition_index(PARTITIONS[kind](v, v)), logits_of(v, 0), logits_of(v, 1)
    with pytest.raises(ValueError, match="store its class masses before truncation"):
        class_kl(z, topk_of(u, 2), partition)
    stored = ClassLogProb(class_logprob_of_logits(u, partition.teacher))
    torch.testing.assert_close(class_kl(z, stored, partition), class_kl(z, u, partition), **TOL)


def test_the_teacher_gets_no_gradient():
    v = Vocabulary(table_of([b"a", b"b"]))
    partition, z, u = (
        partition_index(vocab_map.common(v, v)),
        logits_of(v, 0).requires_grad_(),
        logits_of(v, 1).requires_grad_(),
    )
    (class_kl(z, u, partition) + hybrid(z, u, partition) + uld(z, u)).sum().backward()
    assert z.grad is not None and u.grad is None


def test_what_people_get_wrong():
    v = Vocabulary(table_of([b"a", b"b"]))
    partition, z = partition_index(vocab_map.prefix(v, v)), logits_of(v, 0)
    with pytest.raises(ValueError, match=r"logits are \[3, 4\] for a partition of 3 ids"):
        class_kl(torch.nn.functional.pad(z, (0, 1)), z, partition)
    with pytest.raises(ValueError, match="temperature = 0"):
        class_kl(z, z, partition, temperature=0)
    with pytest.raises(ValueError, match="divergence is 'fkl'"):
        class_kl(z, z, partition, divergence="fkl")
    with pytest.raises(ValueError, match=r"class masses are \[2, 257\]"):
        class_kl(z, ClassLogProb(torch.zeros(2, 257)), partition)
    with pytest.raises(ValueError, match="want vocab_map.common"):
        hybrid(z, z, partition)
