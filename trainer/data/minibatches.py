"""Mini-batches of a step: which of an epoch's optimizer updates each prompt belongs to.

P prompts are dealt to M mini-batches of whole groups, P / M prompts each, anew in every epoch. Of
every M consecutive prompts of the step's batch each goes to another mini-batch: ranks hold
consecutive parts, so they get equal work wherever M divides a rank's part. The deal is a pure
function of its arguments: nothing to checkpoint, and the same for any number of ranks.
"""

from collections.abc import Sequence

import numpy as np

from .batch import Sample
from .prompt import Prompt

Key = tuple[int, int]  # a prompt of a step: (index, repeat)


def key_of(prompt: Prompt) -> Key:
    return prompt.index, prompt.repeat


def deal(
    keys_P: Sequence[Key | None], count: int, *, seed: int, step: int, epoch: int
) -> dict[Key, int]:
    """The mini-batch, 0 ... count - 1, of every prompt of the global batch, in the batch's order.
    None: a place whose texts are dropped. A prompt that is there twice goes where its first place
    goes.
    """
    # RandomState's stream is frozen (NEP 19); see prompts._permutation
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, step, epoch]
    random = np.random.RandomState(words)
    dealt: dict[Key, int] = {}
    for start in range(0, len(keys_P), count):
        order = random.permutation(count).tolist()
        for key, minibatch in zip(keys_P[start : start + count], order):
            if key is not None:
                dealt.setdefault(key, minibatch)
    return dealt


def split(samples: Sequence[Sample], dealt: dict[Key, int], count: int) -> list[list[Sample]]:
    """This rank's samples by mini-batch; some may be empty."""
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for sample in samples:
        parts[dealt[key_of(sample.rollout.prompt)]].append(sample)
    return parts
