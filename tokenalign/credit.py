"""From a number per span back to numbers per token.

`credit` divides a span's value among its tokens; by every rule the parts add up to the value. As a
policy-gradient advantage such a part is myopic: it rewards a token for its own span only.

`reward_to_go` gives each token the whole sum without the spans that are *settled*: those that no
continuation of the text before the token can change. What is left out is then a function of that
text, so the expected gradient stays that of the whole sum. A span that merely ends before the token
is not settled across tokenizers: the other model may cut "un" and what follows it as one token, and
scores "un" accordingly. Where both sides have the same tokens every earlier span is settled
(`following_span`). A baseline may be another text's `span_to_go` at the same count: it does not
depend on what follows the token.

`prefix_to_go` settles bytes, not spans: it leaves out what the two models make of the text before
the token, each a function of those bytes alone (`byte_windows.settled_prefix_logp`). So it needs no
span to be settled, and is exact for any two tokenizers.

S: spans. T: tokens of one side, span -1 = outside every span (no credit).
"""

from collections.abc import Sequence

import numpy as np

RULES = ("uniform", "bytes", "surprisal", "first", "last")


def credit(
    value_S: np.ndarray,
    span_T: np.ndarray,
    rule: str,
    *,
    logp: np.ndarray | None = None,
    lens: np.ndarray | None = None,
) -> np.ndarray:
    """Divide value_S [S] among the tokens of span_T [T]; float64 [T]. Those of span k get
    value_S[k] together.

        uniform      1 / number of tokens
        bytes        lens_i / bytes of the span; needs lens [T] (offsets.Side.lens)
        surprisal    log p_i / log p of the span; needs logp [T], each <= 0 up to rounding. Uniform
                     where the span is certain
        first, last  everything to one token

    ValueError: an unknown rule, a missing or mis-shaped argument, a positive logp, a value on a
    span that has no token.
    """
    value_S, span_T = _check(value_S, span_T)
    live = span_T >= 0
    span = span_T[live]
    count = np.bincount(span, minlength=len(value_S))
    lost = np.flatnonzero((count == 0) & (value_S != 0))
    if len(lost):
        raise ValueError(
            f"credit: span {lost[0]} is worth {value_S[lost[0]]} and has no token here; value_S "
            "and span_T must come from the same alignment."
        )
    if rule == "uniform":
        part = np.ones(len(span))
    elif rule == "bytes":
        part = _per_token("lens", lens, live)
    elif rule == "surprisal":
        part = np.maximum(-_per_token("logp", logp, live), 0.0)
    elif rule in ("first", "last"):
        part = _edge(span, rule, len(value_S))
    else:
        raise ValueError(f"credit: rule = {rule!r}; want one of {', '.join(RULES)}.")
    total = np.bincount(span, weights=part, minlength=len(value_S))[span]
    empty = total < 1e-8  # below this, parts are quotients of rounding errors
    uniform = 1 / np.maximum(count[span], 1)
    credit_T = np.zeros(len(span_T))
    credit_T[live] = value_S[span] * np.where(empty, uniform, part / np.where(empty, 1.0, total))
    return credit_T


def reward_to_go(
    value_S: np.ndarray,
    span_T: np.ndarray,
    *,
    settled: np.ndarray | None = None,
    end: float = 0.0,
    length: int | None = None,
) -> np.ndarray:
    """For each token the sum of value_S without the settled spans, and `end`; float64 [T], or
    [length] with tokens appended.

    settled: int [T] (or [length]), how many spans from the start no continuation after the token's
    own start can change any more, in bounds, tokens and scores. None: none are settled, so each
    token gets the whole sum, which is exact for any two tokenizers. For one vocabulary on both
    sides: following_span(span_T, S, length), everything before the token's own span.
    end: what comes behind the text, the stop term's value.
    ValueError: another shape, a count that takes in the token's own span or a later one.
    """
    value_S, span_T = _check(value_S, span_T)
    following = following_span(span_T, len(value_S), length)
    return span_to_go(value_S, end)[settled_spans(settled, following)]


