"""Sequence scores: sums telescope, nothing outside the spans counts, bytes and not characters."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import align, encoded, side_of, tokenizations

from reflux.tokenalign.offsets import Side
from reflux.tokenalign.scores import (
    NORMS,
    bits_per_byte,
    compare_spans,
    sequence_scores,
    span_logprobs,
)
from reflux.tokenalign.spans import align_spans

SEEDS = st.integers(0, 2**32 - 1)


def logps(alignment, seed):
    rng = np.random.default_rng(seed)
    return [-rng.exponential(3.0, len(span)) for span in (alignment.span_a, alignment.span_b)]


@given(tokenizations(), SEEDS)
def test_span_sums_add_up_to_the_sequence(sides, seed):
    """The sum of span log-probs is the sequence's log-prob, on each side."""
    alignment = align(*sides)
    a, b = logps(alignment, seed)
    scores = sequence_scores(alignment, a, b, clip=0)
    assert scores.logp_a == pytest.approx(a.sum(), rel=1e-12) and scores.logp_b == pytest.approx(
        b.sum(), rel=1e-12
    )
    for k in range(alignment.num_spans):
        assert scores.span_logp_a[k] == pytest.approx(a[alignment.span_a == k].sum(), rel=1e-12)
    assert scores.log_ratio == pytest.approx(a.sum() - b.sum(), rel=1e-9, abs=1e-9)
    assert (scores.coverage, scores.clipped_fraction, scores.num_bytes) == (
        1.0,
        0.0,
        len(b"".join(sides[0])),
    )


@given(tokenizations(), SEEDS)
def test_swapping_the_models_turns_the_ratio_around(sides, seed):
    there, back = align(*sides), align(*sides[::-1])
    a, b = logps(there, seed)
    one, two = (
        sequence_scores(there, a, b, clip=2.0, stop_a=-1.0, stop_b=-3.0),
        sequence_scores(back, b, a, clip=2.0, stop_a=-3.0, stop_b=-1.0),
    )
    assert (
        one.log_ratio == pytest.approx(-two.log_ratio)
        and one.bits_per_byte_a == two.bits_per_byte_b
    )
    assert one.clipped_fraction == two.clipped_fraction


@given(tokenizations(), SEEDS, st.sampled_from([0.5, 2.0, 10.0]))
def test_the_clip_bounds_every_span_and_reports_what_it_did(sides, seed, clip):
    alignment = align(*sides)
    a, b = logps(alignment, seed)
    scores = sequence_scores(alignment, a, b, clip=clip)
    raw = scores.span_logp_a - scores.span_logp_b
    assert (np.abs(scores.span_ratio) <= clip).all()
    inside = np.abs(raw) <= clip
    assert np.array_equal(scores.span_ratio[inside], raw[inside])
    assert scores.clipped_fraction == pytest.approx((~inside).mean())
    assert scores.log_ratio_unclipped == pytest.approx(a.sum() - b.sum())


def test_tokens_outside_the_spans_count_nothing():
    """rLLM pads log-probs with 0.0; here even NaN outside a span changes nothing."""
    table = side_of([b"ab", b"c", b"d"]).table
    a = Side(table, np.array([-1, 0, -1, 1, 2, -1], np.int32), 0, True)
    b = side_of([b"a", b"b", b"c"])
    scores = sequence_scores(
        align_spans([a], [b])[0],
        [math.nan, -1, math.nan, -2, math.nan, -math.inf],
        [-0.5, -0.5, -3],
    )
    assert (scores.logp_a, scores.logp_b, scores.log_ratio) == (-3, -4, 1)
    assert (scores.num_bytes, scores.coverage) == (3, 3 / 4)


def test_spans_of_unequal_bytes_are_worth_zero():
    alignment = align([b"ab", b"cd", b"ef"], [b"ab", b"cX", b"ef"])
    scores = sequence_scores(alignment, [-1, -50, -1], [-2, -1, -40])
    assert (
        scores.span_ratio.tolist() == [1, 0, 0] and scores.coverage == 1 / 3 and scores.logp_a == -1
    )


