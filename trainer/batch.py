"""The nouns of a step, each frozen and each built from the one before: Prompt -> Rollout -> Sample -> Batch.

Shapes: N rows, L row length, T response tokens of a batch (the positions that carry loss), flat.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One question. `index` is its place in the data set: it identifies the prompt and seeds its rollouts."""

    index: int
    messages: tuple[dict[str, str], ...]  # [{"role": ..., "content": ...}], the last one is the user's
    answer: str | None = None  # what the task's verifier compares with
    response: str | None = None  # a given text (SFT, KD on given text)
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns


@dataclass(frozen=True)
class Rollout:
    """One text for a prompt, by ids of the model that produced it; never re-encoded by that model."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # response tokens; the last one is a stop token iff `ended`
    logp: tuple[float, ...]  # log p of each id under the distribution really sampled (nats); 0.0 for given texts
    stop_logp: float  # log of the stop set's probability where the text ended; 0.0 if it was cut
    text: str  # what `ids` spell, without the stop token
    ended: bool  # False: cut at the length limit
