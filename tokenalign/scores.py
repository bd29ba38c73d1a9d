"""Likelihoods of one text under two models, in numbers that do not depend on their tokenizers.

Log-probabilities are summed over aligned spans and over the whole text; per-token means are not
comparable between tokenizers. The probability of *stopping* belongs to the sequence but spells no
byte: it is a term of its own. Tokens outside the spans count nowhere. The calibration reward is
`Scores.ratio` with a = proxy, b = policy.

`sequence_scores` takes an alignment and token log-probs. `compare_spans` takes the span sums
(`span_logprobs`), for a caller that stores spans but no alignment, or whose two models share one
tokenizer: then every token is its own span.

S: spans. n, m: tokens of a, b. All sums are float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .spans import Alignment

NORMS = ("sum", "per_byte", "per_token")


@dataclass(frozen=True, eq=False)
class Scores:
    """One text under two models. Nats, unless the name says bits."""

    # [S], sum of log p over the span's tokens; 0 where the span is not exact
    span_logp_a: np.ndarray
    span_logp_b: np.ndarray
    span_ratio: np.ndarray  # [S], span_logp_a - span_logp_b, clipped to +-clip
    clipped_fraction: float  # of the exact spans, those that the clip changed
    stop_a: float  # log p of ending where the text ended; 0.0 when it was cut
    stop_b: float
    num_bytes: int  # bytes in exact spans: what the sums cover
    coverage: float  # num_bytes over the bytes of the longer side
    tokens_a: int  # tokens of each side inside the spans, for `per_token` alone
    tokens_b: int

    @property
    def logp_a(self) -> float:
        """Sum over exact spans, unclipped, without the stop."""
        return float(self.span_logp_a.sum())

    @property
    def logp_b(self) -> float:
        return float(self.span_logp_b.sum())

    @property
    def stop_ratio(self) -> float:
        return self.stop_a - self.stop_b

    @property
    def log_ratio(self) -> float:
        """Clipped span ratios summed, plus the stop terms' difference."""
        return float(self.span_ratio.sum()) + self.stop_ratio

    @property
    def log_ratio_unclipped(self) -> float:
        return float((self.span_logp_a - self.span_logp_b).sum()) + self.stop_ratio

    def ratio(self, norm: str) -> float:
        """The calibration reward before group normalisation (equation (2) of docs/method.md).

        sum        log_ratio, nats
        per_byte   log_ratio / num_bytes; 0 bytes count as one
        per_token  logp_a / tokens_a - logp_b / tokens_b, each side by its own tokens: without span
                   clip and stop, and not comparable between tokenizers
        """
        if norm not in NORMS:
            raise ValueError(f"Scores.ratio: norm = {norm!r}; want one of {', '.join(NORMS)}.")
        if norm == "per_token":
            return self.logp_a / max(self.tokens_a, 1) - self.logp_b / max(self.tokens_b, 1)
        return self.log_ratio / (max(self.num_bytes, 1) if norm == "per_byte" else 1)

    @property
    def bits_per_byte_a(self) -> float:
        """-log2 p of the text under a per byte, without the stop; NaN for no bytes."""
        return bits_per_byte(self.logp_a, self.num_bytes)

    @property
    def bits_per_byte_b(self) -> float:
        return bits_per_byte(self.logp_b, self.num_bytes)


def sequence_scores(
    alignment: Alignment,
    logp_a: Sequence[float] | np.ndarray,
    logp_b: Sequence[float] | np.ndarray,
    *,
    stop_a: float | None = None,
    stop_b: float | None = None,
    clip: float = 10.0,
) -> Scores:
    """Sum log-probabilities over the exact spans of an alignment and compare.

    logp_a [n], logp_b [m]: log p of each token in nats, in the order of the sides; values outside
    exact spans may be anything. stop_a, stop_b, clip and errors as in `compare_spans`, and those of
    `span_logprobs`.
    """
    exact, num = alignment.exact, alignment.num_spans
    inside_a, inside_b = _inside(alignment.span_a, exact), _inside(alignment.span_b, exact)
    span_a = np.where(inside_a, alignment.span_a, -1)
    span_b = np.where(inside_b, alignment.span_b, -1)
    num_bytes = int(np.diff(alignment.bounds, prepend=0)[exact].sum())
    scores = compare_spans(
        span_logprobs(logp_a, span_a, num, name="logp_a"),
        span_logprobs(logp_b, span_b, num, name="logp_b"),
        num_bytes=num_bytes,
        tokens=(int(inside_a.sum()), int(inside_b.sum())),
        stop_a=stop_a,
        stop_b=stop_b,
        clip=clip,
        exact=exact,
    )
    return replace(scores, coverage=num_bytes / max(1, alignment.bytes_a, alignment.bytes_b))


