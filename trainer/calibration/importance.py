"""Truncated importance weights: what a token that another program sampled counts for.

    w = min(p_trainer(token) / p_sampler(token), max_is)

An engine computes slightly other probabilities than the trainer does. E_sampler[w A grad log p] is
the gradient that the trainer's own samples would give, but for what the truncation takes off; it
bounds the variance. After Ionides (2008), "Truncated importance sampling", for policy gradients as
in Yao et al. (2025), "Your efficient RL framework secretly brings you off-policy RL training".

Shapes: n tokens of one response.
"""

import numpy as np


def importance_weights(
    trainer_logp_n: np.ndarray, sampler_logp_n: np.ndarray, max_is: float
) -> np.ndarray:
    """w [n], float64, of log-probabilities in nats."""
    return np.exp(np.minimum(_gap(trainer_logp_n, sampler_logp_n), np.log(max_is)))


def are_truncated(
    trainer_logp_n: np.ndarray, sampler_logp_n: np.ndarray, max_is: float
) -> np.ndarray:
    """[n], bool. Not asked of the weights: e^log(5) is less than 5 in float64."""
    return _gap(trainer_logp_n, sampler_logp_n) > np.log(max_is)


def _gap(trainer_logp_n: np.ndarray, sampler_logp_n: np.ndarray) -> np.ndarray:
    return np.asarray(trainer_logp_n, np.float64) - np.asarray(sampler_logp_n, np.float64)
