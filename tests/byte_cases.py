"""Small token models of which every history has a distribution, and texts of theirs as the flat
tokens of `byte_windows`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from vocab_pairs import longest_first, table_of

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import ByteWindows, RowMasses, Tokens, byte_windows
from reflux.tokenalign.vocab_map import Vocabulary

PIECES = st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=5, unique=True).map(
    lambda more: [b"a", b"b", b"\xc3", b"\xa9", *(x.encode() for x in more if len(x) > 1)]
)


class RandomModel:
    """p(id | history) is random, one for every history; the stop id is the one behind the pieces,
    then one control id.
    """

    def __init__(self, pieces: Sequence[str | bytes], seed: int = 0, spread: float = 1.5):
        self.pieces = [p.encode() if isinstance(p, str) else p for p in pieces]
        self.stop = len(self.pieces)
        self.spread = spread
        self.rng = np.random.default_rng(seed)
        self.known: dict[tuple[int, ...], np.ndarray] = {}
        table = table_of(self.pieces, controls=2)
        self.vocabulary = Vocabulary(table, [self.stop], len(table))
        self.trie = ByteTrie.of(self.vocabulary)

    def __call__(self, history: tuple[int, ...]) -> np.ndarray:
        if history not in self.known:
            z = self.rng.normal(size=self.stop + 2) * self.spread
            self.known[history] = np.exp(z) / np.exp(z).sum()
        return self.known[history]

    def cut(self, text: bytes, ended: bool = True) -> tuple[int, ...]:
        """Longest first, and the stop."""
        latin = [p.decode("latin1") for p in self.pieces]
        return longest_first(text.decode("latin1"), latin) + ((self.stop,) if ended else ())


def tokens_of(ids_M: Sequence[Sequence[int]], space_M: Sequence[bool] | None = None) -> Tokens:
    ids = [i for ids in ids_M for i in ids]
    text = [m for m, ids in enumerate(ids_M) for _ in ids]
    space_M = [False] * len(ids_M) if space_M is None else space_M
    space = [space_M[m] and t == 0 for m, ids in enumerate(ids_M) for t in range(len(ids))]
    ids_R, text_R = (torch.tensor(x, dtype=torch.long) for x in (ids, text))
    return Tokens(ids_R, text_R, torch.tensor(space, dtype=torch.bool))


def rows_of(model: RandomModel, ids_M: Sequence[Sequence[int]]) -> torch.Tensor:
    """[R, V] p(id | history), one row per token."""
    return torch.tensor(np.array([model(tuple(x[:t])) for x in ids_M for t in range(len(x))]))


def masses_of(w: ByteWindows, trie: ByteTrie, prob_RV: torch.Tensor) -> RowMasses:
    """By the definition: sums over ids."""
    in_order_RV = prob_RV[:, trie.order_V]

    def total(row, begin, end):
        place_V = torch.arange(prob_RV.shape[1])
        inside = (place_V >= begin[:, None]) & (place_V < end[:, None])
        return (in_order_RV[row] * inside).sum(1)

    stop = trie.text, trie.text + trie.stop
    rows = torch.arange(len(prob_RV))
    return RowMasses(
        total(w.row_W[w.window_E], w.begin_E, w.end_E),
        total(w.row_W[w.window_X], w.begin_X, w.end_X),
        in_order_RV[:, stop[0] : stop[1]].sum(1),
        in_order_RV[:, stop[1] :].sum(1),
        prob_RV[rows, w.ids_R].log(),
        prob_RV.new_zeros(len(prob_RV)),
    )


def windows_of(model: RandomModel, ids_M, space_M=None) -> ByteWindows:
    return byte_windows(model.trie, tokens_of(ids_M, space_M))