def compare_spans(
    span_logp_a: np.ndarray,
    span_logp_b: np.ndarray,
    *,
    num_bytes: int,
    tokens: tuple[int, int],
    stop_a: float | None = None,
    stop_b: float | None = None,
    clip: float = 10.0,
    exact: np.ndarray | None = None,
) -> Scores:
    """Scores from span sums [S] of both models over the same bytes.

    num_bytes: bytes that the spans cover. tokens: of a and of b inside them. stop_a, stop_b: log of
    the summed probability of each model's stop set at the end, both or neither; None for a cut
    text. clip: bound on a span's log-ratio in nats (span differences are heavy-tailed); 0 turns it
    off. The stop is never clipped. exact [S]: spans that count, None for all; the others are worth
    0. The spans are taken to cover the text (coverage 1). ValueError: shapes that differ, one stop
    without the other, clip < 0.
    """
    span_logp_a = np.asarray(span_logp_a, np.float64)
    span_logp_b = np.asarray(span_logp_b, np.float64)
    if span_logp_a.shape != span_logp_b.shape or span_logp_a.ndim != 1:
        raise ValueError(
            f"compare_spans: a has span sums {list(span_logp_a.shape)} and b "
            f"{list(span_logp_b.shape)}; want [S] for both, from one alignment."
        )
    if not clip >= 0:
        raise ValueError(f"compare_spans: clip = {clip}; want a bound in nats, or 0 for none.")
    if (stop_a is None) != (stop_b is None):
        raise ValueError(
            f"compare_spans: stop_a = {stop_a}, stop_b = {stop_b}; a text ended by itself on both "
            "sides or on neither. Score the stop set of each tokenizer at the end of the text, or "
            "leave both out."
        )
    exact = np.ones(len(span_logp_a), bool) if exact is None else exact
    span_logp_a, span_logp_b = np.where(exact, span_logp_a, 0.0), np.where(exact, span_logp_b, 0.0)
    ratio = span_logp_a - span_logp_b
    clipped = np.clip(ratio, -clip, clip) if clip else ratio
    clipped_fraction = float((clipped != ratio).sum() / max(1, exact.sum()))
    return Scores(
        span_logp_a,
        span_logp_b,
        clipped,
        clipped_fraction,
        stop_a or 0.0,
        stop_b or 0.0,
        num_bytes,
        1.0,
        *tokens,
    )


def span_logprobs(
    logp: Sequence[float] | np.ndarray, span: np.ndarray, num_spans: int, *, name: str = "logp"
) -> np.ndarray:
    """float64 [S]: sums of token log-probs [n] over the span [n] of each token.

    Tokens with span -1 count nothing and may be anything. The differentiable form, on a device, is
    `reflux.kernels.span_sum`. ValueError: another length, a span >= num_spans, a value inside a
    span that is not finite.
    """
    logp_n, span = np.asarray(logp, np.float64), np.asarray(span, np.int64)
    if logp_n.ndim != 1 or logp_n.shape != span.shape or span.max(initial=-1) >= num_spans:
        raise ValueError(
            f"span_logprobs: {name} has shape {list(logp_n.shape)} for {span.size} tokens in spans "
            f"up to {span.max(initial=-1)} of {num_spans}; want one log p per id of the side, "
            "masked and control ids included."
        )
    inside = span >= 0
    if not np.isfinite(logp_n[inside]).all():
        at = int(np.flatnonzero(inside & ~np.isfinite(logp_n))[0])
        raise ValueError(
            f"span_logprobs: {name}[{at}] = {logp_n[at]} inside a span; want a finite log p. Score "
            "under the untruncated softmax (top-p and top-k give log 0), and take the logits one "
            "position before the token."
        )
    return np.bincount(span[inside], weights=logp_n[inside], minlength=num_spans)


def bits_per_byte(logp: float, num_bytes: int) -> float:
    """-logp / (num_bytes ln 2), bytes of the shared source text; NaN for no bytes."""
    return -logp / (num_bytes * math.log(2)) if num_bytes else math.nan


def _inside(span: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """bool [n]: the token lies in an exact span."""
    return np.append(exact, False)[span]  # span -1 reads the appended False
