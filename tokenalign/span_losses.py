"""Likelihood losses on aligned spans: the teacher's log-probability of a span is all that crosses
between tokenizers.

For span k of a given text, T_k and S_k are the teacher's and the student's log-probability of its
bytes (sums over the tokens of each side, `scores.sequence_scores`, or `reflux.kernels.span_sum` for
a differentiable S). ALM (arXiv 2503.20083) compares the two-outcome distributions "this span" and
"any other" at a temperature tau, with u = exp(T / tau) and v = exp(S / tau):

    L = u log(u / v) + (1 - u) log((1 - u) / (1 - v))        dL/dS = -(u - v) / ((1 - v) tau)

Cost: one number per span from the teacher, no logits; the student pays one log-prob per token.

Limits. It fits the likelihood of the given text and constrains none of its alternatives. On text
sampled from the student its expected gradient at large tau is E[(T/S - 1) grad S], not the
E[(S - T) grad S] of the reverse KL: zero at agreement, too, but with other weights and without a
token's effect on the text after it. Use it on given text; on-policy, use a policy gradient. A
span's log-prob is that of its bytes *and* of a token boundary at both ends, so two models with
equal byte distributions differ a little at n:m spans. Leave inexact spans out.

S: spans.
"""

import math

import torch
from torch import Tensor

KINDS = ("binary", "limit", "abs", "k2", "k3")


def span_likelihood_kl(
    student_span_logp_S: Tensor,
    teacher_span_logp_S: Tensor,
    *,
    temperature: float = 100.0,
    kind: str = "binary",
    scale: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """A distance between the teacher's and the student's likelihood of each span, differentiable in
    the student.

        binary   KL between (u, 1 - u) and (v, 1 - v), the loss above
        limit    tau * binary as tau grows without bound: (T - S) + T log(S / T), dL/dS = T / S - 1;
                 no temperature
        abs      |u - v|, the total variation of the same two outcomes
        k2       (T - S)^2 / 2, no temperature, dL/dS = S - T
        k3       exp(T - S) - 1 - (T - S), no temperature, dL/dS = 1 - exp(T - S)

    k2 and k3 are the usual estimators of KL(student || teacher) from the student's own text. As
    losses on such text their expected gradients are those of the reverse KL (k2) and, for all its
    name, of the forward KL (k3). Spans differ by many nats, k2 grows with the square of that and k3
    exponentially: hold T within a few nats of S, or use `binary`.

    student_span_logp_S, teacher_span_logp_S: [S], nats, <= 0 up to rounding; fp32, or fp64
    throughout. Half precision is widened to fp32, but its sums are already too coarse (spacing 0.06
    nats near -8). temperature: tau. A large one keeps u and v away from 0 for long spans; 100 is
    ALM's. scale: multiply binary and abs by tau, or their gradients shrink as 1 / tau. Then dL/dS =
    -(u - v) / (1 - v), which tends to T / S - 1 as tau grows.
    reduction: "sum" gives a scalar, "none" the loss [S] of each span.
    binary, limit and abs are finite for every input, also at T = 0, S = 0 and -inf: T / tau and S /
    tau are held within [-1e6, -eps], and the gradient is zero where S was held. ValueError: shapes
    that differ, an unknown kind or reduction, temperature <= 0.
    """
    _check(student_span_logp_S, teacher_span_logp_S, temperature, kind, reduction)
    wide = torch.promote_types(student_span_logp_S.dtype, torch.float32)
    student_S, teacher_S = student_span_logp_S.to(wide), teacher_span_logp_S.detach().to(wide)
    factor = temperature if scale and kind in ("binary", "abs") else 1.0
    loss_S = factor * _distances(student_S, teacher_S, temperature, kind)
    return loss_S.sum() if reduction == "sum" else loss_S


def _distances(student_S: Tensor, teacher_S: Tensor, temperature: float, kind: str) -> Tensor:
    if kind == "k2":
        return (teacher_S - student_S).square() / 2
    if kind == "k3":
        return (teacher_S - student_S).expm1() - (teacher_S - student_S)
    if kind == "limit":
        t, s = _held(teacher_S), _held(student_S)
        return (t - s) + t * (s / t).log()
    log_u, log_v = _held(teacher_S / temperature), _held(student_S / temperature)
    if kind == "abs":
        return (log_u.expm1() - log_v.expm1()).abs()  # expm1: exp would round u - v away near 1
    return log_u.exp() * (log_u - log_v) - log_u.expm1() * (log1mexp(log_u) - log1mexp(log_v))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 and its gradient, without cancellation (split at -log 2)."""
    near = x > -math.log(2)
    # each branch gets an argument at which it is finite: a NaN times the 0 of `where` would reach
    # the gradient
    return torch.where(
        near, torch.log(-torch.expm1(x.clamp(min=-1.0))), torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    )


def _held(log_ratio_S: Tensor) -> Tensor:
    return log_ratio_S.clamp(-1e6, -torch.finfo(log_ratio_S.dtype).eps)


def _check(
    student_S: Tensor, teacher_S: Tensor, temperature: float, kind: str, reduction: str
) -> None:
    if student_S.shape != teacher_S.shape or student_S.ndim != 1:
        raise ValueError(
            f"span_likelihood_kl: student is {list(student_S.shape)} and teacher "
            f"{list(teacher_S.shape)}; want [S] for both, one number per span. Sum token log-probs "
            "over spans first, with one alignment for both sides."
        )
    if kind not in KINDS:
        raise ValueError(f"span_likelihood_kl: kind = {kind!r}; want one of {', '.join(KINDS)}.")
    if reduction not in ("sum", "none"):
        raise ValueError(f"span_likelihood_kl: reduction = {reduction!r}; want sum or none.")
    if not temperature > 0:
        raise ValueError(f"span_likelihood_kl: temperature = {temperature}; want > 0.")
