"""How a policy spells its texts, and what that is worth.

A text has many spellings; a tokenizer makes one of them, the canonical one. The likelihood ratio
divides by the probability of the ids that were sampled,

    r_cal = log p_proxy(text) - log p(ids) = log p_proxy(text) - log p(text) - log p(ids | text)

so in distillable mode a policy gains by spreading over spellings of the same text. With
denominator = "marginal" the last term is left out: p(text) is the sum over the spellings that are
known, the sampled and the canonical one; a lower bound, exact for a policy with no third spelling.

Shapes: n tokens of one response.
"""

from collections.abc import Sequence

import numpy as np

from reflux.tokenalign.offsets import spell
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Engine
from reflux.trainer.rollouts.scoring import score_ids


def canonical_ids(chat: Chat, content_ids: Sequence[int]) -> tuple[int, ...] | None:
    """The tokenizer's own spelling of what `content_ids` spell; None where it makes other bytes of
    it, where the ids end inside a character, and where they hold ids without bytes.
    """
    spelled = spell(chat.table, content_ids)
    text = spelled.text
    if text is None or spelled.cut or not chat.table.lens[list(content_ids)].all():
        return None
    # behind a tokenizer that puts a space in front, a text that begins with one has lost it
    for ids in (chat.encode(text), chat.encode(text[1:]) if text[:1] == " " else ()):
        if chat.table.bytes_of(ids) == spelled.bytes:
            return ids
    return None


def canonical_share(chat: Chat, rollouts: Sequence[Rollout]) -> list[float]:
    """1.0 for each text in its canonical spelling, 0.0 for the others; those without one are left
    out.
    """
    found = [(r.content_ids, canonical_ids(chat, r.content_ids)) for r in rollouts]
    return [float(tuple(ids) == own) for ids, own in found if own is not None]


def marginal_excess(
    chat: Chat,
    engine: Engine,
    rollouts: Sequence[Rollout],
    logp: Sequence[np.ndarray],
    *,
    tokens: int,
    temperature: float,
) -> list[float]:
    """log p(text) - log p(ids) >= 0 of each rollout under the trained policy, nats, by the sampled
    and the canonical spelling. logp: [n] of the sampled ids. Collective.
    """
    others = {}
    for i, r in enumerate(rollouts):
        own = canonical_ids(chat, r.content_ids)
        if own is not None and own != tuple(r.content_ids):
            others[i] = (r.prompt_ids, (*own, *r.ids[len(r.content_ids) :]))
    scores = score_ids(
        engine,
        engine,
        list(others.values()),
        chat,
        tokens=tokens,
        temperature=temperature,
        stop=False,
    )
    excess = [0.0] * len(rollouts)
    for i, score in zip(others, scores):
        excess[i] = float(np.logaddexp(0.0, score.logp.sum() - logp[i].sum()))
    return excess
