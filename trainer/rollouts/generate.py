"""KV-cached sampling on the training weights themselves, with each token's log-probability.

Every random number belongs to (seed, step, prompt, its repeat in the step, group member): a resumed
run, and a run on another number of ranks, samples the same texts, and no generator state needs to
be saved.

Shapes: B rows decoded together, P distinct prompts of them, L length so far, T new tokens, V
vocabulary, K blocks of it.
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
from reflux.trainer.runs.progress import ignore, inside_step

LOOK_EVERY = 8  # tokens between two looks at which rows have ended, on a GPU
LEAVING = 0.125  # fraction of the rows that has to have ended before they are left out
BLOCK = 128  # tokens that are summed before a draw looks at each of them


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
    jobs = [
        _Job(p, rendered[i], g, sampling.limit(i))
        for i, p in enumerate(prompts)
        for g in range(group)
    ]
    # prompts of one length share a block
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].prompt_ids))
    rollouts: dict[int, Rollout] = {}
    most = sum(job.limit for job in jobs)
    with inside_step("sampling", most, "tokens", at_most=True) as count:
        for start in range(0, len(order), sampling.rows):
            block = order[start : start + sampling.rows]
            decoded = _decode_block(decode, chat, [jobs[i] for i in block], sampling, count)
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
    limit: int  # tokens of the text, at most


@torch.no_grad()
def _decode_block(
    decode: Decode, chat: Chat, jobs: Sequence[_Job], s: Sampling, count: Advance
) -> list[Rollout]:
    """One block, until every row has ended or is full. Equal prompts are fed once; rows that have
    ended are left out. `count` is called with the new tokens of each step.
    """
    prompts, rows = _distinct(jobs)
    ids_PL, real_PL = _left_padded(prompts)
    width, longest = ids_PL.shape[1], max(job.limit for job in jobs)
    with decode(len(jobs), width + longest) as (step, device):
        stop_ids = torch.tensor(chat.stop_ids, device=device)
        texts = _Texts(jobs, longest, stop_ids, device)
        noise_BT = _noise(jobs, s).to(device)
        real_BL = torch.ones(len(jobs), width + longest, dtype=torch.bool, device=device)
        rows_B = torch.tensor(rows, device=device)
        real_BL[:, :width] = real_PL.to(device)[rows_B]
        position_PL = (real_PL.long().cumsum(1) - 1).clamp(min=0).to(device)
        logits_PV = step(ids_PL.to(device), position_PL, real_PL.to(device), True)
        logits_BV, position_B1 = logits_PV[rows_B], position_PL[rows_B, -1:]
        # a row that is full stays until others leave: at a position that the model has
        last_B1 = position_B1 + torch.tensor([[job.limit - 1] for job in jobs], device=device)
        goes_on_with_B: Tensor | None = None if len(prompts) == len(jobs) else rows_B
        for t in range(longest):
            logits_BV = logits_BV[:, : chat.vocab_size].float()
            token_B, left = texts.add(t, *_draw(logits_BV, noise_BT[:, t], stop_ids, s))
            count(len(token_B))
            if texts.done or t + 1 == longest:
                break
            if left is not None:  # rows that go on
                token_B, noise_BT, real_BL, position_B1, last_B1 = (
                    x[left] for x in (token_B, noise_BT, real_BL, position_B1, last_B1)
                )
                goes_on_with_B = left if goes_on_with_B is None else goes_on_with_B[left]
            position_B1 = torch.minimum(position_B1 + 1, last_B1)
            real = real_BL[:, : width + t + 1]
            logits_BV = step(token_B[:, None], position_B1, real, False, goes_on_with_B)
            goes_on_with_B = None
    return [_rollout(chat, job, *row) for job, *row in zip(jobs, *texts.columns())]


def _distinct(jobs: Sequence[_Job]) -> tuple[list[_Job], list[int]]:
    """One job of each prompt, and which of them each job has the prompt of."""
    place: dict[tuple[int, ...], int] = {}
    rows = [place.setdefault(job.prompt_ids, len(place)) for job in jobs]
    first = {row: job for row, job in zip(reversed(rows), reversed(jobs))}
    return [first[row] for row in range(len(place))], rows


class _Texts:
    """What the rows of a block have become. Rows that have ended leave it once there are enough of
    them: a copy of the caches of the others costs about a step.
    """

    def __init__(self, jobs: Sequence[_Job], longest: int, stop_ids: Tensor, device: torch.device):
        shape = len(jobs), longest
        self._stop_ids, self._on_cpu = stop_ids, device.type == "cpu"
        # filled with a stop: a row that has left has ended before
        self._tokens = torch.full(shape, int(stop_ids[0]), device=device)
        self._logps, self._stops = torch.zeros(2, *shape, device=device)
        self._rows_B = torch.arange(len(jobs), device=device)  # those that are still decoded
        self._done_B = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        self._limit_B = torch.tensor([job.limit for job in jobs], device=device)
        self.done = False

    def add(
        self, t: int, token_B: Tensor, logp_B: Tensor, stop_B: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Token t of every decoded row. Returns the tokens, and the rows to go on with, where some
        leave.
        """
        token_B = torch.where(self._done_B, self._stop_ids[0], token_B)
        self._tokens[self._rows_B, t] = token_B
        self._logps[self._rows_B, t], self._stops[self._rows_B, t] = logp_B, stop_B
        full_B = self._limit_B[self._rows_B] <= t + 1
        self._done_B = self._done_B | full_B | torch.isin(token_B, self._stop_ids)
        if not self._on_cpu and t % LOOK_EVERY != LOOK_EVERY - 1:  # a look stalls a GPU
            return token_B, None
        ended = int(self._done_B.sum())
        self.done = ended == len(self._done_B)
        if self.done or ended < LEAVING * len(self._done_B):
            return token_B, None
        left = (~self._done_B).nonzero()[:, 0]
        self._rows_B, self._done_B = self._rows_B[left], self._done_B[left]
        return token_B, left

    def columns(self) -> list[list[list]]:
        """Tokens, their log-probabilities, those of the stop set, of every row."""
        return [x.tolist() for x in (self._tokens, self._logps, self._stops)]


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
    """The text up to the first stop token, which is its last id, or to its limit."""
    tokens = tokens[: job.limit]
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
    """One token a row by inverse CDF: token, its log-probability, that of the stop set.

    The CDF is summed in float64, of blocks first and then inside the one that was hit: float32 sums
    of a large vocabulary are 6e-8 apart near 1, which is more than many a token holds.
    """
    if s.greedy:
        logp_BV = logits_BV.log_softmax(-1)
        token_B = logp_BV.argmax(-1)
    else:
        logp_BV = _truncate(logits_BV / s.temperature, s).log_softmax(-1)
        token_B = _drawn(logp_BV.exp(), noise_B.double())
    logp_B = logp_BV.gather(1, token_B[:, None])[:, 0]
    return token_B, logp_B, logp_BV[:, stop_ids].logsumexp(-1)


def _drawn(weight_BV: Tensor, noise_B: Tensor) -> Tensor:
    """Tokens [B] drawn by weight, where noise in [0, 1) falls."""
    B, V = weight_BV.shape
    weight_BKL = torch.nn.functional.pad(weight_BV, (0, -V % BLOCK)).view(B, -1, BLOCK)
    ends_BK = weight_BKL.sum(2, dtype=torch.float64).cumsum(1)
    at_B1 = noise_B[:, None] * ends_BK[:, -1:]
    block_B1 = torch.searchsorted(ends_BK, at_B1, right=True).clamp(max=ends_BK.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, ends_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    rows_B = torch.arange(B, device=weight_BV.device)
    inside_BL = weight_BKL[rows_B, block_B1[:, 0]].double().cumsum(1)
    # where rounding leaves none, the last one that has a weight
    last_B1 = (inside_BL < inside_BL[:, -1:]).sum(1, keepdim=True)
    place_B1 = torch.searchsorted(inside_BL, at_B1 - before_B1, right=True)
    return (block_B1 * BLOCK + torch.minimum(place_B1, last_B1))[:, 0]


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
