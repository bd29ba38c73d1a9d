"""Aligned positions: where two models with different tokenizers have read the same bytes, and can
be compared token by token.

Inside a span of several tokens the contexts differ, so distributions are compared at span starts,
and behind the text, where both can stop. Left out:

    spans that are not exact
    spans with a token whose first byte is a space that its tokenizer put there, or that spells
    another text than the source (a normaliser's image of it): its distribution is over other bytes
    spans from before the seam, where a prompt was encoded jointly
    a token without a predictor

    bytes    the catalog
    A        the| cat|alog       starts at tokens 0 1
    B        the| ca|talog       starts at tokens 0 1
    compared: "the" with "the", " cat" with " ca"

P: aligned positions. S: spans. n: tokens of a side.
"""

from dataclasses import dataclass

import numpy as np

from .offsets import Side
from .spans import Alignment


@dataclass(frozen=True, eq=False)
class SpanStarts:
    """Row a[i] of model a and row b[i] of model b predict the first token of one span."""

    a: np.ndarray  # int64 [P]
    b: np.ndarray
    span: np.ndarray  # int64 [P], rising; the number of spans for the position behind the text


def span_starts(
    alignment: Alignment,
    side_a: Side,
    side_b: Side,
    *,
    first_a: int = 0,
    first_b: int = 0,
    seam: int = 0,
    ended: bool = False,
) -> SpanStarts:
    """Predictor rows on both sides at the spans of one text.

    first_a, first_b: row that predicts token 0 of the side: 0 in a packed batch of predictors; in
    the logits of a whole sequence, the number of tokens in front minus one. -1 means that nothing
    predicts token 0 (no prompt, no BOS): its span is left out on both sides. seam: bytes of the
    source that belong to the prompt, where a side was encoded jointly with it; spans that start
    before are left out. ended: both texts ended by themselves, so a stop token follows on both
    sides: add the position that predicts it, right behind the last token of a span, unless one side
    spells more than the other. ValueError: sides that are not those of the alignment, first < -1,
    seam < 0.
    """
    if len(side_a.ids) != len(alignment.span_a) or len(side_b.ids) != len(alignment.span_b):
        raise ValueError(
            f"span_starts: sides of {len(side_a.ids)} and {len(side_b.ids)} tokens for an "
            f"alignment of {len(alignment.span_a)} and {len(alignment.span_b)}; want the two sides "
            "it was made from, in its order."
        )
    if min(first_a, first_b) < -1 or seam < 0:
        raise ValueError(
            f"span_starts: first_a = {first_a}, first_b = {first_b}, seam = {seam}; want -1 or "
            "more, and seam >= 0."
        )
    num = alignment.num_spans
    token_a, token_b = _first_tokens(alignment.span_a, num), _first_tokens(alignment.span_b, num)
    used = alignment.exact & (np.concatenate([[0], alignment.bounds[:-1]])[:num] >= seam)
    for side, span in ((side_a, alignment.span_a), (side_b, alignment.span_b)):
        touched = span[np.concatenate([side.skips, _changed(side)])]
        used[touched[touched >= 0]] = False
    span = np.arange(num)
    whole = (
        num
        and alignment.exact[-1]
        and alignment.bounds[-1] == alignment.bytes_a == alignment.bytes_b
    )
    if ended and (whole or alignment.bytes_a == alignment.bytes_b == 0):
        token_a = np.append(token_a, _end(alignment.span_a))
        token_b = np.append(token_b, _end(alignment.span_b))
        used, span = np.append(used, True), np.append(span, num)
    row_a, row_b = token_a + first_a, token_b + first_b
    used &= (row_a >= 0) & (row_b >= 0)
    return SpanStarts(row_a[used], row_b[used], span[used])


def _changed(side: Side) -> np.ndarray:
    """int64, tokens that spell other bytes than the source has there."""
    if side.ends is None or side.source is None:
        return np.zeros(0, np.int64)
    begin, pieces, source = np.concatenate([[0], side.ends[:-1]]), side.table.pieces, side.source
    rows = zip(side.ids.tolist(), begin.tolist(), side.ends.tolist(), strict=True)
    return np.array(
        [k for k, (i, b, e) in enumerate(rows) if i >= 0 and pieces[i] != source[b:e]], np.int64
    )


def _first_tokens(span_n: np.ndarray, num_spans: int) -> np.ndarray:
    """int64 [S]: index of the first token of each span."""
    first = np.full(num_spans, len(span_n), np.int64)
    inside = np.flatnonzero(span_n >= 0)
    np.minimum.at(first, span_n[inside], inside)
    return first


def _end(span_n: np.ndarray) -> int:
    """Index behind the last token that is in a span: of the stop id, where the side has one."""
    inside = np.flatnonzero(span_n >= 0)
    return int(inside[-1]) + 1 if len(inside) else 0
