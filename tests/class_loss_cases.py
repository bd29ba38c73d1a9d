"""Logits, dense definitions and gradients of class losses, for several test files."""

import math

import numpy as np
import torch

from reflux.kernels.teacher_topk import TopK
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import OUT

f64 = torch.float64


def logits_of(vocabulary, seed, S=3, scale=2.0):
    rng = np.random.default_rng([seed, vocabulary.num_rows])
    return torch.from_numpy(scale * rng.normal(size=(S, vocabulary.num_rows)))


def dense(built):
    """(W [V, N] of the student, its twin of the teacher): class masses are p @ W."""

    def one_hot(classes):
        x = np.zeros((len(classes), built.num_classes))
        x[np.flatnonzero(classes != OUT), classes[classes != OUT]] = 1
        return torch.from_numpy(x)

    if isinstance(built, Projection):
        W = torch.zeros(built.student_rows, built.num_classes, dtype=f64)
        W[built.student_id.astype(np.int64), built.column.astype(np.int64)] = torch.from_numpy(
            built.weight
        )
        return W, one_hot(built.teacher_class)
    return one_hot(built.student_class), one_hot(built.teacher_class)


def probs(logits, W, temperature=1.0):
    """softmax over the ids that the map knows."""
    return (logits / temperature).masked_fill(W.sum(1) == 0, -math.inf).softmax(1)


def gradient(f, *logits):
    z = logits[0].clone().requires_grad_()
    loss = f(z, *logits[1:])
    (grad,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), grad


def topk_of(logits, k, temperature=1.0):
    logp = (logits / temperature).log_softmax(1)
    top = logp.topk(k, 1)
    tail = logp.scatter(1, top.indices, -math.inf)
    return TopK(top.indices.int(), top.values, tail.logsumexp(1))
