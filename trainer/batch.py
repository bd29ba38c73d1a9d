"""The nouns of a step, each frozen and each built from the one before: Prompt -> Rollout -> Sample -> Batch.

Shapes: N rows, L row length, T response tokens of a batch (the positions that carry loss), S spans, n tokens of one response.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


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

    @property
    def content_ids(self) -> tuple[int, ...]:
        """The response without its stop token."""
        return self.ids[:-1] if self.ended else self.ids


@dataclass(frozen=True, eq=False)
class Sample:
    """A scored rollout: what the loss needs of it, one entry per response token."""

    rollout: Rollout
    advantage: np.ndarray | None = None  # [n] calibrate: A of equation (4)
    old_logp: np.ndarray | None = None  # [n] log-probabilities of the behaviour policy, nats
    off_policy: bool = False  # distill: the text is not the student's own
    span: np.ndarray | None = None  # [n] span of each token, -1 = outside every span
    teacher_span_logp: np.ndarray | None = None  # [S] the teacher's log-probability of each span, nats
    teacher_prompt_ids: tuple[int, ...] | None = None  # where the teacher renders the prompt with another template


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank. Response tokens are listed flat; `row_T` finds each one's predictor."""

    input_NL: Tensor
    position_NL: Tensor  # restarts at 0 with every document of a packed row
    row_T: Tensor  # index into the flattened [N * L] positions: the logits there predict target_T
    target_T: Tensor
    advantage_T: Tensor
    old_logp_T: Tensor
    off_policy_T: Tensor  # 1.0 where the text is not the student's own
    span_T: Tensor  # global in the batch, -1 = outside
    teacher_span_logp_S: Tensor
    sample_T: Tensor  # which of the packed samples a token belongs to
    packed: bool = False
    teacher_view: tuple[Tensor, Tensor, Tensor] | None = None  # input, position, row for a teacher with its own template

    @property
    def tokens(self) -> int:
        return len(self.target_T)

    def to(self, device: torch.device) -> "Batch":
        move = lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        if self.teacher_view is not None:
            moved["teacher_view"] = tuple(map(move, self.teacher_view))
        return replace(self, **moved)

    def for_teacher(self) -> "Batch":
        """The same response tokens behind the teacher's own rendering of the prompts."""
        if self.teacher_view is None:
            return self
        input_NL, position_NL, row_T = self.teacher_view
        return replace(self, input_NL=input_NL, position_NL=position_NL, row_T=row_T)


