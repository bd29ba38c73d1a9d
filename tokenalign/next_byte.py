"""The definition: what a token model says of the next byte, given the bytes so far.

A model over tokens gives every byte string a probability, that of all the ways to spell it. A
*cover* of a prefix is a list of tokens that spells it, where the last one may reach beyond its end:

    prefix  un                 covers   un    unit    unhappy    u n    u nit    ...

The covers of a prefix that end before its last byte do not overlap, so the prefix has the sum of
their probabilities (Phan et al., arXiv:2410.09303; Vieira et al., arXiv:2412.03719, 2506.14123):

    P(b_1 .. b_k)              = sum over covers of b_1 .. b_k
    P(x | b_1 .. b_k)          = P(b_1 .. b_k x) / P(b_1 .. b_k)
    P(the end | b_1 .. b_k)    = sum over the spellings of b_1 .. b_k of p(spelling, stop) / P(...)

This file is float64, one model call per history, for tests and audits. A beam bounds the histories
that are followed at each byte; what it drops is added up, never assumed to be nothing.
`byte_windows` follows one list of tokens, for batches on a device.

V: ids of the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .byte_trie import END, SYMBOLS
from .vocab_map import Vocabulary

History = tuple[int, ...]
Conditional = Callable[[History], np.ndarray]  # p(id | history) [V], float64


class NextByte(NamedTuple):
    """Probabilities of the prefix and one symbol more: 256 bytes, and the end at 256."""

    mass: np.ndarray  # [257]
    # [bytes of the prefix + 1] probability of histories that spell so many bytes of the prefix and
    # were not followed, and of ids that are neither text nor stop behind those that were
    dropped: np.ndarray

    @property
    def prefix(self) -> float:
        """P(prefix), without what was dropped: a lower bound."""
        return float(self.mass.sum())

    @property
    def missing(self) -> float:
        """At most this share of P(prefix) was dropped; the distance in total variation between
        `conditional` and the exact distribution is at most as large.
        """
        return float(self.dropped.sum() / max(self.dropped.sum() + self.prefix, 1e-300))

    @property
    def conditional(self) -> np.ndarray:
        """[257] P(symbol | prefix)."""
        return self.mass / self.mass.sum()


def next_byte_ref(
    conditional: Conditional,
    vocabulary: Vocabulary,
    prefix: bytes,
    *,
    beam: int | None = None,
    path: Sequence[int] | None = None,
) -> NextByte:
    """The masses of `prefix` and each symbol, float64.

    beam: histories followed at each byte, the likeliest first; None: all of them, which is exact
    but for `dropped` ids without bytes. path: follow this list of ids alone, and the tokens that
    reach beyond the prefix from one of its ends.
    """
    pieces, stops = vocabulary.spellings, sorted(set(vocabulary.stop_ids))
    control = [i for i in range(len(pieces)) if not pieces[i] and i not in stops]
    mass, dropped = np.zeros(SYMBOLS), np.zeros(len(prefix) + 1)
    reached: list[dict[History, float]] = [{} for _ in range(len(prefix) + 1)]
    reached[0][()] = 1.0
    for at, histories in enumerate(reached):
        followed = sorted(histories, key=histories.__getitem__, reverse=True)[:beam]
        if path is not None:
            followed = [h for h in followed if h == tuple(path[: len(h)])]
        dropped[at] += sum(p for h, p in histories.items() if h not in set(followed))
        rest = prefix[at:]
        for history in followed:
            prob_V = histories[history] * np.asarray(conditional(history), np.float64)
            dropped[at] += prob_V[control].sum()
            if not rest:
                mass[END] += prob_V[stops].sum()
            for i, piece in enumerate(pieces):
                if len(piece) > len(rest) and piece.startswith(rest):
                    mass[piece[len(rest)]] += prob_V[i]
                elif piece and rest.startswith(piece):
                    following = reached[at + len(piece)]
                    longer = (*history, i)
                    following[longer] = following.get(longer, 0.0) + prob_V[i]
    return NextByte(mass, dropped)


def text_probability(
    conditional: Conditional, vocabulary: Vocabulary, text: bytes, *, beam: int | None = None
) -> float:
    """P(text, the end): the sum over the spellings of the text."""
    return float(next_byte_ref(conditional, vocabulary, text, beam=beam).mass[END])
