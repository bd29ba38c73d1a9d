"""The five divergences between a student p and a teacher q, each defined once; their chain rule.

    forward       KL(q || p)
    reverse       KL(p || q)
    jsd           beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
    skew_forward  KL(q || beta q + (1 - beta) p)
    skew_reverse  KL(p || beta p + (1 - beta) q)

jsd: generalised Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649); beta weighs the
teacher, others have it the other way round. skew: Ko et al., arXiv:2402.03898, where beta weighs
the side that the expectation is over: the teacher in skew_forward, the student in skew_reverse.

With l_i the summand of class i, g_i = dl/dlog p_i and G = sum g_i, every loss has dL/dz_i = (g_i -
p_i G) / temperature. Every mask asks p == 0, not p > 0: a NaN must reach the loss, where it is
counted, and not pass for an absent class. `terms` returns g shifted by a multiple of p, which drops
out because p sums to one: near p = q the true g is close to that multiple and the difference with p
G would cancel.
"""

import torch
from torch import Tensor

from ._triton import tl, triton

# their index is DIVERGENCE in the kernels
DIVERGENCES = ("forward", "reverse", "jsd", "skew_forward", "skew_reverse")


def largest_gradient(divergence: str) -> float:
    """A bound of |dD/dlogits| at temperature 1. Reverse KL has none: its own is half the range of
    log p - log q where p has mass, and 1000 is far beyond the logits of any model.
    """
    return {"reverse": 1000.0, "skew_reverse": 16.0}.get(divergence, 2.0)


def check_divergence(op: str, divergence: str, beta: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"{op}: divergence is {divergence!r}; want one of {', '.join(DIVERGENCES)}"
        )
    plain = divergence in ("forward", "reverse")
    if not (plain or 0 < beta < 1):
        raise ValueError(
            f"{op}: beta is {beta} with divergence={divergence!r}; want 0 < beta < 1. At 0 and 1 "
            "jsd is 0, not a KL: use divergence='forward' or 'reverse'"
        )


def _masked(p: Tensor, d: Tensor) -> Tensor:
    """p * d, exactly 0 where p is 0, in value and in gradient, even where d is infinite."""
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, d))


def _log_mix(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(weight_a e^log_a + (1 - weight_a) e^log_b); either or both may be -inf."""
    top = torch.maximum(log_a, log_b).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    mix = weight_a * (log_a - top).exp() + (1 - weight_a) * (log_b - top).exp()
    return top + torch.where(mix == 0, 1.0, mix).log() + torch.where(mix == 0, -torch.inf, 0.0)


def divergence_ref(logp: Tensor, logq: Tensor, divergence: str, beta: float) -> Tensor:
    """The definition, summed over the last axis; differentiable. logp: student, logq: teacher."""
    p, q = logp.exp(), logq.exp()
    if divergence == "forward":
        return _masked(q, logq - logp).sum(-1)
    if divergence == "reverse":
        return _masked(p, logp - logq).sum(-1)
    if divergence == "jsd":
        logm = _log_mix(logq, logp, beta)
        return beta * _masked(q, logq - logm).sum(-1) + (1 - beta) * _masked(p, logp - logm).sum(-1)
    if divergence == "skew_forward":
        return _masked(q, logq - _log_mix(logq, logp, beta)).sum(-1)
    return _masked(p, logp - _log_mix(logp, logq, beta)).sum(-1)


def divergence_terms(
    logp: Tensor, logq: Tensor, divergence: str, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(l, g, p) of every class, g shifted as the module says. The CPU twin of `terms`."""
    p, q = logp.exp(), logq.exp()
    if divergence == "forward":
        return torch.where(q == 0, 0.0, q * (logq - logp)), -q, p
    if divergence == "reverse":
        loss = torch.where(p == 0, 0.0, p * (logp - logq))
        return loss, loss, p
    if divergence == "jsd":
        logm = _log_mix(logq, logp, beta)
        student = torch.where(p == 0, 0.0, (1 - beta) * p * (logp - logm))
        return student + torch.where(q == 0, 0.0, beta * q * (logq - logm)), student, p
    if divergence == "skew_forward":
        logm = _log_mix(logq, logp, beta)
        loss = torch.where(q == 0, 0.0, q * (logq - logm))
        return loss, torch.where(p == 0, 0.0, (beta - 1) * p * torch.expm1(logq - logm)), p
    logm = _log_mix(logp, logq, beta)
    loss = torch.where(p == 0, 0.0, p * (logp - logm))
    return loss, loss - torch.where(p == 0, 0.0, beta * p * torch.expm1(logp - logm)), p


@triton.jit
def exp_diff(x, m):
    # exp(x - m), with exp(-inf - -inf) := 0
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - m))


@triton.jit
def log_mix(log_a, log_b, weight_a):
    top = tl.maximum(log_a, log_b)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(weight_a * tl.exp(log_a - top) + (1.0 - weight_a) * tl.exp(log_b - top))


@triton.jit
def terms(logp, logq, diff, beta, DIVERGENCE: tl.constexpr):
    # diff = logp - logq comes from the caller, who can form it without cancelling two logsumexps
    p = tl.exp(logp)
    q = tl.exp(logq)
    if DIVERGENCE == 0:
        loss = tl.where(q == 0, 0.0, -q * diff)
        g = -q
    elif DIVERGENCE == 1:
        loss = tl.where(p == 0, 0.0, p * diff)
        g = loss
    elif DIVERGENCE == 2:
        logm = log_mix(logq, logp, beta)
        g = tl.where(p == 0, 0.0, (1.0 - beta) * p * (logp - logm))
        loss = g + tl.where(q == 0, 0.0, beta * q * (logq - logm))
    elif DIVERGENCE == 3:
        logm = log_mix(logq, logp, beta)
        loss = tl.where(q == 0, 0.0, q * (logq - logm))
        g = tl.where(p == 0, 0.0, (1.0 - beta) * p * (1.0 - tl.exp(logq - logm)))
    else:
        logm = log_mix(logp, logq, beta)
        loss = tl.where(p == 0, 0.0, p * (logp - logm))
        g = loss + tl.where(p == 0, 0.0, beta * p * (1.0 - tl.exp(logp - logm)))
    return loss, g
