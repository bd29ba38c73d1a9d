"""The trie against brute force over the spellings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocab_pairs import table_of, vocabularies

from reflux.tokenalign.byte_table import TEXT, ByteTable
from reflux.tokenalign.byte_trie import END, ByteTrie, alphabet
from reflux.tokenalign.vocab_map import Vocabulary


def strings(trie: ByteTrie) -> list[bytes]:
    """The byte string of every node, by its parent's."""
    out = [b""]
    for key, byte in zip(trie.key_N[1:].tolist(), trie.byte_N[1:].tolist()):
        out.append(out[key // 256] + bytes([byte]))
    return out


@given(vocabularies())
def test_every_node_holds_the_ids_that_begin_with_it(vocabulary):
    trie, spelled = ByteTrie.of(vocabulary), vocabulary.spellings
    nodes = strings(trie)
    assert set(nodes) == {p[:k] for p in spelled if p for k in range(len(p) + 1)}
    assert len(set(nodes)) == len(nodes)
    order = trie.order_V.tolist()
    assert sorted(order) == list(range(vocabulary.num_rows))
    assert set(order[trie.text : trie.text + trie.stop]) == set(vocabulary.stop_ids)
    for node, a, b, exact in zip(
        nodes, trie.begin_N.tolist(), trie.end_N.tolist(), trie.exact_N.tolist()
    ):
        begins = {i for i, p in enumerate(spelled) if p and p.startswith(node)}
        assert set(order[a:b]) == begins and b - a == len(begins)
        assert set(order[a : a + exact]) == {i for i in begins if spelled[i] == node and node}


@given(vocabularies(), st.binary(min_size=1, max_size=3))
def test_children_are_found_by_their_byte_and_only_by_it(vocabulary, extra):
    trie = ByteTrie.of(vocabulary)
    nodes = strings(trie)
    for byte in {*b"ab \xc2\xa9", *extra, END}:
        got = trie.children(torch.arange(len(nodes)), torch.full((len(nodes),), byte)).tolist()
        for node, child in zip(nodes, got):
            longer = node + bytes([byte]) if byte != END else None
            assert (child == -1) == (longer not in nodes)
            assert child == -1 or nodes[child] == longer
    for n, (first, count) in enumerate(zip(trie.child_N.tolist(), trie.children_N.tolist())):
        family = [x for x in nodes if x and x[:-1] == nodes[n]]
        assert nodes[first : first + count] == sorted(family)


@given(vocabularies(), st.data())
def test_ids_spell_their_bytes(vocabulary, data):
    trie = ByteTrie.of(vocabulary)
    ids = data.draw(st.lists(st.integers(0, len(vocabulary.table) - 1), max_size=8))
    want = b"".join(vocabulary.spellings[i] for i in ids)
    assert bytes(trie.spell(torch.tensor(ids, dtype=torch.long)).tolist()) == want


def test_the_alphabet_is_what_all_can_spell():
    tries = [
        ByteTrie.of(Vocabulary(table_of(pieces), [len(pieces)]))
        for pieces in ([b"a", b"bc"], [b"a", b"b", b"d"])
    ]
    assert alphabet(tries).nonzero()[:, 0].tolist() == [ord("a"), ord("b"), END]


def test_a_lossy_table_is_refused_in_words():
    table = ByteTable((b"a", b"<s>"), np.array([TEXT, 1], np.int8), "wordpiece")
    with pytest.raises(ValueError, match="lossy family 'wordpiece'.*byte_fallback"):
        ByteTrie.of(Vocabulary(table, [1]))
