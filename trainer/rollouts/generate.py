"""KV-cached sampling on the training weights themselves, with each token's log-probability.

Every random number belongs to (seed, step, prompt, its repeat in the step, group member): a resumed
run, and a run on another number of ranks, samples the same texts, and no generator state needs to
be saved.

Shapes: B rows decoded together, L length so far, T new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

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
    """P prompts -> [P][G] rollouts. `decode` is an engine's or a frozen model's decoder
    (Engine.gathered_weights).

    The log-probabilities are those of the distribution that was sampled, after temperature and
    truncation. `advance` is called with the number of new texts after every block.
    """
    rendered = [chat.prompt_ids(p.messages) for p in prompts]
    jobs = [_Job(p, ids, g) for p, ids in zip(prompts, rendered) for g in range(group)]
    # prompts of one length share a block
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].prompt_ids))
    rollouts: dict[int, Rollout] = {}
    for start in range(0, len(order), sampling.rows):
        block = order[start : start + sampling.rows]
        decoded = _decode_block(decode, chat, [jobs[i] for i in block], sampling)
        rollouts |= zip(block, decoded)
        advance(len(block))
    return [[rollouts[p * group + g] for g in range(group)] for p in range(len(prompts))]


def given_rollout(chat: Chat, prompt: Prompt, max_tokens: int) -> Rollout:
    """The data set's own response as a rollout. It ends with the template's stop token, or is cut
    at max_tokens. ValueError if the prompt has no response.
    """
    if prompt.response is None:
        raise ValueError(
            f"prompt {prompt.index} has no response; want a `response` column (or an assistant's "
            "last message) to train on given text"
        )
    whole = (*chat.encode(prompt.response), chat.stop_id)
    ids, ended = whole[:max_tokens], len(whole) <= max_tokens
    return Rollout(
        prompt,
        chat.prompt_ids(prompt.messages),
        ids,
        (0.0,) * len(ids),
        0.0,
        prompt.response if ended else chat.decode(ids),
        ended,
    )


class _Job(NamedTuple):
    """One text to sample: member `g` of its prompt's group."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    g: int


@torch.no_grad()
def _decode_block(decode: Decode, chat: Chat, jobs: Sequence[_Job], s: Sampling) -> list[Rollout]:
    """One left-padded block, until every row has ended or is full."""
    ids_BL, real_BL = _left_padded(jobs)
    tokens, logps, stops = [], [], []
    with decode(len(jobs), ids_BL.shape[1] + s.max_tokens) as (step, device):
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


def _left_padded(jobs: Sequence[_Job]) -> tuple[Tensor, Tensor]:
    """Prompt ids [B, L] and which of them are real."""
    width = max(len(job.prompt_ids) for job in jobs)
    ids_BL = torch.zeros(len(jobs), width, dtype=torch.long)
    real_BL = torch.zeros(len(jobs), width, dtype=torch.bool)
    for row, job in enumerate(jobs):
        ids_BL[row, width - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
        real_BL[row, width - len(job.prompt_ids) :] = True
    return ids_BL, real_BL


def _rollout(
    chat: Chat, job: _Job, tokens: list[int], logps: list[float], stops: list[float]
) -> Rollout:
    """The text up to the first stop token, which is its last id."""
    end = next((i for i, token in enumerate(tokens) if token in chat.stop_ids), None)
    ended, n = end is not None, len(tokens) if end is None else end + 1
    ids = tuple(tokens[:n])
    return Rollout(
        job.prompt,
        job.prompt_ids,
        ids,
        tuple(logps[:n]),
        stops[n - 1] if ended else 0.0,
        chat.decode(ids[:-1] if ended else ids),
        ended,
    )


def _draw(
    logits_BV: Tensor, noise_B: Tensor, stop_ids: Tensor, s: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverse CDF: token, its log-probability, that of the stop set."""
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
    """-inf outside the top k and outside the smallest set of mass top_p. The most likely token
    always stays.
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


def _noise(jobs: Sequence[_Job], s: Sampling) -> Tensor:
    """Uniform [0, 1) per token, from a generator keyed by (seed, step, prompt, group member); a
    prompt that a step has again starts at another counter.
    """
    if s.greedy:
        return torch.zeros(len(jobs), s.max_tokens)
    rows = []
    for job in jobs:
        key = np.array([(s.seed << 32) ^ s.step, (job.prompt.index << 16) ^ job.g], dtype=np.uint64)
        counter = np.array([0, 0, 0, job.prompt.repeat], dtype=np.uint64)
        noise = np.random.Generator(np.random.Philox(key=key, counter=counter))
        rows.append(noise.random(s.max_tokens))
    return torch.from_numpy(np.stack(rows))
