"""What an attacker does with the texts that it has bought before it trains on them: it lets another
model paraphrase them, and keeps those that its own student finds likeliest.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from reflux.trainer.config.roles import paraphraser_of
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompt import fill_template
from reflux.trainer.phase import Engine, Sampling
from reflux.trainer.rollouts.generate import EmbeddedSampler
from reflux.trainer.rollouts.scoring import score_ids


def paraphrase(cfg: Config, engine: Engine, rollouts: Sequence[Rollout]) -> list[str | None]:
    """What distill.paraphraser makes of each text, sampled at rollout.temperature; None where it
    did not come to an end. Of this rank's texts. Collective.
    """
    spec = paraphraser_of(cfg)
    chat, model = Chat.of(spec), engine.frozen(spec)
    sampler = EmbeddedSampler(partial(engine.gathered_frozen_weights, model), chat)
    prompts = [
        # random numbers are keyed by the index: every text has its own, on any number of ranks
        replace(r.prompt, index=r.prompt.index + (i << 32), messages=(_asked(cfg, r),))
        for i, r in zip(_members(rollouts), rollouts)
    ]
    r = cfg.rollout
    sampling = Sampling(r.max_tokens, cfg.seed, 0, r.temperature, r.top_p, r.top_k, r.rows)
    written = [group[0] for group in sampler.sample(prompts, 1, sampling)]
    return [x.text if x.ended else None for x in written]


def _members(rollouts: Sequence[Rollout]) -> list[int]:
    """Which text of its prompt each one is."""
    count: dict[int, int] = {}
    members = []
    for r in rollouts:
        members.append(count.get(r.prompt.index, 0))
        count[r.prompt.index] = members[-1] + 1
    return members


def _asked(cfg: Config, rollout: Rollout) -> dict[str, str]:
    question = str(rollout.prompt.messages[-1]["content"])
    template = cfg.distill.paraphrase_template
    content = fill_template(template, prompt=question, text=rollout.text)
    return {"role": "user", "content": content}


def likeliest(
    engine: Engine, chat: Chat, rollouts: Sequence[Rollout], fraction: float, tokens: int
) -> list[bool]:
    """Which texts are among the `fraction` (rounded up) that the trained model, as it is now, finds
    likeliest: by log p(text and stop | prompt) / number of its tokens, in its own tokens; of equal
    ones the first. rollouts: the same on every rank. Collective.
    """
    mine = range(engine.rank, len(rollouts), engine.world)
    jobs = [
        (chat.prompt_ids(rollouts[i].prompt.messages), chat.encode(rollouts[i].text)) for i in mine
    ]
    scores = score_ids(engine, engine, jobs, chat, tokens=tokens)
    rows = []
    for i, s in zip(mine, scores):
        stop = s.stop if rollouts[i].ended else 0.0
        length = max(len(s.logp) + rollouts[i].ended, 1)
        rows.append(((float(s.logp.sum()) + stop) / length, -i))
    best = sorted(engine.gather(rows), reverse=True)[: math.ceil(fraction * len(rollouts))]
    kept = {-i for _, i in best}
    return [i in kept for i in range(len(rollouts))]
