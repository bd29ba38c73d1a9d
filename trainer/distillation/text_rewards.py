"""objective = "policy_gradient": the student's own texts, rewarded by how likely the teacher finds
them.

    R = log p_teacher(text) - log p_student(ids)                                   nats, detached
    loss = - sum over tokens of (R - what the text before the token is worth - baseline) log p

Its expected gradient is that of the KL of the student from the teacher over whole texts, whatever
the two tokenizers: the teacher's part of what is left out is a function of the bytes before the
token (tokenalign.credit.prefix_to_go), and the baseline is the mean of the group's other texts at
the same token.

Shapes: n tokens of one response.
"""

from collections.abc import Sequence

import numpy as np

from reflux.tokenalign.credit import before_each, mean_at, prefix_to_go
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import TextScore


def text_reward(rollout: Rollout, score: TextScore) -> float:
    """R; the stop sets of both sides belong to it where the text ended by itself."""
    own = sum(rollout.logp[: len(rollout.content_ids)])
    stops = score.stop - rollout.stop_logp if rollout.ended else 0.0
    return float(score.logp.sum() - own + stops)


def rewards_to_go(chat: Chat, rollout: Rollout, score: TextScore) -> np.ndarray:
    """[n] R without what the text before each token is worth; all of R where the teacher's prefixes
    are not known.
    """
    n, total = len(rollout.ids), text_reward(rollout, score)
    if score.prefix_logp is None or not n:
        return np.full(n, total)
    lens_n, own_n = chat.table.lens[list(rollout.ids)], np.asarray(rollout.logp)
    start_n = np.minimum(before_each(lens_n), len(score.prefix_logp) - 1)
    return prefix_to_go(total, score.prefix_logp[start_n], before_each(own_n))


def less_the_others(to_go: Sequence[np.ndarray], group: Sequence[int]) -> list[np.ndarray]:
    """Each minus the mean of its group's others at the same token, or at their last one; unchanged
    without others. group: of each text.
    """
    out = []
    for i, mine in enumerate(to_go):
        others = [x for j, x in enumerate(to_go) if j != i and group[j] == group[i] and len(x) > 0]
        out.append(mine - mean_at(np.arange(len(mine)), others) if others else mine)
    return out
