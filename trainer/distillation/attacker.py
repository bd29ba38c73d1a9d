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
    did not come to an end, and where it has no positions for the text that it reads and the one
    that it writes. Of this rank's texts. Collective.
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
    rows = [len(chat.prompt_ids(p.messages)) + r.max_tokens for p in prompts]
    asked = [i for i, row in enumerate(rows) if chat.has_room(row)]
    written = [group[0] for group in sampler.sample([prompts[i] for i in asked], 1, sampling)]
    ended = {i: x.text for i, x in zip(asked, written) if x.ended}
    return [ended.get(i) for i in range(len(prompts))]


def _members(rollouts: Sequence[Rollout]) -> list[int]:
    """Which text of its prompt each one is."""
    count: dict[int, int] = {}
    members = []
    for r in rollouts:
        members.append(count.get(r.prompt.index, 0))
        count[r.prompt.index] = members[-1] + 1
    return members


def _asked(cfg: Config, rollout: Rollout) -> dict[str, str]:
    template, question = cfg.distill.paraphrase_template, rollout.prompt.question
    content = fill_template(template, prompt=question, text=rollout.text)
    return {"role": "user", "content": content}


def likeliest(
    engine: Engine, chat: Chat, rollouts: Sequence[Rollout], fraction: float, tokens: int
) -> list[bool]:
    """Which texts are among the `fraction` (rounded up) that the trained model, as it is now, finds
    likeliest: by log p(text and stop | prompt) / number of its tokens, in its own tokens; of equal
    ones the first. Texts that are longer than its rows come last, for it cannot learn from them.
    rollouts: the same on every rank. Collective.
    """
    mine = range(engine.rank, len(rollouts), engine.world)
    read = [
        (chat.prompt_ids(rollouts[i].prompt.messages), chat.encode(rollouts[i].text)) for i in mine
    ]
    jobs = {i: ids for i, ids in zip(mine, read) if sum(map(len, ids)) <= engine.seq_len}
    scores = score_ids(engine, engine, list(jobs.values()), chat, tokens=tokens)
    rows = [(-math.inf, -i) for i in mine if i not in jobs]
    for i, s in zip(jobs, scores):
        stop = s.stop if rollouts[i].ended else 0.0
        length = max(len(s.logp) + rollouts[i].ended, 1)
        rows.append(((float(s.logp.sum()) + stop) / length, -i))
    best = sorted(engine.gather(rows), reverse=True)[: math.ceil(fraction * len(rollouts))]
    kept = {-i for _, i in best}
    return [i in kept for i in range(len(rollouts))]
