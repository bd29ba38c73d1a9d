"""Definitions that the distillation tests compare with."""

import torch
from transformers import AutoModelForCausalLM

GIVEN = {"source": "dataset", "on_policy": 0.0}


KL_KEYS = ("loss", "grad_norm")


def logp_nV(folder, sample, prompt_ids=None) -> torch.Tensor:
    """Log-probabilities at the response's predictors, by transformers."""
    model, r = AutoModelForCausalLM.from_pretrained(folder), sample.rollout
    prompt = prompt_ids or r.prompt_ids
    with torch.no_grad():
        return (
            model(torch.tensor([prompt + r.ids]))
            .logits[0, len(prompt) - 1 : -1]
            .double()
            .log_softmax(-1)
        )


def mean_over_tokens(talkers, samples, loss_of) -> float:
    """What the first step's loss is by definition: sum over all response tokens, divided once."""
    total = 0.0
    for s in samples:
        prompt_ids = s.teacher_views[0].prompt_ids if any(s.teacher_views) else None
        student_nV = logp_nV(talkers / "policy", s)
        total += float(loss_of(student_nV, logp_nV(talkers / "teacher", s, prompt_ids), s))
    return total / sum(len(s.rollout.ids) for s in samples)


def kl(p_nV, q_nV):
    return (p_nV.exp() * (p_nV - q_nV)).sum()
