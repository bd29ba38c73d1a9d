"""Do two sides spell the same bytes? From ids alone, on any device: the check that goes with
`spans.align_batch`.

A text x of bytes x_0 x_1 ... has the polynomial hash

    H(x) = sum_i (x_i + 1) * BASE^i  mod P,        P = 2^31 - 1,

which adds up over tokens: that of a prefix is one gather, one product and one cumsum. Products of
two residues stay below 2^62 and a row of 2^32 of them below 2^63, so int64 is enough. Hashes of
different texts are equal with probability of about (bytes) / P, so a span counts as exact only
while all before it agree. No proof against an adversary; the native core compares the bytes
themselves.

B: rows. N, M: tokens of a padded row on side a, b. V: vocabulary. K: span capacity.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .byte_table import ByteTable

P = 2**31 - 1
BASE = 911_382_323  # any residue of large order does
DIGIT = 11  # bits; BASE^i is a product of three tabled powers, for i < 2^33


@dataclass(frozen=True, eq=False)
class PieceHashes:
    """Hashes of every piece of a table, on a device. Build it once per tokenizer."""

    hash_V: Tensor  # int64, of what each id spells; 0 for ids of no bytes
    rest_V: Tensor  # int64, of the same without its first byte
    lens_V: Tensor  # int64, bytes
    powers: Tensor  # int64 [3, 2^DIGIT], BASE^(i * 2^(DIGIT * row)) mod P

    @classmethod
    def of(cls, table: ByteTable, device: torch.device | str = "cpu") -> "PieceHashes":
        data, begin = table.blob
        lens = table.lens.astype(np.int64)
        powers = np.stack(
            [_powers(pow(BASE, 1 << (DIGIT * row), P), 1 << DIGIT) for row in range(3)]
        )
        place = np.arange(len(data)) - np.repeat(begin[:-1], lens)  # of a byte in its piece
        terms = (data.astype(np.int64) + 1) * _powers(BASE, int(lens.max(initial=0)) + 1)[place] % P
        total = np.concatenate([[0], np.cumsum(terms)])  # below 2^63 for 2^32 bytes of pieces
        hashes = (total[begin[1:]] - total[begin[:-1]]) % P
        first = np.where(lens > 0, table.first_byte.astype(np.int64) + 1, 0)
        rest = (hashes - first) % P * pow(BASE, P - 2, P) % P
        return cls(*(torch.from_numpy(x).to(device) for x in (hashes, rest, lens, powers)))


def prefix_hashes(
    pieces: PieceHashes, ids_BN: Tensor, mask_BN: Tensor, skip_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bytes of each token, and the hash of its row's text up to and with it; int64 [B, N] both.

    ids: any integers; where mask (bool) is False an id is not looked at and spells nothing. skip: 1
    in rows whose first token with bytes starts with a space that belongs to no text
    (offsets.Side.skip). The bytes are what `align_batch` wants. No host sync.
    """
    ids_BN = torch.where(mask_BN, ids_BN, 0).long()
    len_BN = pieces.lens_V[ids_BN] * mask_BN
    hash_BN = pieces.hash_V[ids_BN] * mask_BN
    if skip_B is not None:
        has_bytes_BN = len_BN > 0
        skip_BN = has_bytes_BN & (has_bytes_BN.cumsum(1) == 1) & (skip_B[:, None] > 0)
        hash_BN = torch.where(skip_BN, pieces.rest_V[ids_BN], hash_BN)
        len_BN = len_BN - skip_BN.long()
    start_BN = len_BN.cumsum(1) - len_BN
    for row in range(3):
        digit_BN = start_BN >> (DIGIT * row) & ((1 << DIGIT) - 1)
        hash_BN = hash_BN * pieces.powers[row][digit_BN] % P
    return len_BN, hash_BN.cumsum(1) % P


def exact_spans(
    hash_a_BN: Tensor, span_a_BN: Tensor, hash_b_BM: Tensor, span_b_BM: Tensor
) -> Tensor:
    """bool [B, K], K = min(N, M): the sides spell the same bytes up to the end of span k. False
    past a row's last span.

    hash: from `prefix_hashes`. span: from `align_batch`, -1 outside. No host sync.
    """
    capacity = min(hash_a_BN.shape[1], hash_b_BM.shape[1])
    (end_a_BK, real_BK), (end_b_BK, _) = (
        _at_span_ends(h, s, capacity) for h, s in ((hash_a_BN, span_a_BN), (hash_b_BM, span_b_BM))
    )
    return ((end_a_BK == end_b_BK) & real_BK).long().cumprod(1).bool()


def _at_span_ends(hash_BN: Tensor, span_BN: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The hash at the last token of each span [B, K], and which spans there are."""
    token_BN = torch.arange(hash_BN.shape[1], device=hash_BN.device).expand_as(hash_BN)
    # the last column takes the tokens outside
    last = token_BN.new_full((len(hash_BN), capacity + 1), -1)
    last = last.scatter_reduce(
        1, torch.where(span_BN >= 0, span_BN.long(), capacity), token_BN, "amax"
    )[:, :capacity]
    return (hash_BN.gather(1, last.clamp(min=0)), last >= 0) if capacity else (last, last >= 0)


def _powers(base: int, size: int) -> np.ndarray:
    """base^0 ... base^(size - 1) mod P, int64, by doubling."""
    powers = np.ones(1, np.int64)
    while len(powers) < size:
        powers = np.concatenate([powers, powers * pow(base, len(powers), P) % P])
    return powers[:size]