def test_an_inexact_span_counts_nowhere():
    """Not by its log-probs, its tokens or the clipped fraction."""
    alignment = align([b"ab", b"cd", b"e", b"f"], [b"ab", b"cX", b"ef"])
    scores = sequence_scores(
        alignment, [-9, math.nan, -50, math.nan], [-2, -math.inf, math.nan], clip=1.0
    )
    assert (scores.tokens_a, scores.tokens_b, scores.clipped_fraction, scores.log_ratio) == (
        1,
        1,
        1.0,
        -1.0,
    )
    assert scores.ratio("per_token") == -9 + 2


def test_the_stop_is_apart_from_bytes_and_never_clipped():
    alignment = align([b"ab"], [b"ab"])
    cut = sequence_scores(alignment, [-1], [-2])
    ended = sequence_scores(alignment, [-1], [-2], stop_a=-30.0, stop_b=-0.5)
    assert ended.log_ratio == cut.log_ratio - 29.5 and ended.bits_per_byte_a == cut.bits_per_byte_a
    assert (ended.logp_a, ended.stop_a, ended.stop_b) == (-1, -30.0, -0.5)


@given(tokenizations(), SEEDS, st.sampled_from(NORMS), st.sampled_from([0.0, 2.0]))
def test_span_sums_of_a_caller_give_the_scores_of_the_alignment(sides, seed, norm, clip):
    alignment = align(*sides)
    a, b = logps(alignment, seed)
    spans = [
        span_logprobs(x, span, alignment.num_spans)
        for x, span in ((a, alignment.span_a), (b, alignment.span_b))
    ]
    one = compare_spans(
        *spans,
        num_bytes=len(b"".join(sides[0])),
        tokens=(len(a), len(b)),
        stop_a=-1.0,
        stop_b=-2.5,
        clip=clip,
    )
    two = sequence_scores(alignment, a, b, stop_a=-1.0, stop_b=-2.5, clip=clip)
    assert one.ratio(norm) == two.ratio(norm) and one.log_ratio_unclipped == two.log_ratio_unclipped
    assert (one.clipped_fraction, one.num_bytes, one.coverage) == (
        two.clipped_fraction,
        two.num_bytes,
        two.coverage,
    )


def test_the_three_norms_by_hand():
    scores = compare_spans(
        np.array([-1.0, -20.0]),
        np.array([-3.0, -2.0]),
        num_bytes=4,
        tokens=(3, 2),
        stop_a=-1.0,
        stop_b=-0.5,
        clip=10,
    )
    assert scores.ratio("sum") == scores.log_ratio == 2 - 10 - 0.5
    assert scores.ratio("per_byte") == (2 - 10 - 0.5) / 4
    assert scores.ratio("per_token") == -21 / 3 + 5 / 2, "knows neither clip nor stop"
    assert (
        scores.log_ratio_unclipped == 2 - 18 - 0.5
        and scores.clipped_fraction == 0.5
        and scores.stop_ratio == -0.5
    )


@given(tokenizations(1), SEEDS)
def test_one_tokenizer_needs_no_alignment(sides, seed):
    """Two models of one tokenizer read the same ids: every token is its own span."""
    pieces = [p for p in sides[0] if p]
    alignment = align(pieces, pieces)
    a, b = logps(alignment, seed)
    own = np.arange(len(pieces))
    scores = compare_spans(
        span_logprobs(a, own, len(a)),
        span_logprobs(b, own, len(b)),
        num_bytes=len(b"".join(pieces)),
        tokens=(len(a), len(b)),
    )
    assert scores.ratio("sum") == sequence_scores(alignment, a, b).ratio("sum")


