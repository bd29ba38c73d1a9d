"""Cut two tokenizations of one byte string into the smallest spans that both can spell.

A boundary is a byte position, after the first byte, where a token ends on both sides. Span k holds
the bytes between boundary k - 1 and boundary k; the span of a token is the number of boundaries at
or before its *start*. So a token of no bytes goes with what follows it (at the very end, with the
last span). The spans are unique, minimal, and the same with the sides swapped. Outside every span,
-1: masked and control tokens, and tokens past the last boundary when one side is longer.

Three forms, one result: `align_spans_ref` is the definition, `align_spans` the native core (bytes
compared on the way), `align_batch` padded tensors on any device (lengths only).

n, m: tokens of a row on side a, b. S: spans. B: rows.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
from torch import Tensor

from reflux.kernels.align_spans import align_spans as align_lengths

from . import _native
from .offsets import Side, spelling

THREAD_TOKENS = 65_536  # below this many tokens one thread is faster than starting a second


@dataclass(frozen=True, eq=False)
class Alignment:
    """Two tokenizations of one text, by spans."""

    span_a: np.ndarray  # int32 [n], the span of each token; -1 outside
    span_b: np.ndarray  # int32 [m]
    num_spans: int  # S
    bounds: np.ndarray  # int64 [S], bytes of the source up to the end of each span
    # bool [S], both sides spell the bytes of the source, so the span may enter a loss (after_prompt
    # clears more)
    exact: np.ndarray
    equal_bytes: int  # leading bytes on which the sides agree
    bytes_a: int  # bytes of the source that each side covers; different when one side is longer
    bytes_b: int


def align_spans_ref(
    pieces_A: list[bytes], pieces_B: list[bytes]
) -> tuple[list[int], list[int], int]:
    """The definition: the smallest spans of one byte string that both tokenizations can spell.

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
            f"{text_A[at : at + 8]!r} and {text_B[at : at + 8]!r} (of {len(text_A)} and "
            f"{len(text_B)} bytes). Encode the same text on both sides, without special tokens."
        )
    end_A, end_B = list(accumulate(map(len, pieces_A))), list(accumulate(map(len, pieces_B)))
    edges = sorted(set(end_A) & set(end_B) - {0})

    def span_of(ends: list[int]) -> list[int]:
        return [min(bisect_right(edges, start), len(edges) - 1) for start in [0, *ends[:-1]]]

    return span_of(end_A), span_of(end_B), len(edges)


def align_spans(
    sides_a: Sequence[Side], sides_b: Sequence[Side], *, threads: int = 0
) -> list[Alignment]:
    """Align row i of `sides_a` with row i of `sides_b`, by the native core, with the bytes
    compared.

    All rows of one argument are of one tokenizer. threads: 0 takes one per core for a batch worth
    it, else exactly so many; the result does not depend on it. Python's lock is free meanwhile.
    Texts that differ are no error. Where both sides reproduce the source the core compares the
    bytes: `equal_bytes` is where they first differ, and the spans from there on are not `exact`. A
    side that does not (offsets.side) marks the tokens that touch a change: their spans are not
    `exact`, all others are. ValueError: unequal numbers of rows, mixed tokenizers, sides of
    different sources, threads < 0.
    """
    if len(sides_a) != len(sides_b):
        raise ValueError(
            f"align_spans: {len(sides_a)} sides a against {len(sides_b)} sides b; want one b for "
            "each a."
        )
    if threads < 0:
        raise ValueError(f"align_spans: threads = {threads}; want 0 (automatic) or more.")
    _check_one_table(sides_a, "a")
    _check_one_table(sides_b, "b")
    mapped = [
        a.ends is not None or b.ends is not None for a, b in zip(sides_a, sides_b, strict=True)
    ]
    alignments: dict[int, Alignment] = {}
    for by_ends, align in ((False, _align_ids), (True, _align_ends)):
        rows = [r for r, x in enumerate(mapped) if x == by_ends]
        if rows:
            aligned = align([sides_a[r] for r in rows], [sides_b[r] for r in rows], threads)
            alignments.update(zip(rows, aligned, strict=True))
    return [alignments[r] for r in range(len(mapped))]


def after_prompt(alignment: Alignment, prompt_bytes: int) -> Alignment:
    """The same spans, `exact` only where they start at or after byte `prompt_bytes` of the text.

    For sides over prompt and completion together: the span of a token that reaches over the seam is
    not exact, however many tokens either prompt has.
    """
    starts = np.concatenate([[0], alignment.bounds[:-1]])[: alignment.num_spans]
    return replace(alignment, exact=alignment.exact & (starts >= prompt_bytes))


def _check_one_table(sides: Sequence[Side], name: str) -> None:
    for r, side in enumerate(sides):
        if side.table is not sides[0].table or side.surface != sides[0].surface:
            raise ValueError(
                f"align_spans: row {r} of sides_{name} has another ByteTable, or another "
                "`control`, than row 0; build the table once per tokenizer and align one pair of "
                "tokenizers per call."
            )


