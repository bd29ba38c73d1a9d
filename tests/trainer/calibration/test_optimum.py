"""Where the objective of docs/method.md, section 3, comes to rest: the stated distributions are put
into the program's own losses, whose expected gradient has to vanish there and nowhere else.

A world of four texts, two tokens out of two each. Every text is weighted by its probability, so
expectations are exact. Un-normalised rewards, policy denominator, rho = 1.
Shapes: A first token, B second token, P prefixes (the empty one and the two first tokens).
"""

import pytest
import torch

from reflux.trainer.losses import HeadInputs, exact_reference_kl, policy_gradient, reference_kl

BETA, ETA = 0.2, 0.5


def model(seed: int) -> torch.Tensor:
    """Log-probabilities of the next token at every prefix, [P, 2]."""
    g = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(3, 2, generator=g, dtype=torch.float64)).log_softmax(-1)


def text_logp(logp_PV: torch.Tensor) -> torch.Tensor:
    """log p(a) + log p(b | a), [A, B]."""
    return logp_PV[0][:, None] + logp_PV[1:]


def as_model(text_AB: torch.Tensor) -> torch.Tensor:
    """Log-probabilities at every prefix of a distribution over texts, [P, 2]."""
    first_A = text_AB.logsumexp(1)
    return torch.cat([first_A[None], text_AB - first_A[:, None]])


def head(logp_PV: torch.Tensor, prefixes: list[int]) -> HeadInputs:
    return HeadInputs(logp_PV[prefixes], torch.eye(2, dtype=logp_PV.dtype), None, 2)


def gradient(logp_PV, original_PV, proxy_PV, estimator: str) -> torch.Tensor:
    """Of the expected loss (5) by the logits at every prefix, [P, 2]."""
    logits_PV = logp_PV.clone().requires_grad_()
    now_PV = logits_PV.log_softmax(-1)
    probability_AB = text_logp(now_PV).detach().exp()
    reward_AB = ETA * (text_logp(proxy_PV) - text_logp(now_PV)).detach()
    total = torch.zeros((), dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            prefixes, tokens = [0, 1 + a], [a, b]
            logp_T, before_T = now_PV[prefixes, tokens], original_PV[prefixes, tokens]
            advantage_T = reward_AB[a, b].repeat(2)
            anchor = torch.zeros(())
            if estimator == "k1_reward":  # what is still to come of the log-ratio
                ratio_T = (logp_T - before_T).detach()
                advantage_T = advantage_T - BETA * ratio_T.flip(0).cumsum(0).flip(0)
            elif estimator == "exact":
                rows = head(logits_PV, prefixes), head(original_PV, prefixes)
                anchor = exact_reference_kl(*rows, temperature=1.0)[0]
            else:
                anchor = reference_kl(logp_T, logp_T.detach(), before_T, estimator)[0]
            loss = policy_gradient(logp_T, logp_T.detach(), advantage_T, 0.2)[0] + BETA * anchor
            total = total + probability_AB[a, b] * loss
    return torch.autograd.grad(total, logits_PV)[0]


def mixture(original_PV: torch.Tensor, proxy_PV: torch.Tensor) -> torch.Tensor:
    """T0^(beta / (beta + eta)) C^(eta / (beta + eta)) over whole texts."""
    text_AB = (BETA * text_logp(original_PV) + ETA * text_logp(proxy_PV)) / (BETA + ETA)
    return as_model(text_AB - text_AB.logsumexp((0, 1)))


def without_what_follows(original_PV: torch.Tensor, proxy_PV: torch.Tensor) -> torch.Tensor:
    """The mixture token by token, less eta / (beta + eta) times the KL(pi || C) still to come: the
    KL to the original of what follows a token is not charged to it.
    """
    token_PV = (BETA * original_PV + ETA * proxy_PV) / (BETA + ETA)
    second_AB = token_PV[1:].log_softmax(-1)
    to_come_A = (second_AB.exp() * (second_AB - proxy_PV[1:])).sum(1)
    first_A = (token_PV[0] - ETA / (BETA + ETA) * to_come_A).log_softmax(-1)
    return torch.cat([first_A[None], second_AB])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "estimator, optimum, another",
    [
        ("k1_reward", mixture, without_what_follows),
        ("exact", without_what_follows, mixture),
        ("k2_loss", without_what_follows, mixture),
        ("k3_is", without_what_follows, mixture),
    ],
)
def test_where_each_anchor_comes_to_rest(estimator, optimum, another, seed):
    original_PV, proxy_PV = model(seed), model(100 + seed)
    at = lambda rest: gradient(rest(original_PV, proxy_PV), original_PV, proxy_PV, estimator)  # noqa: E731
    assert at(optimum).abs().max() < 1e-12
    assert at(another).abs().max() > 1e-3