def prefix_to_go(total: float, prefix_a: np.ndarray, prefix_b: np.ndarray) -> np.ndarray:
    """total - (prefix_a - prefix_b): for each token the whole sum without what the text before it
    is worth; float64 [T].

    prefix_a, prefix_b [T]: log-probabilities of the text before each token under the two models,
    nats, that no later token can change. Whatever they are, the expected gradient is that of the
    total; the closer they are to the probabilities of the prefix, the smaller its variance.
    ValueError: two lengths.
    """
    prefix_a, prefix_b = (np.asarray(x, np.float64) for x in (prefix_a, prefix_b))
    if prefix_a.shape != prefix_b.shape or prefix_a.ndim != 1:
        raise ValueError(
            f"prefix_to_go: prefixes of shape {list(prefix_a.shape)} and {list(prefix_b.shape)}; "
            "want one value per token on both sides."
        )
    return total - (prefix_a - prefix_b)


def settled_spans(settled: np.ndarray | None, following: np.ndarray) -> np.ndarray:
    """int64: `settled` checked against `following_span`; zeros for None."""
    if settled is None:
        return np.zeros_like(following)
    settled = np.asarray(settled)
    if settled.shape != following.shape or settled.dtype.kind not in "iu":
        raise ValueError(
            f"reward_to_go: settled is {settled.dtype} {list(settled.shape)}; want a whole number "
            f"for each of the {len(following)} tokens."
        )
    wrong = np.flatnonzero((settled < 0) | (settled > following))
    if len(wrong):
        t = wrong[0]
        raise ValueError(
            f"reward_to_go: settled[{t}] = {settled[t]}, but only {following[t]} spans end before "
            f"token {t}; want 0 to {following[t]}. A token's own span cannot be settled before it."
        )
    return settled.astype(np.int64)


def span_to_go(value_S: np.ndarray, end: float = 0.0) -> np.ndarray:
    """float64 [S + 1]: the sum of value_S from each span on, and `end`; at S `end` alone."""
    return np.append(np.cumsum(np.asarray(value_S, np.float64)[::-1])[::-1], 0.0) + end


def following_span(span_T: np.ndarray, num_spans: int, length: int | None = None) -> np.ndarray:
    """int64 [T]: the span of each token, or the next one for a token outside; num_spans past the
    last.

    length: as many tokens, those beyond span_T past the last span (a stop token); fewer than T are
    refused with ValueError.
    """
    span_T = np.asarray(span_T, np.int64)
    length = len(span_T) if length is None else length
    if length < len(span_T):
        raise ValueError(
            f"following_span: length = {length} for {len(span_T)} tokens; want at least as many."
        )
    following = np.full(length, num_spans, np.int64)
    following[: len(span_T)] = np.where(span_T >= 0, span_T, num_spans)
    return np.minimum.accumulate(following[::-1])[::-1]


def mean_at(at_n: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [n]: the mean over `others`, at least one, of their value at each place, or of their
    last one: a baseline, for it does not depend on what follows the token.
    """
    return np.mean([x[np.minimum(at_n, len(x) - 1)] for x in others], 0)


def _check(value_S: np.ndarray, span_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value_S, span_T = np.asarray(value_S, np.float64), np.asarray(span_T)
    if value_S.ndim != 1 or span_T.ndim != 1 or span_T.max(initial=-1) >= len(value_S):
        raise ValueError(
            f"credit: value_S is {list(value_S.shape)} and span_T {list(span_T.shape)} with spans "
            f"up to {span_T.max(initial=-1)}; want one value per span and one span per token of "
            "one text."
        )
    return value_S, span_T


def _per_token(name: str, values: np.ndarray | None, live: np.ndarray) -> np.ndarray:
    if values is None or np.shape(values) != live.shape:
        got = "nothing" if values is None else f"shape {list(np.shape(values))}"
        raise ValueError(
            f"credit: this rule needs {name}, one per token; got {got} for {len(live)} tokens."
        )
    values = np.asarray(values, np.float64)[live]
    wrong = ~np.isfinite(values) | (values > 1e-3 if name == "logp" else values < 0)
    if wrong.any():
        side = "at most" if name == "logp" else "at least"
        raise ValueError(
            f"credit: {name} must be finite and {side} 0 inside the spans; got {values[wrong][0]}."
        )
    return values


def _edge(span: np.ndarray, rule: str, num_spans: int) -> np.ndarray:
    """1 at the first or last token of each span, else 0; tokens in any order."""
    order = np.arange(len(span))
    chosen = np.full(num_spans, len(span) if rule == "first" else -1)
    (np.minimum if rule == "first" else np.maximum).at(chosen, span, order)
    return (order == chosen[span]).astype(np.float64)


def before_each(value_n: np.ndarray) -> np.ndarray:
    """[n] the sum of the values in front of each."""
    return np.cumsum(value_n) - value_n
