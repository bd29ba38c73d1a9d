"""What two models say about the same text, in numbers that do not depend on their tokenizers.

Log-probabilities are summed over aligned spans and over the whole text; per-token means are not comparable between tokenizers.
The probability of *stopping* belongs to the sequence but spells no byte: it is kept apart, and so are tokens outside the spans.
The calibration reward is a = proxy, b = policy: `log_ratio` = l_C - l_D.

K: spans. n, m: tokens of a, b. All sums are float64.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .spans import Alignment


@dataclass(frozen=True, eq=False)
class Scores:
    """One text under two models. Nats, unless the name says bits."""

    span_logp_a: np.ndarray  # [K], sum of log p over the span's tokens; 0 where the span is not exact
    span_logp_b: np.ndarray
    span_ratio: np.ndarray  # [K], span_logp_a - span_logp_b, clipped to +-clip
    clipped_share: float  # share of the exact spans that the clip changed
    logp_a: float  # sum over exact spans, unclipped, without the stop
    logp_b: float
    stop_a: float  # log p of ending where the text ended; 0.0 when it was cut
    stop_b: float
    num_bytes: int  # bytes in exact spans: what the sums cover
    coverage: float  # num_bytes over the bytes of the longer side

    @property
    def log_ratio(self) -> float:
        """Clipped span ratios summed, plus the stop terms' difference: the calibration reward before normalisation."""
        return float(self.span_ratio.sum()) + self.stop_a - self.stop_b

    @property
    def log_ratio_unclipped(self) -> float:
        return self.logp_a - self.logp_b + self.stop_a - self.stop_b

    @property
    def bits_per_byte_a(self) -> float:
        """-log2 p of the text under a, per byte, without the stop; NaN for no bytes. Pool a corpus as sum over sum."""
        return _bits_per_byte(self.logp_a, self.num_bytes)

    @property
    def bits_per_byte_b(self) -> float:
        return _bits_per_byte(self.logp_b, self.num_bytes)


def sequence_scores(alignment: Alignment, logp_a: Sequence[float], logp_b: Sequence[float], *, stop_a: float | None = None,
                    stop_b: float | None = None, clip: float = 10.0) -> Scores:
    """Sum log-probabilities over spans and compare.

    logp_a [n], logp_b [m]: log p of each token in nats, in the order of the sides; values outside exact spans are not looked at.
    stop_a, stop_b: log of the summed probability of each model's stop set at the end, both or neither; None for a cut text.
    clip: bound on a span's log-ratio in nats (span differences are heavy-tailed); 0 turns it off.
    ValueError: a wrong length, a value that is not finite inside a span, one stop without the other, clip < 0.
    """
    if clip < 0:
        raise ValueError(f"sequence_scores: clip = {clip}; want a bound in nats, or 0 for none.")
    if (stop_a is None) != (stop_b is None):
        raise ValueError(f"sequence_scores: stop_a = {stop_a}, stop_b = {stop_b}; a text ended by itself on both sides or on "
                         "neither. Score the stop set of each tokenizer at the end of the text, or leave both out.")
    span_a = _span_sums(alignment, alignment.span_a, logp_a, "logp_a")
    span_b = _span_sums(alignment, alignment.span_b, logp_b, "logp_b")
    ratio = span_a - span_b
    clipped = np.clip(ratio, -clip, clip) if clip else ratio
    exact = alignment.exact
    num_bytes = int(np.diff(alignment.bounds, prepend=0)[exact].sum())
    return Scores(
        span_a, span_b, clipped, float((clipped != ratio).sum() / max(1, exact.sum())), float(span_a.sum()),
        float(span_b.sum()), stop_a or 0.0, stop_b or 0.0, num_bytes,
        num_bytes / max(1, alignment.bytes_a, alignment.bytes_b))


def _span_sums(alignment: Alignment, span: np.ndarray, logp: Sequence[float], name: str) -> np.ndarray:
    logp = np.asarray(logp, np.float64)
    if logp.shape != span.shape:
        raise ValueError(f"sequence_scores: {name} has shape {list(logp.shape)} for {len(span)} tokens; want one log p per id of "
                         "the side, masked and control ids included.")
    used = span >= 0
    used[used] = alignment.exact[span[used]]
    if not np.isfinite(logp[used]).all():
        at = int(np.flatnonzero(used & ~np.isfinite(logp))[0])
        raise ValueError(f"sequence_scores: {name}[{at}] = {logp[at]} inside an exact span; want a finite log p. Score under the "
                         "untruncated softmax (top-p and top-k give log 0), and take the logits one position before the token.")
    return np.bincount(span[used], weights=logp[used], minlength=alignment.num_spans)


def _bits_per_byte(logp: float, num_bytes: int) -> float:
    return -logp / (num_bytes * math.log(2)) if num_bytes else math.nan
