"""Where tokens are drawn from a teacher (distill.tail = "sampled"): uniform numbers that belong to
a text, so that a resumed run, other ranks and other micro-batches draw the same tokens.

Shapes: n tokens of a text, K draws.
"""

import hashlib

import numpy as np

from reflux.trainer.data.batch import Rollout


def draw_noise(rollout: Rollout, draws: int, *, seed: int, step: int) -> np.ndarray:
    """[n, K] fp64 in [0, 1), keyed by (seed, step, prompt, ids)."""
    text = repr((rollout.prompt.index, rollout.prompt.repeat, rollout.ids))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    key = np.array([(seed << 32) ^ step, int.from_bytes(digest, "little")], dtype=np.uint64)
    # counter 1: the numbers that sampled the texts start at 0 of keys of their own
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 1, 0]))
    return generator.random((len(rollout.ids), draws))
