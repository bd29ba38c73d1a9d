"""Metrics on cases that a hand can compute, and chunk by chunk = at once in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.diagnosis import metrics
from reflux.trainer.diagnosis.metrics import (
    GradedLogProb,
    by_decile,
    effective_samples,
    kl_profile,
    off_nucleus,
    slope,
    smallest_k,
    sparsity,
    tail_noise_index,
    top_overlap,
    wrong_trace_preference,
)
from reflux.trainer.losses import HeadInputs
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.generate import _truncate


def outputs(logits_TV, softcap=None):
    """HeadInputs whose logits are given: the head is the identity."""
    logits_TV = torch.as_tensor(logits_TV, dtype=torch.float64)
    return HeadInputs(
        logits_TV, torch.eye(logits_TV.shape[1], dtype=torch.float64), softcap, logits_TV.shape[1]
    )


def random_pair(T, V, seed, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return [outputs(scale * torch.randn(T, V, generator=g, dtype=torch.float64)) for _ in range(2)]


def kl_by_definition(p_V, q_V, divergence):
    w_V, o_V = (q_V, p_V) if divergence == "forward" else (p_V, q_V)
    return w_V * (w_V.log() - o_V.log())


@given(
    T=st.integers(0, 4),
    V=st.integers(2, 40),
    divergence=st.sampled_from(["forward", "reverse"]),
    seed=st.integers(0, 9999),
)
def test_the_profile_is_the_definition(T, V, divergence, seed):
    student, teacher = random_pair(T, V, seed)
    types_V, bands_V = torch.arange(V) % 3, torch.arange(V) // 7
    got = kl_profile(student, teacher, divergence, types_V, 3, bands_V, 6)
    assert (
        got.k[-1] == V
        and len(got.kl_T) == T
        and got.band_TM.shape == got.band_at_10_TM.shape == (T, 6)
    )
    for t in range(T):
        p_V, q_V = student.hidden_TD[t].softmax(0), teacher.hidden_TD[t].softmax(0)
        term_V = kl_by_definition(p_V, q_V, divergence)
        weight_V = q_V if divergence == "forward" else p_V
        logits_V = student.hidden_TD[t].clone().requires_grad_()
        kl_by_definition(logits_V.softmax(0), q_V, divergence).sum().backward()
        rank_V = weight_V.argsort(descending=True, stable=True)
        assert got.kl_T[t] == pytest.approx(float(term_V.sum()))
        for i, k in enumerate(got.k):
            head, tail = rank_V[:k], rank_V[k:]
            bucket = 0.0
            if len(tail):
                o_V = p_V if divergence == "forward" else q_V
                bucket = float(
                    weight_V[tail].sum() * (weight_V[tail].sum() / o_V[tail].sum()).log()
                )
            assert got.raw_TK[t, i] == pytest.approx(float(term_V[head].sum()), abs=1e-12)
            assert got.bucket_TK[t, i] == pytest.approx(
                float(term_V[head].sum()) + bucket, abs=1e-12
            )
            size_V = logits_V.grad.abs()
            assert got.gradient_tail_TK[t, i] == pytest.approx(
                float(size_V[tail].sum() / size_V.sum()), abs=1e-9
            )
        for n in range(3):
            assert got.type_TN[t, n] == pytest.approx(float(term_V[types_V == n].sum()), abs=1e-12)
            first = [v for v in rank_V[:10].tolist() if v % 3 == n]
            assert got.type_at_10_TN[t, n] == pytest.approx(float(term_V[first].sum()), abs=1e-12)
        for m in range(6):
            assert got.band_TM[t, m] == pytest.approx(float(term_V[bands_V == m].sum()), abs=1e-12)
            first = [v for v in rank_V[:10].tolist() if v // 7 == m]
            assert got.band_at_10_TM[t, m] == pytest.approx(float(term_V[first].sum()), abs=1e-12)


@given(divergence=st.sampled_from(["forward", "reverse"]), seed=st.integers(0, 9999))
def test_the_bucket_curve_rises_to_the_full_kl(divergence, seed):
    got = kl_profile(*random_pair(3, 300, seed), divergence, torch.zeros(300), 1)
    steps = got.bucket_TK.diff(dim=1)
    assert (got.bucket_TK >= -1e-12).all() and (steps >= -1e-12).all()
    torch.testing.assert_close(got.bucket_TK[:, -1], got.kl_T)
    torch.testing.assert_close(got.raw_TK[:, -1], got.kl_T)
    assert (got.gradient_tail_TK[:, -1].abs() < 1e-12).all()


def test_chunks_change_nothing(monkeypatch):
    pair = random_pair(7, 50, 1)
    whole = kl_profile(*pair, "reverse", torch.zeros(50), 1)
    monkeypatch.setattr(metrics, "CHUNK_MIB", 2 * 50 * 8 / 2**20)  # two rows
    parts = kl_profile(*pair, "reverse", torch.zeros(50), 1)
    for name in ("kl_T", "raw_TK", "bucket_TK", "gradient_tail_TK", "type_TN"):
        torch.testing.assert_close(
            getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12
        )


def test_banned_tokens_and_equal_models_give_numbers():
    p = [[0.0, 1.0, -math.inf, 2.0]]
    for divergence in ("forward", "reverse"):
        same = kl_profile(outputs(p), outputs(p), divergence, torch.zeros(4), 1)
        assert same.kl_T[0] == 0 and same.gradient_tail_TK.isfinite().all()


def test_other_divergences_are_an_error():
    with pytest.raises(ValueError, match="want 'forward' or 'reverse'"):
        kl_profile(*random_pair(1, 3, 0), "jsd", torch.zeros(3), 1)


def test_a_softcap_is_part_of_the_logits():
    z, u = torch.tensor([[9.0, -9.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    capped = kl_profile(outputs(z, softcap=2.0), outputs(u), "forward", torch.zeros(3), 1)
    plain = kl_profile(
        outputs(2 * torch.tanh(z.double() / 2)), outputs(u), "forward", torch.zeros(3), 1
    )
    torch.testing.assert_close(capped.kl_T, plain.kl_T)


def test_two_tokens_by_hand():
    """Teacher (0.9, 0.1), student (0.5, 0.5): forward KL = 0.9 ln 1.8 + 0.1 ln 0.2."""
    got = kl_profile(
        outputs([[0.0, 0.0]]),
        outputs([[math.log(0.9), math.log(0.1)]]),
        "forward",
        torch.tensor([0, 1]),
        2,
    )
    first, second = 0.9 * math.log(1.8), 0.1 * math.log(0.2)
    assert got.kl_T[0] == pytest.approx(first + second) and got.k == (1, 2)
    assert got.raw_TK[0].tolist() == pytest.approx([first, first + second])
    # a bucket of one class is that class
    assert got.bucket_TK[0].tolist() == pytest.approx([first + second] * 2)
    assert got.gradient_tail_TK[0].tolist() == pytest.approx([0.5, 0.0])  # both gradients are 0.4
    assert got.type_TN[0].tolist() == pytest.approx([first, second])


def test_curve_index_and_sparsity():
    assert smallest_k([0.5, 0.94, 0.96, 1.0], (1, 2, 5, 10), 0.95) == 5
    assert smallest_k([0.0, 0.0], (1, 2), 0.95) == 1
    # the noisy type holds 1/2 of the KL over all classes and 1/4 in the first ten: twice as much
    assert tail_noise_index(
        np.array([5.0, 5.0]), np.array([1.0, 3.0]), np.array([0.3, 0.7]), [0]
    ) == pytest.approx(2.0)
    assert math.isnan(
        tail_noise_index(np.array([1.0, 1.0]), np.array([0.0, 3.0]), np.array([0.3, 0.7]), [0])
    )
    assert (
        sparsity([8, 1, 1, 0]) == 0.25
        and sparsity([1, 1, 1, 1, 1]) == 0.8
        and math.isnan(sparsity([0.0]))
    )


def test_effective_samples():
    assert effective_samples([-5.0] * 7) == pytest.approx(1.0)
    assert effective_samples([0.0, -1e9, -math.inf, -1e9]) == pytest.approx(0.25)
    # weights 1 and 3
    assert effective_samples([1000.0, 1000.0 + math.log(3)]) == pytest.approx(16 / (2 * 10))
    assert math.isnan(effective_samples([])) and math.isnan(effective_samples([-math.inf]))


def test_deciles_and_slope():
    got = by_decile([1.0, 3.0, 5.0], [0, 5, 99], 100)
    assert got[0] == 2.0 and got[9] == 5.0 and np.isnan(got[1:9]).all()
    assert (
        slope(got) == pytest.approx(3.0)
        and slope([1.0] * 10) == pytest.approx(0.0)
        and math.isnan(slope([np.nan, 1.0]))
    )


def test_wrong_trace_preference_by_hand():
    # wrong: -0.5 a byte, correct: -1
    texts = [
        GradedLogProb(0, True, -10.0, -5.0, 10),
        GradedLogProb(0, False, -5.0, -7.0, 10),
        # correct preferred; lengths far apart
        GradedLogProb(1, True, -1.0, -5.0, 10),
        GradedLogProb(1, False, -40.0, -20.0, 20),
        GradedLogProb(2, False, -3.0, -1.0, 10),
        GradedLogProb(3, True, -1.0, -1.0, 1),
    ]
    got = wrong_trace_preference(texts)
    assert got.pair == {0: 1.0, 1: 0.0} and got.matched_pair == {0: 1.0}
    assert got.margin == pytest.approx({0: 0.5, 1: -1.9})
    assert got.pull == pytest.approx({0: 0.2, 1: -1.0, 2: -0.2})
    assert got.length_gap == pytest.approx(1.5)
    tie = wrong_trace_preference(
        [GradedLogProb(0, True, -1.0, 0.0, 1), GradedLogProb(0, False, -2.0, 0.0, 2)]
    )
    assert tie.pair == {0: 0.5}
    nothing = wrong_trace_preference([])
    assert nothing.pair == {} and math.isnan(nothing.length_gap)


def test_top_overlap_by_hand():
    p, q = [[3.0, 2.0, 1.0, 0.0]], [[0.0, 2.0, 3.0, 1.0]]  # tops of two: {0, 1} and {2, 1}
    got = top_overlap(outputs(p), outputs(q), 2)
    mass = torch.tensor(q[0], dtype=torch.float64).softmax(0)
    assert got.overlap_T.tolist() == [0.5] and got.teachable_T[0] == pytest.approx(
        float(mass[0] + mass[1])
    )
    assert got.entropy_gap_T[0] == pytest.approx(0.0, abs=1e-12)  # the same four masses
    sure = top_overlap(outputs([[0.0, 0.0]]), outputs([[50.0, 0.0]]), 9)
    assert sure.overlap_T.tolist() == [1.0] and sure.entropy_gap_T[0] == pytest.approx(-math.log(2))


def test_the_nucleus_by_hand():
    """Masses 0.6, 0.3, 0.1: top-p 0.6 keeps the first only, 0.61 and 0.9 two, 0.95 all three."""
    out, targets = (
        outputs(torch.tensor([[0.1, 0.6, 0.3]]).log().repeat(3, 1)),
        torch.tensor([0, 1, 2]),
    )
    assert off_nucleus(out, targets, 0.59).tolist() == [True, False, True]
    assert (
        off_nucleus(out, targets, 0.61).tolist()
        == off_nucleus(out, targets, 0.89).tolist()
        == [True, False, False]
    )
    assert off_nucleus(out, targets, 0.95).tolist() == [False] * 3
    uniform = outputs(torch.zeros(4, 4))  # equal masses: the smaller id comes first
    assert off_nucleus(uniform, torch.arange(4), 0.5).tolist() == [False, False, True, True]
    assert off_nucleus(out._replace(hidden_TD=out.hidden_TD[:0]), targets[:0]).tolist() == []


@given(top_p=st.floats(0.05, 0.999), seed=st.integers(0, 9999))
def test_the_nucleus_is_what_the_sampler_keeps(top_p, seed):
    out = random_pair(12, 12, seed)[0]
    nucleus_TV = _truncate(out.hidden_TD, Sampling(1, top_p=top_p)) > -math.inf
    for v in range(12):
        assert (off_nucleus(out, torch.full((12,), v), top_p) == ~nucleus_TV[:, v]).all()


def test_chunks_of_the_nucleus_change_nothing(monkeypatch):
    out = random_pair(7, 50, 1)[0]
    targets = torch.where(torch.arange(7) % 3 == 0, torch.arange(7), out.hidden_TD.argmax(1))
    whole = off_nucleus(out, targets, 0.8)
    monkeypatch.setattr(metrics, "CHUNK_MIB", 2 * 50 * 8 / 2**20)  # two rows
    assert (
        whole.any()
        and not whole.all()
        and off_nucleus(out, targets, 0.8).tolist() == whole.tolist()
    )