@given(tokenizations(), SEEDS, st.data())
def test_a_token_outside_is_no_certain_token(sides, seed, data):
    """Leaving a token out removes it; it is not scored as log p = 0, whatever its value."""
    alignment = align(*sides)
    a, _ = logps(alignment, seed)
    out = data.draw(st.integers(0, len(a) - 1))
    span = alignment.span_a.copy()
    span[out] = -1
    whole, without = span_logprobs(a, alignment.span_a, alignment.num_spans), None
    for garbage in (math.nan, -math.inf, 0.0, -7.0):
        a_out = a.copy()
        a_out[out] = garbage
        sums = span_logprobs(a_out, span, alignment.num_spans)
        assert without is None or np.array_equal(sums, without)
        without = sums
    assert (whole - without).sum() == pytest.approx(a[out])


def test_single_precision_sums_stay_within_their_bound():
    """fp32 log-probs summed in fp64 are off by at most half an ulp of each token."""
    rng = np.random.default_rng(0)
    logp = -rng.exponential(3.0, 5000)
    span = np.sort(rng.integers(0, 900, 5000))
    wide, narrow = span_logprobs(logp, span, 900), span_logprobs(logp.astype(np.float32), span, 900)
    assert (
        abs(narrow.sum() - wide.sum())
        <= np.abs(np.spacing(logp.astype(np.float32))).sum(dtype=np.float64) / 2
    )


def test_bits_per_byte():
    assert bits_per_byte(-8 * math.log(2), 4) == pytest.approx(2) and math.isnan(
        bits_per_byte(-1.0, 0)
    )


def test_lm_eval_3278_bits_are_per_byte_not_per_character():
    text = "你好 hi"
    a, b = encoded("byte level", text), encoded("SentencePiece BPE", text)
    alignment = align_spans([a], [b])[0]
    scores = sequence_scores(
        alignment, np.full(len(a.ids), -math.log(2)), np.full(len(b.ids), -math.log(2))
    )
    assert scores.num_bytes == 9 and len(text) == 5
    assert scores.bits_per_byte_a == pytest.approx(
        len(a.ids) / 9
    ) and scores.bits_per_byte_b == pytest.approx(len(b.ids) / 9)


def test_a_mark_of_no_bytes_has_a_log_prob_that_counts():
    a, b = encoded("SentencePiece BPE", "\nfoo"), encoded("byte level", "\nfoo")
    logp = np.full(len(a.ids), -1.0)
    scores = sequence_scores(align_spans([a], [b])[0], logp, np.full(len(b.ids), -1.0))
    assert a.lens[0] == 0 and scores.logp_a == -len(a.ids)


def test_no_text_scores_nothing():
    empty = Side(side_of([b"a"]).table, np.empty(0, np.int32), 0, True)
    scores = sequence_scores(align_spans([empty], [empty])[0], [], [], stop_a=-1.0, stop_b=-2.0)
    assert scores.log_ratio == 1.0 and math.isnan(scores.bits_per_byte_a) and scores.coverage == 0


def test_what_people_get_wrong():
    alignment = align([b"a", b"b"], [b"ab"])
    with pytest.raises(ValueError, match=r"logp_a has shape \[1\] for 2 tokens"):
        sequence_scores(alignment, [-1], [-1])
    with pytest.raises(ValueError, match=r"logp_a\[1\] = -inf inside a span"):
        sequence_scores(alignment, [-1, -math.inf], [-1])
    with pytest.raises(ValueError, match="stop_a = None, stop_b = -1.0"):
        sequence_scores(alignment, [-1, -1], [-1], stop_b=-1.0)
    with pytest.raises(ValueError, match="clip = -1"):
        sequence_scores(alignment, [-1, -1], [-1], clip=-1)
    with pytest.raises(ValueError, match=r"a has span sums \[2\] and b \[1\]"):
        compare_spans([-1, -1], [-1], num_bytes=2, tokens=(2, 1))
    with pytest.raises(ValueError, match="spans up to 4 of 2"):
        span_logprobs([-1, -1], [0, 4], 2)
    with pytest.raises(ValueError, match="norm = 'mean'; want one of sum, per_byte, per_token"):
        compare_spans([-1], [-1], num_bytes=2, tokens=(2, 1)).ratio("mean")
