"""A vocabulary as a trie of bytes, made once: which ids begin with these bytes, and how they go on.

The ids are put in the order of their bytes, so those that begin with one prefix lie side by side:
the mass of a trie node is a difference of two cumulative sums of the softmax in that order. Behind
them come the stop ids, then control and unknown ids.

N: nodes, the root first, by depth and then by bytes. V: ids of the head in use.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .vocab_map import Vocabulary

END = 256  # the symbol behind the 256 bytes: the text ends here
SYMBOLS = 257


class ByteTrie(NamedTuple):
    """Tensors of one device, int64. Node n is a byte string; rows `begin_N[n] : end_N[n]` of
    `order_V` are the ids that begin with it, the first `exact_N[n]` of them spell just that.
    """

    order_V: Tensor  # ids, in the order of their bytes; then stop ids; then all others
    text: int  # ids of text
    stop: int  # stop ids
    begin_N: Tensor
    end_N: Tensor
    exact_N: Tensor
    child_N: Tensor  # first child; those of one node are neighbours, in the order of their bytes
    children_N: Tensor  # how many
    byte_N: Tensor  # last byte of the node; 0 for the root
    key_N: Tensor  # parent * 256 + byte, ascending; -1 for the root
    lens_V: Tensor  # bytes of each id, 0 for stop and control ids
    first_V: Tensor  # where the bytes of each id begin in `bytes`
    bytes: Tensor

    @classmethod
    def of(cls, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> "ByteTrie":
        """ValueError for a lossy table: its ids do not spell their text."""
        table = vocabulary.table
        if table.lossy:
            raise ValueError(
                f"ByteTrie: a table of the lossy family {table.family!r}; its ids do not spell the "
                "bytes of a text, so next-byte probabilities do not exist. Use a model whose "
                "tokenizer keeps every byte (byte-level BPE, SentencePiece with byte_fallback)"
            )
        pieces = vocabulary.spellings
        text = sorted((i for i, p in enumerate(pieces) if p), key=pieces.__getitem__)
        others = set(range(vocabulary.num_rows)) - set(text) - set(vocabulary.stop_ids)
        order_V = np.array([*text, *sorted(set(vocabulary.stop_ids)), *sorted(others)], np.int64)
        lens_V = np.zeros(vocabulary.num_rows, np.int64)
        lens_V[: len(pieces)] = [len(p) for p in pieces]
        first_V = np.concatenate([[0], np.cumsum(lens_V)[:-1]])
        data = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int64)
        nodes = _nodes(data, first_V[text], lens_V[text])

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x, np.int64)).to(device)

        begin, end, exact, child, children, byte, key = map(tensor, nodes)
        return cls(
            tensor(order_V),
            len(text),
            len(set(vocabulary.stop_ids)),
            begin,
            end,
            exact,
            child,
            children,
            byte,
            key,
            tensor(lens_V),
            tensor(first_V),
            tensor(data),
        )

    def children(self, node: Tensor, byte: Tensor) -> Tensor:
        """The child of each node by this byte; -1 where there is none, and for END."""
        key = torch.where(byte < END, node * 256 + byte, self.key_N[-1] + 1)
        at = torch.searchsorted(self.key_N, key).clamp(max=len(self.key_N) - 1)
        return torch.where(self.key_N[at] == key, at, -1)

    def spell(self, ids_T: Tensor) -> Tensor:
        """int64 [B] the bytes of all ids, one after another; stop and control ids spell none."""
        lens_T = self.lens_V[ids_T]
        begin_T = self.first_V[ids_T] - (lens_T.cumsum(0) - lens_T)
        at_B = torch.repeat_interleave(begin_T, lens_T)
        return self.bytes[at_B + torch.arange(len(at_B), device=at_B.device)]


def alphabet(tries: Sequence[ByteTrie]) -> Tensor:
    """bool [257]: bytes that all of these vocabularies can spell, and the end."""
    out = torch.ones(SYMBOLS, dtype=torch.bool, device=tries[0].order_V.device)
    for trie in tries:
        own = torch.zeros_like(out)
        own[trie.byte_N[1:]] = True
        own[END] = bool(trie.stop)
        out &= own
    return out


def _nodes(data: np.ndarray, first: np.ndarray, lens: np.ndarray) -> tuple[np.ndarray, ...]:
    """begin, end, exact, child, children, byte, key of every node, level by level; the tokens are
    sorted by their bytes.
    """
    node = np.zeros(len(lens), np.int64)  # of each token, at the depth reached
    levels = [(np.array([0]), np.array([len(lens)]), np.array([-1]))]
    total, depth = 1, 0
    while (active := np.flatnonzero(lens > depth)).size:
        key = node[active] * 256 + data[first[active] + depth]
        is_new = np.append(True, key[1:] != key[:-1])
        start = np.flatnonzero(is_new)
        last = np.append(start[1:], len(active)) - 1
        node[active] = total + np.cumsum(is_new) - 1
        levels.append((active[start], active[last] + 1, key[start]))
        total, depth = total + len(start), depth + 1
    begin, end, key = (np.concatenate(x) for x in zip(*levels))
    exact = np.bincount(node, minlength=total)
    exact[0] = 0
    parent = key[1:] // 256
    children = np.bincount(parent, minlength=total)
    child = np.searchsorted(parent, np.arange(total)) + 1
    byte = np.where(key < 0, 0, key % 256)
    return begin, end, exact, child, children, byte, key
