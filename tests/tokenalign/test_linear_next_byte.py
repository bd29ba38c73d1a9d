"""Fused with the head against the definition on softmax rows: values, gradients, divergences."""

from functools import partial

import pytest
import torch
from byte_cases import PIECES, RandomModel, masses_of, tokens_of, windows_of
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels._divergence import DIVERGENCES, divergence_ref
from reflux.kernels.teacher_topk import TopK
from reflux.tokenalign import linear_next_byte
from reflux.tokenalign.byte_trie import ByteTrie, alphabet
from reflux.tokenalign.byte_windows import byte_windows, next_byte_logprob
from reflux.tokenalign.linear_next_byte import (
    ByteDivergence,
    byte_kl,
    next_bytes,
    next_bytes_of_topk,
    row_masses,
)
from reflux.tokenalign.linear_rows import Linear

D = 4
LETTERS = RandomModel(["a", "b", "c"])
MERGES = RandomModel(["a", "b", "c", "ab", "bca", "cc"])


def heads(model, rows, seed=0, softcap=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=g, dtype=torch.float64).to(dtype)
    head = torch.randn(model.vocabulary.num_rows + 1, D, generator=g, dtype=torch.float64)
    return Linear(hidden, head.to(dtype), softcap, model.vocabulary.num_rows)


def probabilities(m: Linear):
    z = m.hidden_TD @ m.head_VD[: m.vocab_size].T
    return (m.softcap * torch.tanh(z / m.softcap) if m.softcap else z).softmax(1)


@given(PIECES, st.data(), st.sampled_from([None, 2.0]), st.sampled_from([1e-9, 1200]))
def test_masses_and_their_gradients_are_those_of_the_definition(pieces, data, softcap, workspace):
    model = RandomModel(pieces)
    ids = data.draw(st.lists(st.integers(0, model.stop - 1), max_size=6)) + [model.stop]
    w = windows_of(model, [ids, ids[:2]] if len(ids) > 2 else [ids])
    m = heads(model, len(w.ids_R), softcap=softcap)
    m = m._replace(hidden_TD=m.hidden_TD.requires_grad_(), head_VD=m.head_VD.requires_grad_())
    want, got = (
        masses_of(w, model.trie, probabilities(m)),
        row_masses(m, model.trie, w, workspace_mb=workspace),
    )
    g = torch.Generator().manual_seed(1)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    weights = [torch.randn(len(x), generator=g, dtype=torch.float64) for x in want]
    for inputs in (m.hidden_TD, m.head_VD):
        a, b = (
            torch.autograd.grad(
                sum((x * y).sum() for x, y in zip(masses, weights)), inputs, retain_graph=True
            )[0]
            for masses in (got, want)
        )
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def texts_of(*models):
    """The same three texts, the last one cut, in the tokens of each."""
    texts = [(b"abcab", True), (b"", True), (b"bcacc", True), (b"ca", False)]
    return [windows_of(x, [x.cut(*t) for t in texts]) for x in models]


