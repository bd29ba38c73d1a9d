"""The definition: sums to one, chain rule, two tokenizers of one source, what a beam leaves out."""

import itertools

import numpy as np
import pytest
from byte_cases import PIECES, RandomModel
from fixed_point_cases import PAIRS, SOURCE, Conditionals, source_texts
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.byte_trie import END
from reflux.tokenalign.next_byte import next_byte_ref, text_probability

TEXTS = st.text("abé", max_size=3).map(str.encode)


@given(PIECES, TEXTS, st.integers(0, 9))
def test_the_symbols_share_the_prefixs_probability(pieces, text, seed):
    """P(prefix) = P(prefix, end) + sum of P(prefix, byte) + what ids without bytes take."""
    model = RandomModel(pieces, seed)
    here = next_byte_ref(model, model.vocabulary, text)
    assert here.conditional.sum() == pytest.approx(1, abs=1e-12)
    for byte in b"ab\xc3":
        longer = next_byte_ref(model, model.vocabulary, text + bytes([byte]))
        lost = longer.dropped.sum() - here.dropped.sum()
        assert here.mass[byte] == pytest.approx(longer.prefix + lost, abs=1e-12)


@given(PIECES, TEXTS, st.integers(0, 9))
def test_the_chain_rule_gives_the_sum_over_all_spellings(pieces, text, seed):
    model = RandomModel(pieces, seed)
    spellings = 0.0
    for n in range(len(text) + 1):
        for ids in itertools.product(range(model.stop), repeat=n):
            if b"".join(model.pieces[i] for i in ids) == text:
                steps = [model(ids[:t])[i] for t, i in enumerate((*ids, model.stop))]
                spellings += np.prod(steps)
        if len(model.pieces) ** n > 2000:
            return
    assert text_probability(model, model.vocabulary, text) == pytest.approx(spellings, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_two_tokenizers_of_one_source_agree_with_it_at_every_byte(name):
    texts = source_texts(4)
    longest = max(map(len, texts))
    for pieces in PAIRS[name]:
        side = Conditionals(pieces.split(), texts)
        for text in texts:
            for k in range(len(text) + 1):
                got = next_byte_ref(side.conditional, side.vocabulary, text[:k].encode())
                want = np.zeros(257)
                last = "abc".index(text[k - 1]) if k else 3
                want[[*b"abc", END]] = SOURCE[last] if k < longest else [0, 0, 0, 1]
                np.testing.assert_allclose(got.conditional, want, atol=1e-12)
                assert got.missing < 1e-12


def kl(p, q):
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("pieces", ["a b c", "a b c ab", "a b c ab cab"])
def test_with_one_tokenizer_the_bytes_of_a_text_add_up_to_the_token_kl(pieces):
    """Two models that spell in one way: the KLs at its bytes have the expectation of those at its
    tokens, and the first of them is the token KL with tokens summed by their first byte.
    """
    texts = source_texts(3)
    rng = np.random.default_rng(0)
    other = dict(zip(texts, rng.dirichlet(np.ones(len(texts)))))
    q, p = (Conditionals(pieces.split(), x) for x in (texts, other))
    by_token = by_byte = 0.0
    for text, ids in zip(texts, q.ids):
        by_token += texts[text] * sum(
            kl(q.conditional(ids[:t]), p.conditional(ids[:t])) for t in range(len(ids))
        )
        for k in range(len(text) + 1):
            mine, theirs = (
                next_byte_ref(x.conditional, q.vocabulary, text[:k].encode()) for x in (q, p)
            )
            by_byte += texts[text] * kl(mine.conditional, theirs.conditional)
    assert by_byte == pytest.approx(by_token, rel=1e-12) and by_byte > 0.1
    first = next_byte_ref(q.conditional, q.vocabulary, b"").conditional
    for byte in b"abc":
        ids = [i for i, x in enumerate(q.pieces) if x[0] == chr(byte)]
        assert first[byte] == pytest.approx(q.conditional(())[ids].sum(), abs=1e-12)


@given(PIECES, TEXTS, st.integers(0, 9), st.integers(1, 3))
def test_what_a_beam_leaves_out_bounds_its_error(pieces, text, seed, beam):
    model = RandomModel(pieces, seed)
    exact = next_byte_ref(model, model.vocabulary, text)
    got = next_byte_ref(model, model.vocabulary, text, beam=beam)
    distance = np.abs(got.conditional - exact.conditional).sum() / 2
    assert distance <= got.missing + 1e-12
    assert got.prefix <= exact.prefix + 1e-12
    assert exact.prefix <= got.prefix + got.dropped.sum() + 1e-12