def _rows(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows behind one another, and int64 [rows + 1], where each begins."""
    return np.concatenate(tokens), np.cumsum([0, *map(len, tokens)], dtype=np.int64)


def _threads(threads: int, tokens: int) -> int:
    return threads or ((os.cpu_count() or 1) if tokens >= THREAD_TOKENS else 1)


def _align_ids(sides_a: Sequence[Side], sides_b: Sequence[Side], threads: int) -> list[Alignment]:
    table_a, ids_a, row_a, trim_a = _core_rows(sides_a)
    table_b, ids_b, row_b, trim_b = _core_rows(sides_b)
    num_threads = _threads(threads, len(ids_a) + len(ids_b))
    output = _native.align_ids(
        table_a, ids_a, row_a, trim_a, table_b, ids_b, row_b, trim_b, num_threads
    )
    return [
        Alignment(
            row.span_a,
            row.span_b,
            len(row.bounds),
            row.bounds,
            row.bounds <= row.equal_bytes,
            row.equal_bytes,
            row.bytes_a,
            row.bytes_b,
        )
        for row in _unpack(output, row_a, row_b)
    ]


def _core_rows(
    sides: Sequence[Side],
) -> tuple[_native.Table, np.ndarray, np.ndarray, np.ndarray]:
    """(table, ids of all rows, where each begins, tokens without their first byte)."""
    ids, begin = _rows([side.ids for side in sides])
    skips = [
        side.skips + at
        for side, at in zip(sides, begin.tolist(), strict=False)
        if side.skip or side.later_skips
    ]
    trim = np.concatenate(skips) if skips else np.empty(0, np.int64)
    return spelling(sides[0].table, sides[0].surface).native, ids, begin, trim


def _align_ends(sides_a: Sequence[Side], sides_b: Sequence[Side], threads: int) -> list[Alignment]:
    for a, b in zip(sides_a, sides_b, strict=True):
        if a.source is not None and b.source is not None and a.source != b.source:
            raise ValueError(
                f"align_spans: sides of different sources, {a.source[:32]!r} and "
                f"{b.source[:32]!r}; want both sides over the text of the one that produced it."
            )
    end_a, row_a = _rows([_ends(side) for side in sides_a])
    end_b, row_b = _rows([_ends(side) for side in sides_b])
    num_threads = _threads(threads, len(end_a) + len(end_b))
    output = _native.align_ends(end_a, row_a, end_b, row_b, num_threads)
    alignments = []
    for a, b, row in zip(sides_a, sides_b, _unpack(output, row_a, row_b), strict=True):
        exact = np.ones(len(row.bounds), bool)
        for side, span in ((a, row.span_a), (b, row.span_b)):
            touched = span[side.changed] if side.changed is not None else span[:0]
            exact[touched[touched >= 0]] = False
        agreed = int(np.argmin(exact)) if not exact.all() else len(exact)
        alignments.append(
            Alignment(
                row.span_a,
                row.span_b,
                len(row.bounds),
                row.bounds,
                exact,
                int(row.bounds[agreed - 1]) if agreed else 0,
                row.bytes_a,
                row.bytes_b,
            )
        )
    return alignments


def _ends(side: Side) -> np.ndarray:
    """int64 [n], bytes of the source up to each token's end; -1 for a token outside every span."""
    ends = np.cumsum(side.lens, dtype=np.int64) if side.ends is None else side.ends
    return np.where(side.ids >= 0, ends, -1)


class _Row(NamedTuple):
    """What the core returns of one row."""

    span_a: np.ndarray
    span_b: np.ndarray
    bounds: np.ndarray
    equal_bytes: int
    bytes_a: int
    bytes_b: int


def _unpack(output: tuple[np.ndarray, ...], row_a: np.ndarray, row_b: np.ndarray) -> Iterator[_Row]:
    """Row by row, copied: a row that is stored must not keep the memory of the batch."""
    span_a, span_b, bounds, *counts = output
    begin_a, begin_b = row_a.tolist(), row_b.tolist()
    per_row = zip(*(x.tolist() for x in counts), strict=True)
    for r, (num, equal, bytes_a, bytes_b) in enumerate(per_row):
        at = begin_a[r]
        yield _Row(
            span_a[at : begin_a[r + 1]].copy(),
            span_b[begin_b[r] : begin_b[r + 1]].copy(),
            bounds[at : at + num].copy(),
            equal,
            bytes_a,
            bytes_b,
        )


def align_batch(
    len_a_BN: Tensor, len_b_BM: Tensor, mask_a_BN: Tensor, mask_b_BM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Spans from byte lengths, for padded rows on any device: int64 span_a [B, n], span_b [B, m]
    and number of spans [B].

    len: bytes of each token (offsets.Side.lens); mask: bool, False for padding and control tokens,
    anywhere in a row, whatever their length. No loop over rows and no host sync
    (`kernels.align_spans`). It does not see the bytes: use it on sides known to reproduce one
    source.
    """
    return align_lengths(len_a_BN, len_b_BM, mask_a_BN, mask_b_BM)
