"""Cut two tokenizations of one byte string into the smallest spans that both can spell.

A boundary is a byte position, after the first byte, where a token ends on both sides. Span k holds the bytes between boundary
k - 1 and boundary k; the span of a token is the number of boundaries at or before its *start*. So a token of no bytes goes with
what follows it (at the very end, with the last span). The spans are unique, minimal, and the same with the sides swapped.
Outside every span, -1: masked and control tokens, and tokens past the last boundary when one side is longer.

Three forms, one result: `align_spans_ref` is the definition, `align_spans` the native core (bytes compared on the way),
`align_batch` padded tensors on any device (lengths only). n, m: tokens of a row on side a, b. K: spans. B: rows.
"""
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from os.path import commonprefix

import numpy as np
import torch
from torch import Tensor

from . import _native
from .offsets import Side

THREAD_TOKENS = 65_536  # below this many tokens one thread is faster than starting a second


@dataclass(frozen=True, eq=False)
class Alignment:
    """Two tokenizations of one text, by spans."""

    span_a: np.ndarray  # int32 [n], the span of each token; -1 outside
    span_b: np.ndarray  # int32 [m]
    num_spans: int  # K
    bounds: np.ndarray  # int64 [K], bytes of the source up to the end of each span
    exact: np.ndarray  # bool [K], both sides spell the same bytes in this span and in all before it
    equal_bytes: int  # leading bytes on which the sides agree
    bytes_a: int  # bytes that each side spells; different when one side is longer
    bytes_b: int


def align_spans_ref(pieces_A: list[bytes], pieces_B: list[bytes]) -> tuple[list[int], list[int], int]:
    """The definition: cut two tokenizations of one byte string into the smallest spans both can spell.

    pieces_A[i] is what token i of tokenizer A spells; pieces_B likewise.
    Returns the span of each token, span_A [A] and span_B [B], and the number of spans.
    A token of no bytes (SentencePiece's leading mark, a control token) goes with what follows it.

        bytes    the catalog
        A        the| cat|alog       end_A = 3 7 11    span_A = 0 1 1
        B        the| ca|talog       end_B = 3 6 11    span_B = 0 1 1

    ValueError, with the first differing byte, when the sides spell different texts or no text.
    """
    text_A, text_B = b"".join(pieces_A), b"".join(pieces_B)
    if text_A != text_B or not text_A:
        at = len(commonprefix([text_A, text_B]))
        raise ValueError(
            f"align_spans: the two sides spell different texts, from byte {at} on: "
            f"{text_A[at:at + 8]!r} and {text_B[at:at + 8]!r} (of {len(text_A)} and {len(text_B)} bytes). "
            "Encode the same text on both sides, without special tokens.")
    end_A, end_B = list(accumulate(map(len, pieces_A))), list(accumulate(map(len, pieces_B)))
    edges = sorted(set(end_A) & set(end_B) - {0})

    def span_of(ends: list[int]) -> list[int]:
        return [min(bisect_right(edges, start), len(edges) - 1) for start in [0, *ends[:-1]]]

    return span_of(end_A), span_of(end_B), len(edges)


def align_spans(sides_a: Sequence[Side], sides_b: Sequence[Side], *, threads: int = 0) -> list[Alignment]:
    """Align row i of `sides_a` with row i of `sides_b`, by the native core, with the bytes compared.

    All rows of one argument are of one tokenizer. threads: 0 takes one per core for a batch worth it, else exactly so many; the
    result does not depend on it. Python's lock is free meanwhile.
    Texts that differ are no error here: `equal_bytes` tells where, and the spans from there on are not `exact`.
    ValueError: unequal numbers of rows, mixed tokenizers, threads < 0.
    """
    if len(sides_a) != len(sides_b):
        raise ValueError(f"align_spans: {len(sides_a)} sides a against {len(sides_b)} sides b; want one b for each a.")
    if threads < 0:
        raise ValueError(f"align_spans: threads = {threads}; want 0 (automatic) or more.")
    if not sides_a:
        return []
    a, b = _concatenate(sides_a, "a"), _concatenate(sides_b, "b")
    if not threads:
        threads = (os.cpu_count() or 1) if len(a[2]) + len(b[2]) >= THREAD_TOKENS else 1
    span_a, span_b, bounds, num, equal, bytes_a, bytes_b = _native.align_rows(*a, *b, threads)
    row_a, row_b = a[3], b[3]
    rows = []
    for r, (k, agreed) in enumerate(zip(num.tolist(), equal.tolist(), strict=True)):
        ends = bounds[row_a[r]:row_a[r] + k].copy()
        rows.append(Alignment(
            span_a[row_a[r]:row_a[r + 1]].copy(), span_b[row_b[r]:row_b[r + 1]].copy(), k, ends, ends <= agreed, agreed,
            int(bytes_a[r]), int(bytes_b[r])))
    return rows


