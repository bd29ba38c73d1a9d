"""ULD and hybrid: closed-form gradients in float64, and what each of them cannot see."""

import math
from functools import partial

import numpy as np
import torch
from class_loss_cases import dense, gradient, logits_of, probs, topk_of
from hypothesis import given
from hypothesis import strategies as st
from vocab_pairs import table_of, vocabularies

from reflux.kernels._divergence import DIVERGENCES
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import class_kl, hybrid, partition_index, uld
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Vocabulary

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
f64 = torch.float64
pairs = st.tuples(vocabularies(), vocabularies())


@given(V=st.integers(1, 9), W=st.integers(1, 9), temperature=TEMPERATURE, seed=SEEDS)
def test_uld_and_its_closed_form_gradient(V, W, temperature, seed):
    rng = np.random.default_rng(seed)
    z, u = torch.from_numpy(rng.normal(size=(3, V))), torch.from_numpy(rng.normal(size=(3, W)))
    value, grad = gradient(partial(uld, temperature=temperature), z, u)
    p, q = (z / temperature).softmax(1), (u / temperature).softmax(1)
    n = max(V, W)
    ps, order = torch.nn.functional.pad(p, (0, n - V)).sort(dim=1, descending=True, stable=True)
    qs = torch.nn.functional.pad(q, (0, n - W)).sort(1, descending=True).values
    s = torch.zeros(3, n, dtype=f64).scatter(1, order, (ps - qs).sign())[:, :V]
    torch.testing.assert_close(value, (ps - qs).abs().sum(1), **TOL)
    torch.testing.assert_close(grad, p * (s - (p * s).sum(1, keepdim=True)) / temperature, **TOL)
    assert (value >= 0).all() and (value <= 2).all()


@given(V=st.integers(2, 9), seed=SEEDS)
def test_uld_is_blind_to_identity(V, seed):
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(size=(2, V)))
    shuffled = z[:, torch.from_numpy(rng.permutation(V))]
    assert uld(shuffled, z).abs().max() < 1e-12


def test_uld_at_ties_and_with_banned_ids():
    """Equal probabilities of p and q give no gradient; banned ids pad the shorter side."""
    z = torch.tensor([[0.5, 0.5, -1.0, -math.inf]], dtype=f64)
    value, grad = gradient(uld, z, z[:, [2, 0, 1]])
    assert value.item() == 0 and not grad.any()
    value, grad = gradient(uld, z, torch.tensor([[0.0, 1.0, -math.inf]], dtype=f64))
    assert (
        value > 0 and grad.isfinite().all() and grad[0, 3] == 0 and abs(grad.sum().item()) < 1e-15
    )


@given(V=st.integers(1, 9), W=st.integers(1, 9), seed=SEEDS)
def test_uld_of_a_top_k_teacher_is_a_rising_bound(V, W, seed):
    rng = np.random.default_rng(seed)
    z, u = torch.from_numpy(rng.normal(size=(3, V))), torch.from_numpy(rng.normal(size=(3, W)))
    full, before = uld(z, u), torch.zeros(3, dtype=f64)
    for k in range(1, W + 1):
        value = uld(z, topk_of(u, k))
        assert (value >= before - 1e-12).all() and (value <= full + 1e-12).all()
        before = value
    if W >= V:
        torch.testing.assert_close(before, full, **TOL)


@given(pair=pairs, temperature=TEMPERATURE, seed=SEEDS)
def test_hybrid_is_its_two_parts_and_its_gradient_is_closed(pair, temperature, seed):
    built = vocab_map.common(*pair)
    W_s, W_t = dense(built)
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)
    loss = partial(hybrid, partition=partition_index(built), temperature=temperature)
    value, grad = gradient(loss, z, u)
    matched, matched_grad = gradient(
        partial(class_kl, partition=partition_index(built), temperature=temperature), z, u
    )
    mine, theirs = W_s[:, -1] == 1, W_t[:, -1] == 1
    inner, inner_grad = gradient(partial(uld, temperature=temperature), z[:, mine], u[:, theirs])
    Q = (probs(u, W_t, temperature) @ W_t)[:, -1]
    torch.testing.assert_close(value, matched + Q * inner, **TOL)
    matched_grad[:, mine] += Q[:, None] * inner_grad
    torch.testing.assert_close(grad, matched_grad, **TOL)


@given(pair=pairs, seed=SEEDS)
def test_hybrid_is_zero_at_agreement(pair, seed):
    """Equal logits of one vocabulary, partitioned against another: the tail bucket has ids."""
    built = vocab_map.common(*pair)
    same = partition_index(
        vocab_map.Partition(
            "common",
            built.student_class,
            built.student_class,
            built.num_classes,
            built.control_class,
            "",
            "",
        )
    )
    z = logits_of(pair[0], seed)
    value, grad = gradient(partial(hybrid, partition=same), z, z)
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12
    apart = hybrid(logits_of(pair[0], seed + 1), z, same)
    assert (apart > 1e-6).all()


def test_hybrid_with_an_empty_tail_bucket():
    v = Vocabulary(table_of([b"a", b"b"], 0))
    partition, z, u = partition_index(vocab_map.common(v, v)), logits_of(v, 0), logits_of(v, 1)
    torch.testing.assert_close(hybrid(z, u, partition), class_kl(z, u, partition), **TOL)


def test_hybrid_with_the_tail_bucket_banned_on_both_sides():
    v = Vocabulary(table_of([b"a", b"b"], 2))
    partition = partition_index(vocab_map.common(v, v))
    z = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]], dtype=f64)
    value, grad = gradient(partial(hybrid, partition=partition), z, z.flip(1).roll(2, 1))
    assert value.isfinite().all() and grad.isfinite().all()
    one_left, other = (
        torch.tensor([[0.0, 1.0, 0.5, -math.inf]], dtype=f64),
        torch.tensor([[0.0, 1.0, 0.5, 0.5]], dtype=f64),
    )
    # inside the tail bucket the student is (1, 0) and the teacher (1/2, 1/2): distance 1
    Q = other.softmax(1)[0, 2:].sum()
    torch.testing.assert_close(
        hybrid(one_left, other, partition) - class_kl(one_left, other, partition), Q[None], **TOL
    )
