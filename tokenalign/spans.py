"""Cut two tokenizations of one byte string into the smallest spans that both can spell.

A boundary is a byte position, after the first byte, where a token ends on both sides. Span k holds
the bytes between boundary k - 1 and boundary k; the span of a token is the number of boundaries at
or before its *start*. So a token of no bytes goes with what follows it (at the very end, with the
last span). The spans are unique, minimal, and the same with the sides swapped. Outside every span,
-1: masked and control tokens, and tokens past the last boundary when one side is longer.

Three forms, one result: `align_spans_ref` is the definition, `align_spans` the native core (bytes
compared on the way), `align_batch` padded tensors on any device (lengths only). n, m: tokens of a
row on side a, b. K: spans. B: rows.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from os.path import commonprefix

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
    num_spans: int  # K
    bounds: np.ndarray  # int64 [K], bytes of the source up to the end of each span
    # bool [K], the span may enter a loss: both sides spell the bytes of the source there (and see
    # after_prompt)
    exact: np.ndarray
    equal_bytes: int  # leading bytes on which the sides agree
    bytes_a: int  # bytes of the source that each side covers; different when one side is longer
    bytes_b: int


def align_spans_ref(
    pieces_A: list[bytes], pieces_B: list[bytes]
) -> tuple[list[int], list[int], int]:
    """The definition: cut two tokenizations of one byte string into the smallest spans both can
    spell.

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
    Texts that differ are no error here. Where both sides reproduce the source the core compares the
    bytes: `equal_bytes` tells where they part, and the spans from there on are not `exact`. A side
    that does not (offsets.side) says which of its tokens touch a change: the spans of these are not
    `exact`, those in between and behind are. ValueError: unequal numbers of rows, mixed tokenizers,
    sides of different sources, threads < 0.
    """
    if len(sides_a) != len(sides_b):
        raise ValueError(
            f"align_spans: {len(sides_a)} sides a against {len(sides_b)} sides b; want one b for "
            "each a."
        )
    if threads < 0:
        raise ValueError(f"align_spans: threads = {threads}; want 0 (automatic) or more.")
    _check_one_table(sides_a, "a"), _check_one_table(sides_b, "b")
    placed = [
        a.ends is not None or b.ends is not None for a, b in zip(sides_a, sides_b, strict=True)
    ]
    rows: list[Alignment | None] = [None] * len(placed)
    for by_ends, align in ((False, _align_ids), (True, _align_ends)):
        which = [r for r, x in enumerate(placed) if x == by_ends]
        if which:
            for r, row in zip(
                which,
                align([sides_a[r] for r in which], [sides_b[r] for r in which], threads),
                strict=True,
            ):
                rows[r] = row
    return rows


def after_prompt(alignment: Alignment, prompt_bytes: int) -> Alignment:
    """The same spans; `exact` only those that start at or after byte `prompt_bytes` of the text, on
    both sides.

    For sides over prompt and completion together: a token that reaches over the seam takes its span
    with it, however many tokens either prompt has.
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


def _threads(asked: int, tokens: int) -> int:
    return asked or ((os.cpu_count() or 1) if tokens >= THREAD_TOKENS else 1)


def _align_ids(sides_a: Sequence[Side], sides_b: Sequence[Side], threads: int) -> list[Alignment]:
    arguments, begins = [], []
    for sides in (sides_a, sides_b):
        ids, begin = _rows([side.ids for side in sides])
        skips = [
            side.skips + at
            for side, at in zip(sides, begin.tolist(), strict=False)
            if side.skip or side.later_skips
        ]
        trim = np.concatenate(skips) if skips else np.empty(0, np.int64)
        arguments += [spelling(sides[0].table, sides[0].surface).native, ids, begin, trim]
        begins.append(begin)
    tokens = sum(int(begin[-1]) for begin in begins)
    return [
        Alignment(span_a, span_b, len(bounds), bounds, bounds <= equal, equal, bytes_a, bytes_b)
        for span_a, span_b, bounds, equal, bytes_a, bytes_b in _unpack(
            _native.align_ids(*arguments, _threads(threads, tokens)), *begins
        )
    ]


def _align_ends(sides_a: Sequence[Side], sides_b: Sequence[Side], threads: int) -> list[Alignment]:
    for a, b in zip(sides_a, sides_b, strict=True):
        if a.source is not None and b.source is not None and a.source != b.source:
            raise ValueError(
                f"align_spans: sides of different sources, {a.source[:32]!r} and "
                f"{b.source[:32]!r}; want both sides over the text of the one that produced it."
            )
    ends = [
        _rows(
            [
                np.where(
                    x.ids >= 0, np.cumsum(x.lens, dtype=np.int64) if x.ends is None else x.ends, -1
                )
                for x in sides
            ]
        )
        for sides in (sides_a, sides_b)
    ]
    begins = [begin for _, begin in ends]
    found = _native.align_ends(
        *ends[0], *ends[1], _threads(threads, sum(int(begin[-1]) for begin in begins))
    )
    rows = []
    for a, b, (span_a, span_b, bounds, _, bytes_a, bytes_b) in zip(
        sides_a, sides_b, _unpack(found, *begins), strict=True
    ):
        exact = np.ones(len(bounds), bool)
        for side, span in ((a, span_a), (b, span_b)):
            touched = span[side.changed] if side.changed is not None else span[:0]
            exact[touched[touched >= 0]] = False
        agreed = int(np.argmin(exact)) if not exact.all() else len(bounds)
        rows.append(
            Alignment(
                span_a,
                span_b,
                len(bounds),
                bounds,
                exact,
                int(bounds[agreed - 1]) if agreed else 0,
                bytes_a,
                bytes_b,
            )
        )
    return rows


def _unpack(found: tuple[np.ndarray, ...], row_a: np.ndarray, row_b: np.ndarray) -> Iterator[tuple]:
    """Row by row, copied: a row kept for later must not keep the batch alive."""
    span_a, span_b, bounds, *each = found
    row_a, row_b = row_a.tolist(), row_b.tolist()
    for r, (num, equal, bytes_a, bytes_b) in enumerate(
        zip(*(x.tolist() for x in each), strict=True)
    ):
        at = row_a[r]
        yield (
            span_a[at : row_a[r + 1]].copy(),
            span_b[row_b[r] : row_b[r + 1]].copy(),
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

    len: bytes of each token (offsets.Side.lens); mask: bool, False is padding or control, anywhere
    in a row, whatever its length says. `kernels.align_spans` under this floor's name: no loop over
    rows and no host sync. It does not see the bytes: use it on sides known to reproduce one source.
    """
    return align_lengths(len_a_BN, len_b_BM, mask_a_BN, mask_b_BM)
