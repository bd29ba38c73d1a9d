"""Likelihood losses on aligned spans: the teacher's log-probability of a span is all that crosses between tokenizers.

For span k of a given text, T_k and S_k are the teacher's and the student's log-probability of its bytes (sums over the tokens of each
side, `scores.sequence_scores`, or `reflux.kernels.span_sum` for a differentiable S). ALM (arXiv 2503.20083) compares the two-outcome
distributions "this span" and "any other" at a temperature tau, with u = exp(T / tau) and v = exp(S / tau):

    L = u log(u / v) + (1 - u) log((1 - u) / (1 - v))        dL/dS = -(u - v) / ((1 - v) tau)

Cost: one number per span from the teacher, no logits; the student pays one log-prob per token.

What it is not. It fits the likelihood of the text it is given and says nothing of the alternatives to it: on a fixed set of texts the
rest of the distribution is free. On text sampled from the student its expected gradient at large tau is E[(T/S - 1) grad S], not the
E[(S - T) grad S] of the reverse KL: agreement is still a rest point, but the weights are others and a token's effect on the text after
it is missing. Use it on given text; on-policy, use a policy gradient. Last, a span's log-prob is that of its bytes *and* of a token
boundary at both ends, so two models with equal bytes differ a little at n:m spans. Leave inexact spans out.

S: spans.
"""
import math

import torch
from torch import Tensor

KINDS = ("binary", "abs", "k2")


def span_likelihood_kl(student_span_logp_S: Tensor, teacher_span_logp_S: Tensor, *, temperature: float = 100.0,
                       kind: str = "binary", scale: bool = True) -> Tensor:
    """Sum over spans of a distance between the teacher's and the student's likelihood of each; scalar, differentiable in the student.

        binary   KL between (u, 1 - u) and (v, 1 - v), the loss above
        abs      |u - v|, the total variation of the same two outcomes
        k2       (T - S)^2 / 2 in nats^2; no temperature. Heavy-tailed: clip or use `binary` when spans differ by many nats

    student_span_logp_S, teacher_span_logp_S: [S], nats, <= 0 up to rounding; fp32, or fp64 throughout. Half precision is widened to
    fp32, but its sums are already too coarse (spacing 0.06 nats near -8).
    temperature: tau. A large one keeps u and v away from 0 for long spans; 100 is ALM's.
    scale: multiply binary and abs by tau, or their gradients shrink as 1 / tau. Then dL/dS = -(u - v) / (1 - v), which tends to
    T / S - 1 as tau grows.
    binary and abs are finite for every input, also at T = 0, S = 0 and -inf: T / tau and S / tau are held within [-1e6, -eps], and
    the gradient is zero where S was held. ValueError: shapes that differ, an unknown kind, temperature <= 0.
    """
    if student_span_logp_S.shape != teacher_span_logp_S.shape or student_span_logp_S.ndim != 1:
        raise ValueError(
            f"span_likelihood_kl: student is {list(student_span_logp_S.shape)} and teacher {list(teacher_span_logp_S.shape)}; want "
            "[S] for both, one number per span. Sum token log-probs over spans first, with one alignment for both sides.")
    if kind not in KINDS:
        raise ValueError(f"span_likelihood_kl: kind = {kind!r}; want one of {', '.join(KINDS)}.")
    if not temperature > 0:
        raise ValueError(f"span_likelihood_kl: temperature = {temperature}; want > 0.")
    wide = torch.promote_types(student_span_logp_S.dtype, torch.float32)
    student_S, teacher_S = student_span_logp_S.to(wide), teacher_span_logp_S.detach().to(wide)
    if kind == "k2":
        return (teacher_S - student_S).square().sum() / 2
    log_u, log_v = _held(teacher_S / temperature), _held(student_S / temperature)
    if kind == "abs":
        loss_S = (log_u.expm1() - log_v.expm1()).abs()  # expm1: exp would round u - v away near 1
    else:
        loss_S = log_u.exp() * (log_u - log_v) - log_u.expm1() * (log1mexp(log_u) - log1mexp(log_v))
    return loss_S.sum() * (temperature if scale else 1.0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, and its gradient -exp(x) / (1 - exp(x)), without cancellation (split at -log 2)."""
    near = x > -math.log(2)
    # each branch gets an argument at which it is finite: a NaN times the 0 of `where` would reach the gradient
    return torch.where(near, torch.log(-torch.expm1(x.clamp(min=-1.0))), torch.log1p(-torch.exp(x.clamp(max=-0.5))))


def _held(log_ratio_S: Tensor) -> Tensor:
    return log_ratio_S.clamp(-1e6, -torch.finfo(log_ratio_S.dtype).eps)