def _concatenate(sides: Sequence[Side], name: str) -> tuple[np.ndarray, ...]:
    """The native core's arrays of one side: piece bytes, piece begins, ids, row offsets, skips."""
    table = sides[0].table
    for r, side in enumerate(sides):
        if side.table is not table:
            raise ValueError(f"align_spans: row {r} of sides_{name} has another ByteTable than row 0; build the table once per "
                             "tokenizer and align one pair of tokenizers per call.")
    row = np.cumsum([0, *(len(side.ids) for side in sides)], dtype=np.int64)
    ids = np.concatenate([side.ids for side in sides])
    return *table.blob, ids, row, np.array([side.skip for side in sides], np.int32)


def align_batch(len_a_BN: Tensor, len_b_BM: Tensor, mask_a_BN: Tensor, mask_b_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spans from byte lengths, for padded rows on any device: int64 span_a [B, n], span_b [B, m] and number of spans [B].

    len: bytes of each token (offsets.Side.lens); mask: bool, False is padding or control, anywhere in a row, whatever its length says.
    No loop over rows and no host sync. It does not see the bytes: use it on sides known to reproduce one source.
    Row r is shifted by r * L, L = longest row + 2, so the flattened ends are sorted and one searchsorted serves all rows.
    """
    len_a_BN, len_b_BM = len_a_BN.long() * mask_a_BN, len_b_BM.long() * mask_b_BM
    end_a_BN, end_b_BM = len_a_BN.cumsum(1), len_b_BM.cumsum(1)
    rows = len_a_BN.shape[0]
    if 0 in (len_a_BN.numel(), len_b_BM.numel()):
        return torch.full_like(len_a_BN, -1), torch.full_like(len_b_BM, -1), len_a_BN.new_zeros(rows)
    longest = torch.maximum(end_a_BN[:, -1].max(), end_b_BM[:, -1].max())
    shift_B1 = torch.arange(rows, device=len_a_BN.device)[:, None] * (longest + 2)
    flat_a, flat_b = (end_a_BN + shift_B1).flatten(), (end_b_BM + shift_B1).flatten()

    def ends_on_both(ends: Tensor, others: Tensor, length: Tensor) -> Tensor:
        nearest = torch.searchsorted(others, ends).clamp(max=others.numel() - 1)
        return (others[nearest] == ends).view_as(length) & (length > 0)

    hit_a_BN, hit_b_BM = ends_on_both(flat_a, flat_b, len_a_BN), ends_on_both(flat_b, flat_a, len_b_BM)
    num_B1 = hit_a_BN.sum(1, keepdim=True)
    last_B1 = (end_a_BN * hit_a_BN).amax(1, keepdim=True)

    def spans(hit: Tensor, end: Tensor, mask: Tensor) -> Tensor:
        span = hit.long().cumsum(1) - hit.long()  # boundaries at or before the token's start
        past = torch.where(end[:, -1:] == last_B1, num_B1 - 1, -1)
        return torch.where(mask, torch.where(span == num_B1, past, span), -1)

    return spans(hit_a_BN, end_a_BN, mask_a_BN), spans(hit_b_BM, end_b_BM, mask_b_BM), num_B1[:, 0]
