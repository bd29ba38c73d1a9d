"""Next-byte distributions over the vocabularies of real tokenizers, against sums over all ids."""

import numpy as np
import pytest
import torch
from byte_cases import masses_of, tokens_of
from real_tokenizers import real
from vocab_pairs import table_of

from reflux.tokenalign.byte_trie import END, SYMBOLS, ByteTrie
from reflux.tokenalign.byte_windows import byte_windows, next_byte_logprob
from reflux.tokenalign.linear_next_byte import next_bytes, row_masses
from reflux.tokenalign.linear_rows import Linear
from reflux.tokenalign.vocab_map import Vocabulary

TEXT = "unhappy 12345 😊 to 你好."
CONTROL_LIKE = 3  # ids taken as stop ids, from the end of the table


def by_definition(pieces, ids, prob_RV, at, space):
    """[257] masses of the covers along `ids` at byte `at`, without what is missing."""
    text = b"".join(pieces[i] for i in ids[:-1])
    mass, start, weight = np.zeros(SYMBOLS), 0, 1.0
    stop = len(pieces) - CONTROL_LIKE
    for r, i in enumerate(ids):
        if start > at + space:
            break
        rest = text[start : at + space]
        for v, piece in enumerate(pieces):
            if len(piece) > len(rest) and piece.startswith(rest):
                mass[piece[len(rest)]] += weight * prob_RV[r, v]
        if start == at + space:
            mass[END] += weight * prob_RV[r, stop:].sum()
        weight *= prob_RV[r, i]
        start += len(pieces[i])
    return mass


@pytest.mark.parametrize("name", ["mistral_v1", "tekken", "qwen"])
def test_masses_of_a_real_vocabulary_are_sums_over_its_ids(name):
    one = real(name)
    V = len(one.table)
    vocabulary = Vocabulary(one.table, range(V - CONTROL_LIKE, V))
    trie, pieces = ByteTrie.of(vocabulary), vocabulary.spellings
    content = [i for i in one.encode(TEXT) if i < V - CONTROL_LIKE]
    ids = [*content, V - CONTROL_LIKE]
    raw = one.table.bytes_of(content)
    space = raw == b" " + TEXT.encode()
    assert space or raw == TEXT.encode()
    w = byte_windows(trie, tokens_of([ids], [space]))
    assert bytes(w.byte_P[:-1].tolist()) == TEXT.encode() and w.byte_P[-1] == END
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(len(ids), 6, generator=g), torch.randn(V, 6, generator=g)
    masses = row_masses(Linear(hidden, head), trie, w)
    prob_RV = (hidden @ head.T).double().softmax(1)
    found = next_byte_logprob(w, masses)
    assert (found.logp_PS.exp().sum(1) - 1).abs().max() < 1e-12
    assert ((found.missing_P >= 0) & (found.missing_P <= 1)).all()
    for at in (4, len(TEXT.encode())):
        want = by_definition(pieces, ids, prob_RV.numpy(), at, space)
        missing = float(found.missing_P[at])
        got = found.logp_PS[at].exp().numpy() - missing / SYMBOLS
        np.testing.assert_allclose(got, (1 - missing) * want / want.sum(), atol=2e-6)
    teacher = next_bytes(Linear(hidden, head), trie, w)
    torch.testing.assert_close(teacher.logp_PS.double(), found.logp_PS, atol=1e-4, rtol=1e-5)


def test_the_definition_here_is_that_of_the_small_models():
    """`by_definition` agrees with the masses of `byte_cases` on a vocabulary of bytes."""
    pieces = [b"a", b"b", b"ab", b"", b"", b""]
    g = torch.Generator().manual_seed(0)
    prob_RV = torch.rand(3, 6, generator=g, dtype=torch.float64)
    prob_RV /= prob_RV.sum(1, keepdim=True)
    trie = ByteTrie.of(Vocabulary(table_of(pieces[:3], controls=3), [3, 4, 5]))
    w = byte_windows(trie, tokens_of([[0, 1, 3]]))
    found = next_byte_logprob(w, masses_of(w, trie, prob_RV))
    for at in range(3):
        want = by_definition(pieces, [0, 1, 3], prob_RV.numpy(), at, False)
        missing = float(found.missing_P[at])
        got = found.logp_PS[at].exp().numpy() - missing / SYMBOLS
        np.testing.assert_allclose(got, (1 - missing) * want / want.sum(), atol=1e-12)
