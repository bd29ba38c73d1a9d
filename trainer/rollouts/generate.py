"""Texts out of a model: KV-cached sampling on the training weights themselves, with each token's
log-probability.

Every random number belongs to (seed, step, prompt, group member): a resumed run, and a run on
another number of ranks, samples the same texts, and nothing needs to be saved.

Shapes: B rows decoded together, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Advance, Decode, Sampling
from reflux.trainer.runs.progress import ignore


@dataclass(frozen=True)
class EmbeddedSampler:
    """Samples from weights on this machine: a Sampler. `weights` gathers them for decoding, e.g.
    engine.gathered_weights; every call of `sample` gathers them anew.
    """

    weights: Callable[[], AbstractContextManager[Decode]]
    chat: Chat

    def sample(
        self,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        advance: Advance = ignore,
    ) -> list[list[Rollout]]:
        """P prompts -> [P][G] rollouts. Collective."""
        with self.weights() as decode:
            return generate(decode, self.chat, prompts, group, sampling, advance)


def generate(
    decode: Decode,
    chat: Chat,
    prompts: Sequence[Prompt],
    group: int,
    sampling: Sampling,
    advance: Advance = ignore,
) -> list[list[Rollout]]:
    """P prompts -> [P][G] rollouts. `decode` is an engine's or a frozen model's decoder (see
    titan_decode.kv_decoder).

    The log-probabilities are those of the distribution that was sampled, after temperature and
    truncation. `advance` is told how many texts are new after every block.
    """
    rendered = [chat.prompt_ids(p.messages) for p in prompts]
    jobs = [(p, ids, g) for p, ids in zip(prompts, rendered) for g in range(group)]
    # prompts of one length share a block
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][1]))
    done: list[Rollout | None] = [None] * len(jobs)
    for start in range(0, len(order), sampling.rows):
        block = order[start : start + sampling.rows]
        for i, rollout in zip(
            block, _decode_block(decode, chat, [jobs[i] for i in block], sampling)
        ):
            done[i] = rollout
        advance(len(block))
    return [done[i : i + group] for i in range(0, len(done), group)]


def given_rollout(chat: Chat, prompt: Prompt, max_tokens: int) -> Rollout:
    """The data set's own response as a rollout, closed by the template's stop token unless it has
    to be cut.
    """
    if prompt.response is None:
        raise ValueError(
            f"prompt {prompt.index} has no response; want a `response` column (or an assistant's "
            "last message) to train on given text"
        )
    ids = (*chat.encode(prompt.response), chat.stop_id)
    ended = len(ids) <= max_tokens
    return Rollout(
        prompt,
        chat.prompt_ids(prompt.messages),
        ids[:max_tokens],
        (0.0,) * min(len(ids), max_tokens),
        0.0,
        prompt.response if ended else chat.decode(ids[:max_tokens]),
        ended,
    )


@torch.no_grad()
def _decode_block(
    decode: Decode, chat: Chat, jobs: Sequence[tuple[Prompt, tuple, int]], s: Sampling
) -> list[Rollout]:
    """One left-padded block, until every row has ended or is full."""
    width = max(len(ids) for _, ids, _ in jobs)
    ids_BL = torch.zeros(len(jobs), width, dtype=torch.long)
    real_BL = torch.zeros(len(jobs), width, dtype=torch.bool)
    for row, (_, ids, _) in enumerate(jobs):
        ids_BL[row, width - len(ids) :] = torch.tensor(ids)
        real_BL[row, width - len(ids) :] = True
    tokens, logps, stops = [], [], []
    with decode(len(jobs), width + s.max_tokens) as (step, device):
        ids_BL, real_BL = ids_BL.to(device), real_BL.to(device)
        position_BL = (real_BL.long().cumsum(1) - 1).clamp(min=0)
        noise_BT = _noise(jobs, s).to(device)
        stop_ids = torch.tensor(chat.stop_ids, device=device)
        done_B = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        for t in range(s.max_tokens):
            logits_BV = step(ids_BL, position_BL, real_BL, t == 0)[:, : chat.vocab_size]
            token_B, logp_B, stop_B = _draw(logits_BV.float(), noise_BT[:, t], stop_ids, s)
            token_B = torch.where(done_B, stop_ids[0], token_B)
            tokens.append(token_B)
            logps.append(logp_B)
            stops.append(stop_B)
            done_B = done_B | torch.isin(token_B, stop_ids)
            # a look at the flag stalls a GPU
            if (device.type == "cpu" or t % 8 == 7) and bool(done_B.all()):
                break
            real_BL = torch.cat([real_BL, real_BL.new_ones(len(jobs), 1)], 1)
            position_BL = position_BL[:, -1:] + 1
            ids_BL = token_B[:, None]
    columns = [torch.stack(x, 1).tolist() for x in (tokens, logps, stops)]
    return [_rollout(chat, job, *row) for job, *row in zip(jobs, *columns)]


def _rollout(
    chat: Chat,
    job: tuple[Prompt, tuple, int],
    tokens: list[int],
    logps: list[float],
    stops: list[float],
) -> Rollout:
    prompt, prompt_ids, _ = job
    end = next((i for i, token in enumerate(tokens) if token in chat.stop_ids), None)
    ended, n = end is not None, len(tokens) if end is None else end + 1
    ids = tuple(tokens[:n])
    return Rollout(
        prompt,
        prompt_ids,
        ids,
        tuple(logps[:n]),
        stops[n - 1] if ended else 0.0,
        chat.decode(ids[:-1] if ended else ids),
        ended,
    )


def _draw(
    logits_BV: Tensor, noise_B: Tensor, stop_ids: Tensor, s: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverse CDF: token, its log-probability, the stop set's
    log-probability.
    """
    if s.greedy:
        logp_BV = logits_BV.log_softmax(-1)
        token_B = logp_BV.argmax(-1)
    else:
        logp_BV = _truncate(logits_BV / s.temperature, s).log_softmax(-1)
        cdf_BV = logp_BV.double().exp().cumsum(-1)
        u_B1 = noise_B.double()[:, None] * cdf_BV[:, -1:]
        token_B = torch.searchsorted(cdf_BV, u_B1, right=True)[:, 0].clamp(
            max=logits_BV.shape[1] - 1
        )
    logp_B = logp_BV.gather(1, token_B[:, None])[:, 0]
    return token_B, logp_B, logp_BV[:, stop_ids].logsumexp(-1)


def _truncate(logits_BV: Tensor, s: Sampling) -> Tensor:
    """-inf outside the top k and outside the smallest set of mass top_p (the most likely token
    always stays).
    """
    if s.top_k:
        kth_B1 = logits_BV.topk(min(s.top_k, logits_BV.shape[1]), -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if s.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
        drop_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(
            1, order_BV, before_BV >= s.top_p
        )
        logits_BV = logits_BV.masked_fill(drop_BV, -torch.inf)
    return logits_BV


def _noise(jobs: Sequence[tuple[Prompt, tuple, int]], s: Sampling) -> Tensor:
    """Uniform [0, 1) per token, from a counter keyed by (seed, step, prompt, group member)."""
    if s.greedy:
        return torch.zeros(len(jobs), s.max_tokens)
    rows = []
    for prompt, _, g in jobs:
        key = np.array([(s.seed << 32) ^ s.step, (prompt.index << 16) ^ g], dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(s.max_tokens))
    return torch.from_numpy(np.stack(rows))