def pack(samples: Sequence[Sample], *, tokens: int, seq_len: int, joined: bool = False) -> list[Batch]:
    """Ragged samples, all different objects -> micro-batches of at most `tokens` positions (one row at least), padding included.

    A sequence is prompt + response; its inputs are all but the last token, its targets the response tokens, so the first
    target is predicted at the last prompt position. Long rows come first, so that rows of one length share a batch.
    With `joined`, short sequences share rows of `seq_len`.  Raises ValueError for a sequence longer than `seq_len`.
    """
    for s in samples:
        length = len(s.rollout.prompt_ids) + len(s.rollout.ids)
        if length > seq_len + 1 or not s.rollout.prompt_ids:
            raise ValueError(f"prompt {s.rollout.prompt.index}: {len(s.rollout.prompt_ids)} prompt and {len(s.rollout.ids)} "
                             f"response tokens; want at least 1 prompt token and at most training.seq_len + 1 = {seq_len + 1} "
                             "in all. Raise training.seq_len or lower rollout.max_tokens")
    order = {id(s): i for i, s in enumerate(samples)}
    rows = _join(samples, seq_len) if joined else [[s] for s in sorted(samples, key=_length, reverse=True)]
    batches, start = [], 0
    while start < len(rows):
        width = _width(rows[start])
        count = max(1, tokens // max(width, 1))
        batches.append(_batch(rows[start:start + count], joined, order))
        start += count
    return batches


def empty_batch() -> Batch:
    """A row of one token and no targets: keeps a rank that ran dry in step with the others."""
    long, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    zero_NL = torch.zeros(1, 1, dtype=torch.long)
    return Batch(zero_NL, zero_NL, long, long, real, real, real, long, real, long)


def _length(sample: Sample) -> int:
    """Inputs of the longer rendering: a teacher's template may be the longer one, and its forward has to fit too."""
    return max(len(sample.rollout.prompt_ids), len(sample.teacher_prompt_ids or ())) + len(sample.rollout.ids) - 1


def _width(row: list[Sample]) -> int:
    return sum(map(_length, row))


def _join(samples: Sequence[Sample], seq_len: int) -> list[list[Sample]]:
    """First fit, longest first."""
    rows: list[list[Sample]] = []
    free: list[int] = []
    for sample in sorted(samples, key=_length, reverse=True):
        need = _length(sample)
        at = next((i for i, room in enumerate(free) if room >= need), None)
        if at is None:
            rows.append([sample])
            free.append(seq_len - need)
        else:
            rows[at].append(sample)
            free[at] -= need
    return sorted(rows, key=_width, reverse=True)


def _batch(rows: list[list[Sample]], packed: bool, order: dict[int, int]) -> Batch:
    columns: dict[str, list[np.ndarray]] = {k: [] for k in ("target", "advantage", "old_logp", "off_policy", "span", "sample")}
    spans: list[np.ndarray] = [np.zeros(0, np.float32)]
    offset = 0
    for sample in (s for row in rows for s in row):
        n = len(sample.rollout.ids)
        columns["target"].append(np.asarray(sample.rollout.ids, np.int64))
        columns["advantage"].append(_or_zeros(sample.advantage, n))
        columns["old_logp"].append(_or_zeros(sample.old_logp, n))
        columns["off_policy"].append(np.full(n, sample.off_policy, np.float32))
        columns["sample"].append(np.full(n, order[id(sample)]))
        span = np.full(n, -1) if sample.span is None else np.asarray(sample.span)
        columns["span"].append(np.where(span >= 0, span + offset, -1))
        if sample.teacher_span_logp is not None:
            spans.append(np.asarray(sample.teacher_span_logp, np.float32))
            offset += len(sample.teacher_span_logp)
    whole = {k: np.concatenate(v) for k, v in columns.items()}
    view = None
    if any(s.teacher_prompt_ids is not None for row in rows for s in row):
        view = _lay_out(rows, lambda s: s.teacher_prompt_ids or s.rollout.prompt_ids)
    input_NL, position_NL, row_T = _lay_out(rows, lambda s: s.rollout.prompt_ids)
    return Batch(input_NL, position_NL, row_T, _long(whole["target"]), _real(whole["advantage"]), _real(whole["old_logp"]),
                 _real(whole["off_policy"]), _long(whole["span"]), _real(np.concatenate(spans)), _long(whole["sample"]),
                 packed, view)


def _lay_out(rows: list[list[Sample]], prompt_of: Callable[[Sample], tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and positions [N, L], and where each response token is predicted."""
    texts = [[(prompt_of(s), s.rollout.ids) for s in row] for row in rows]
    width = max(1, *(sum(len(p) + len(r) - 1 for p, r in row) for row in texts))  # 1: a model reads something
    input_NL, position_NL = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    predictors = []
    for n, row in enumerate(texts):
        at = 0
        for prompt, response in row:
            length = len(prompt) + len(response) - 1
            input_NL[n, at:at + length] = (prompt + response)[:-1]
            position_NL[n, at:at + length] = np.arange(length)
            predictors.append(n * width + at + len(prompt) - 1 + np.arange(len(response)))
            at += length
        position_NL[n, at:] = np.arange(width - at)  # padding: a document of its own, behind all others
    return _long(input_NL), _long(position_NL), _long(np.concatenate(predictors))


def _long(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64))


def _real(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))


def _or_zeros(x: np.ndarray | None, n: int) -> np.ndarray:
    return np.zeros(n, np.float32) if x is None else np.asarray(x, np.float32)