def by_definition(student, teacher, w_s, w_t, symbols, divergence, temperature, max_missing):
    mine, other = (
        next_byte_logprob(w, masses_of(w, model.trie, probabilities(m)), symbols)
        for w, model, m in ((w_s, LETTERS, student), (w_t, MERGES, teacher))
    )
    p, q = ((x.logp_PS / temperature).log_softmax(1) for x in (mine, other))
    kl_P = divergence_ref(p, q, divergence, 0.3)
    used_P = (mine.missing_P <= max_missing) & (other.missing_P <= max_missing)
    return torch.where(used_P, kl_P, 0.0), used_P


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("positions", [1, 8192])
def test_the_divergence_and_its_gradient(divergence, temperature, positions, monkeypatch):
    monkeypatch.setattr(linear_next_byte, "POSITIONS", positions)
    w_s, w_t = texts_of(LETTERS, MERGES)
    assert w_s.byte_P.tolist() == w_t.byte_P.tolist()
    student, teacher = heads(LETTERS, len(w_s.ids_R)), heads(MERGES, len(w_t.ids_R), seed=1)
    student.hidden_TD.requires_grad_(), student.head_VD.requires_grad_()
    symbols = alphabet([LETTERS.trie, MERGES.trie])
    want, used = by_definition(
        student, teacher, w_s, w_t, symbols, divergence, temperature, max_missing=0.4
    )
    assert 0 < used.sum() < len(used)
    targets = next_bytes(teacher, MERGES.trie, w_t, symbols=symbols)
    exact = targets._replace(
        logp_PS=next_byte_logprob(
            w_t, masses_of(w_t, MERGES.trie, probabilities(teacher)), symbols
        ).logp_PS
    )
    torch.testing.assert_close(targets.logp_PS.double(), exact.logp_PS, atol=1e-5, rtol=1e-5)
    how = ByteDivergence(divergence, 0.3, temperature, max_missing=0.4)
    got = byte_kl(student, LETTERS.trie, w_s, exact, how, symbols=symbols)
    assert got.compared_P.tolist() == used.tolist()
    torch.testing.assert_close(got.kl_P, want.detach(), atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(got.total, want.sum(), atol=1e-10, rtol=1e-9)
    for inputs in (student.hidden_TD, student.head_VD):
        a, b = (
            torch.autograd.grad(3 * x, inputs, retain_graph=True)[0]
            for x in (got.total, want.sum())
        )
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_low_precision_is_no_worse_than_its_logits():
    w_s, w_t = texts_of(LETTERS, MERGES)
    wide = heads(LETTERS, len(w_s.ids_R))
    teacher = next_bytes(heads(MERGES, len(w_t.ids_R), seed=1), MERGES.trie, w_t)
    how = ByteDivergence(max_missing=1.0)
    of = partial(byte_kl, trie=LETTERS.trie, windows=w_s, teacher=teacher, how=how)
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        low = wide._replace(hidden_TD=wide.hidden_TD.to(dtype), head_VD=wide.head_VD.to(dtype))
        got, want = of(low), of(wide)
        assert got.total.dtype == torch.float32
        assert abs(got.total - want.total) / want.total < within


def kept(prob_RV, k):
    logp, ids = prob_RV.log().topk(k, 1)
    tail = (1 - logp.exp().sum(1)).clamp(min=1e-300).log()
    return TopK(ids.int(), logp, tail)


def test_the_likeliest_ids_of_a_cache_give_the_same_up_to_what_is_missing():
    w = windows_of(MERGES, [MERGES.cut(b"abcabca"), MERGES.cut(b"ccab", ended=False)])
    prob_RV = probabilities(heads(MERGES, len(w.ids_R)))
    whole = next_byte_logprob(w, masses_of(w, MERGES.trie, prob_RV))
    everything = next_bytes_of_topk(kept(prob_RV, prob_RV.shape[1]), MERGES.trie, w)
    torch.testing.assert_close(everything.logp_PS.double(), whole.logp_PS, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(everything.missing_P, whole.missing_P, atol=1e-12, rtol=1e-9)
    for k in (2, 4):
        got = next_bytes_of_topk(kept(prob_RV, k), MERGES.trie, w)
        distance = (got.logp_PS.exp() - whole.logp_PS.exp()).abs().sum(1) / 2
        assert (got.missing_P >= whole.missing_P - 1e-9).all() and (got.missing_P < 1).any()
        assert (distance <= got.missing_P + 1e-6).all()


def test_a_text_that_a_model_all_but_excludes_has_numbers_and_no_gradient():
    w = windows_of(LETTERS, [LETTERS.cut(b"abc")])
    student = heads(LETTERS, 4)
    student = Linear(torch.full_like(student.hidden_TD, 1e3), student.head_VD, vocab_size=5)
    student.head_VD.requires_grad_()
    targets = next_bytes(heads(LETTERS, 4, seed=1), LETTERS.trie, w)
    got = byte_kl(student, LETTERS.trie, w, targets, ByteDivergence("reverse", max_missing=1.0))
    got.total.backward()
    assert got.kl_P.isfinite().all() and student.head_VD.grad.isfinite().all()


def test_no_text_has_no_loss_and_a_gradient():
    w = byte_windows(LETTERS.trie, tokens_of([]))
    student = heads(LETTERS, 0)
    student.head_VD.requires_grad_()
    targets = next_bytes(student, LETTERS.trie, w)
    got = byte_kl(student, LETTERS.trie, w, targets, ByteDivergence())
    got.total.backward()
    assert got.total == 0 and student.head_VD.grad.abs().max() == 0


def test_what_does_not_fit_is_refused():
    w_s, w_t = texts_of(LETTERS, MERGES)
    student, teacher = heads(LETTERS, len(w_s.ids_R)), heads(MERGES, len(w_t.ids_R))
    with pytest.raises(ValueError, match="want one row per token"):
        row_masses(student, MERGES.trie, w_t)
    short = next_bytes(teacher, MERGES.trie, w_t)
    short = type(short)(*(x[1:] for x in short))
    with pytest.raises(ValueError, match="the same texts on both sides"):
        byte_kl(student, LETTERS.trie, w_s, short, ByteDivergence())


def test_the_trie_is_of_the_heads_rows():
    assert len(ByteTrie.of(MERGES.vocabulary).order_V) == MERGES.vocabulary.num_rows
