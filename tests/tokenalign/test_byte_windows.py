"""Windows along a text's own tokens against the definition that follows the same tokens."""

import numpy as np
import pytest
import torch
from byte_cases import PIECES, RandomModel, masses_of, rows_of, tokens_of, windows_of
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.byte_trie import END, SYMBOLS
from reflux.tokenalign.byte_windows import byte_windows, next_byte_logprob
from reflux.tokenalign.next_byte import next_byte_ref


def boundary_before(model, ids, k):
    """Bytes up to the last end of a token that is at most k."""
    ends = np.cumsum([0, *(len(model.pieces[i]) for i in ids if i != model.stop)])
    return int(ends[ends <= k].max())


def check(model, texts, spaces):
    """texts: (ids, ended)."""
    ids_M = [ids for ids, _ in texts]
    w = windows_of(model, ids_M, spaces)
    got = next_byte_logprob(w, masses_of(w, model.trie, rows_of(model, ids_M)))
    p = 0
    for (ids, ended), space in zip(texts, spaces):
        text = b"".join(model.pieces[i] for i in ids if i != model.stop)
        assert w.byte_P[p : p + len(text) - space + ended].tolist() == [
            *text[space:],
            *[END] * ended,
        ]
        for k in range(space, len(text) + ended):
            want = next_byte_ref(model, model.vocabulary, text[:k], path=ids)
            boundary = boundary_before(model, ids, k)
            missing = want.dropped[boundary : k + 1].sum()
            if space and not boundary:  # a space is known to follow, so no control id
                missing -= model(())[model.stop + 1]
            whole = want.prefix + missing
            np.testing.assert_allclose(
                got.logp_PS[p].exp(), (want.mass + missing / SYMBOLS) / whole, atol=1e-12
            )
            assert got.missing_P[p] == pytest.approx(missing / whole, abs=1e-12)
            assert got.prefix_P[p] == pytest.approx(np.log(whole), abs=1e-10)
            p += 1
    assert p == w.positions


@given(PIECES, st.data(), st.integers(0, 9))
def test_windows_are_the_covers_of_the_texts_own_tokens(pieces, data, seed):
    """Any spelling, canonical or not; empty, cut and finished texts side by side."""
    model = RandomModel(pieces, seed)
    ids = st.lists(st.integers(0, model.stop - 1), max_size=5)
    texts = []
    for x, ended in data.draw(st.lists(st.tuples(ids, st.booleans()), min_size=1, max_size=3)):
        if x or ended:
            texts.append(((*x, *[model.stop] * ended), ended))
    if texts:
        check(model, texts, [False] * len(texts))


@pytest.mark.parametrize("seed", range(3))
def test_a_space_that_the_tokenizer_put_in_front_is_given(seed):
    model = RandomModel([" ", "a", "b", " a", "ab", "  b", " ab"], seed)
    texts = [((3, 2, 7), True), ((0, 4, 7), True), ((7,), True), ((5, 1), False)]
    check(model, texts, [True, True, False, True])


def test_at_the_boundaries_of_a_model_that_spells_in_one_way_nothing_is_missing():
    """p(ids) > 0 only for canonical ids: what the windows leave out has no mass."""
    model = RandomModel(["a", "b", "c", "ab", "abc"])
    model.known[()] = np.array([0.2, 0.1, 0.0, 0.3, 0.3, 0.1, 0.0])
    model.known[(0,)] = np.array([0.2, 0.0, 0.3, 0.2, 0.2, 0.1, 0.0])  # "a" is never before "b"
    w = windows_of(model, [(0, 0, 5)])
    got = next_byte_logprob(w, masses_of(w, model.trie, rows_of(model, [(0, 0, 5)])))
    # behind "a": 0.2 p(. | a), and 0.6 of "b" from "ab" and "abc"
    behind_a = got.logp_PS[1].exp()
    assert behind_a[ord("b")] == pytest.approx(0.6 / 0.8)
    assert behind_a[ord("a")] == pytest.approx(0.2 * 0.6 / 0.8)
    assert got.missing_P[0] == 0 and got.missing_P[1] == pytest.approx(0)


def test_rows_of_whole_texts_stand_alone():
    model = RandomModel(["a", "b", "ab", "bb"])
    ids_M = [(0, 1, 4), (4,), (2, 3), (1, 2, 4)]
    whole = windows_of(model, ids_M)
    cut = whole.rows(3, 6)
    alone = windows_of(model, ids_M[1:3])
    for name, a, b in zip(cut._fields, cut, alone):
        same = a == b if isinstance(a, tuple) else torch.equal(a, b)
        assert same, name


def test_symbols_that_one_side_cannot_spell_are_missing():
    model = RandomModel(["a", "b", "c"])
    w = windows_of(model, [(0, 3)])
    masses = masses_of(w, model.trie, rows_of(model, [(0, 3)]))
    without_c = torch.ones(SYMBOLS, dtype=torch.bool)
    without_c[ord("c")] = False
    plain, got = next_byte_logprob(w, masses), next_byte_logprob(w, masses, without_c)
    more = got.missing_P - plain.missing_P
    np.testing.assert_allclose(more, plain.logp_PS[:, ord("c")].exp(), atol=1e-2)
    assert (got.logp_PS.exp().sum(1) - 1).abs().max() < 1e-12


def test_a_control_id_inside_a_text_is_refused():
    model = RandomModel(["a", "b"])
    with pytest.raises(ValueError, match="without bytes inside a text"):
        byte_windows(model.trie, tokens_of([(0, 3, 1)]))
