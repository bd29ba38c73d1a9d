"""What an inference engine is asked for and what it answers, whoever runs it: in this process
(vllm_engine.py) or behind HTTP (serve.py).

Shapes: n tokens of one text, K top-k entries, L tokens of a scored sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Sampling

LARGEST_GROUP = 1 << 16  # the members of a group count up from their prompt's seed


@dataclass(frozen=True)
class TextRequest:
    """`n` texts behind one prompt. Member g of the group is sampled with `seed` + g."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    top_k: int
    stop_ids: tuple[int, ...]
    vocab_size: int  # ids that count; a head may be padded beyond them


@dataclass(frozen=True, eq=False)
class SampledText:
    """One text as an engine sampled it."""

    ids: np.ndarray  # int64 [n], the stop token included
    logp: np.ndarray  # fp32 [n] of the distribution that was sampled from, nats
    stop_logp: float  # log-probability of the stop set at the last token
    versions: tuple[str, ...]  # of the weights, in order of use; one, if nothing is wrong


@dataclass(frozen=True)
class ScoreRequest:
    """The distributions of a model behind each token of `ids` from `start` on, seen from before it:
    its top-k and the token that is there.
    """

    ids: tuple[int, ...]
    start: int  # at least 1: nothing predicts the first token
    top_k: int  # 0: only the tokens that are there


@dataclass(frozen=True, eq=False)
class ScoredText:
    """The answer to a ScoreRequest for the L - start tokens, at temperature 1; nats."""

    logp: np.ndarray  # fp32 [L - start] of the tokens that are there
    topk_ids: np.ndarray  # int64 [L - start, K], by falling log-probability
    topk_logp: np.ndarray  # fp32 [L - start, K]
    versions: tuple[str, ...]


def group_seed(prompt: Prompt, sampling: Sampling) -> int:
    """The seed of a prompt's group, of (seed, step, prompt, its repeat in the step) alone: a
    resumed run, and one on another number of ranks or servers, asks for the same texts.

    All of its bits are random: torch's generator of a CPU takes the lower 32 only.
    """
    key = f"{sampling.seed} {sampling.step} {prompt.index} {prompt.repeat}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def text_request(prompt: Prompt, chat: Chat, group: int, sampling: Sampling) -> TextRequest:
    """`group` texts of one prompt, under the rules of `sampling`."""
    if group > LARGEST_GROUP:
        raise ValueError(f"rollout.group = {group}; want at most {LARGEST_GROUP}")
    return TextRequest(
        chat.prompt_ids(prompt.messages),
        group,
        group_seed(prompt, sampling),
        sampling.max_tokens,
        0.0 if sampling.greedy else sampling.temperature,
        1.0 if sampling.greedy else sampling.top_p,
        0 if sampling.greedy else sampling.top_k,
        tuple(chat.stop_ids),
        chat.vocab_size,
    )


def rollout_of(prompt: Prompt, request: TextRequest, text: SampledText, chat: Chat) -> Rollout:
    """The text as the rest of the program takes it. ValueError for an answer that breaks the rules:
    too long, going on behind a stop token, without finite log-probabilities.
    """
    ids = tuple(map(int, text.ids))
    stops = [i for i, token in enumerate(ids) if token in chat.stop_ids]
    ended = bool(stops)
    wrong = (
        not ids
        or len(ids) > request.max_tokens
        or (ended and stops[0] != len(ids) - 1)
        or (not ended and len(ids) < request.max_tokens)
        or len(text.logp) != len(ids)
        or not np.isfinite(text.logp).all()
        or min(ids) < 0
        or max(ids) >= request.vocab_size
    )
    if wrong:
        raise ValueError(
            f"prompt {prompt.index}: the engine answered {len(ids)} tokens, stop tokens at "
            f"{stops[:3]}, {len(text.logp)} log-probabilities; want a text that ends with its "
            f"first stop token or has {request.max_tokens} tokens, each of the "
            f"{request.vocab_size} ids with a finite log-probability"
        )
    return Rollout(
        prompt,
        request.prompt_ids,
        ids,
        tuple(map(float, text.logp)),
        float(text.stop_logp) if ended else 0.0,
        chat.decode(ids[:-1] if ended else ids),
        ended,
    )


def check_versions(versions: Sequence[str], wanted: str, source: str) -> None:
    """ValueError unless every token of a text was sampled by the weights named `wanted`."""
    if set(versions) != {wanted}:
        raise ValueError(
            f"{source} answered with the weights {' then '.join(versions) or 'of no name'}; want "
            f"{wanted}. It was restarted, or another run pushes to it: give each run its own "
            "servers"
        )
