"""The nouns of a step, each frozen and each built from the one before: Prompt -> Rollout -> Sample
-> Batch.

Shapes: N rows, L row length, T response tokens of a batch (the positions that carry loss), S spans,
P places at which two tokenizations are compared, n tokens of one response.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One question. `index` is its place in the data set: it identifies the prompt and seeds its
    rollouts.
    """

    index: int
    # [{"role": ..., "content": ...}], the last one is the user's
    messages: tuple[dict[str, str], ...]
    answer: str | None = None  # what the task's verifier compares with
    response: str | None = None  # a given text (SFT, KD on given text)
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns


@dataclass(frozen=True)
class Rollout:
    """One text for a prompt, by ids of the model that produced it; never re-encoded by that
    model.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # response tokens; the last one is a stop token iff `ended`
    # log p of each id under the distribution really sampled (nats); 0.0 for given texts
    logp: tuple[float, ...]
    stop_logp: float  # log of the stop set's probability where the text ended; 0.0 if it was cut
    text: str  # what `ids` spell, without the stop token
    ended: bool  # False: cut at the length limit

    @property
    def content_ids(self) -> tuple[int, ...]:
        """The response without its stop token."""
        return self.ids[:-1] if self.ended else self.ids


@dataclass(frozen=True, eq=False)
class TeacherView:
    """How one teacher reads a response, where its template or its tokens are not the student's."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...] | None = None  # the response in the teacher's tokens; None: the student's
    # [P] response tokens whose predictions are compared; None: all, one by one
    student_positions: np.ndarray | None = None
    teacher_positions: np.ndarray | None = None  # [P] the same places among the teacher's tokens


@dataclass(frozen=True, eq=False)
class Sample:
    """A scored rollout: what the loss needs of it, one entry per response token."""

    rollout: Rollout
    advantage: np.ndarray | None = None  # [n] calibrate: A of equation (4)
    old_logp: np.ndarray | None = None  # [n] log-probabilities of the behaviour policy, nats
    off_policy: bool = False  # distill: the text is not the student's own
    span: np.ndarray | None = None  # [n] span of each token, -1 = outside every span
    # [S] the teacher's log-probability of each span, nats
    teacher_span_logp: np.ndarray | None = None
    # by teacher; None or missing: it reads what the student reads
    teacher_views: tuple[TeacherView | None, ...] = ()


class BatchView(NamedTuple):
    """A batch as one teacher reads it."""

    input_NL: Tensor
    position_NL: Tensor
    row_P: Tensor  # flattened positions of its predictors, as Batch.row_T
    # which of the student's T tokens they belong to; None: all of them, in order
    aligned_P: Tensor | None


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank. Response tokens are listed flat; `row_T` finds each one's
    predictor.
    """

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
    # by teacher; None or missing: it reads this batch
    teacher_views: tuple[BatchView | None, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.target_T)

    def to(self, device: torch.device) -> "Batch":
        move = lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        moved["teacher_views"] = tuple(v and BatchView(*map(move, v)) for v in self.teacher_views)
        return replace(self, **moved)

    def for_teacher(self, teacher: int = 0) -> "Batch":
        """The same response behind the teacher's own rendering of the prompts, and in its own
        tokens if they differ.
        """
        view = self._view(teacher)
        return (
            self
            if view is None
            else replace(
                self, input_NL=view.input_NL, position_NL=view.position_NL, row_T=view.row_P
            )
        )

    def aligned_positions(self, teacher: int = 0) -> Tensor | None:
        """[P] of the student's tokens that the teacher's predictors are compared with; None: all
        T.
        """
        view = self._view(teacher)
        return None if view is None else view.aligned_P

    def _view(self, teacher: int) -> BatchView | None:
        return self.teacher_views[teacher] if teacher < len(self.teacher_views) else None


def pack(
    samples: Sequence[Sample], *, tokens: int, seq_len: int, joined: bool = False
) -> list[Batch]:
    """Ragged samples, all different objects -> micro-batches of at most `tokens` positions (one row
    at least), padding included.

    A sequence is prompt + response; its inputs are all but the last token, its targets the response
    tokens, so the first target is predicted at the last prompt position. Long rows come first, so
    that rows of one length share a batch. With `joined`, short sequences share rows of `seq_len`.  Raises
    ValueError for a sequence longer than `seq_len`.
    """
    for s in samples:
        length = len(s.rollout.prompt_ids) + len(s.rollout.ids)
        if length > seq_len + 1 or not s.rollout.prompt_ids:
            raise ValueError(
                f"prompt {s.rollout.prompt.index}: {len(s.rollout.prompt_ids)} prompt and "
                f"{len(s.rollout.ids)} response tokens; want at least 1 prompt token and at most "
                f"training.seq_len + 1 = {seq_len + 1} in all. Raise training.seq_len or lower "
                "rollout.max_tokens"
            )
    order = {id(s): i for i, s in enumerate(samples)}
    rows = (
        _join(samples, seq_len)
        if joined
        else [[s] for s in sorted(samples, key=_length, reverse=True)]
    )
    batches, start = [], 0
    while start < len(rows):
        width = _width(rows[start])
        count = max(1, tokens // max(width, 1))
        batches.append(_batch(rows[start : start + count], joined, order))
        start += count
    return batches


def empty_batch() -> Batch:
    """A row of one token and no targets: keeps a rank that ran dry in step with the others."""
    long, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    zero_NL = torch.zeros(1, 1, dtype=torch.long)
    return Batch(zero_NL, zero_NL, long, long, real, real, real, long, real, long)


def _length(sample: Sample) -> int:
    """Inputs of the longest rendering: a teacher's template or tokens may be the longer ones, and
    its forward has to fit too.
    """
    own = sample.rollout
    return (
        max(
            len(p) + len(r)
            for p, r, _ in [
                (own.prompt_ids, own.ids, None),
                *(_read_by(sample, i) for i in range(len(sample.teacher_views))),
            ]
        )
        - 1
    )


def _read_by(
    sample: Sample, teacher: int
) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray | None]:
    """(prompt, response, compared places) as a teacher reads them."""
    own, views = sample.rollout, sample.teacher_views
    view = views[teacher] if teacher < len(views) else None
    if view is None:
        return own.prompt_ids, own.ids, None
    return view.prompt_ids, own.ids if view.ids is None else view.ids, view.teacher_positions


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
    columns: dict[str, list[np.ndarray]] = {
        k: [] for k in ("target", "advantage", "old_logp", "off_policy", "span", "sample")
    }
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
    own = lambda s: (s.rollout.prompt_ids, s.rollout.ids, None)
    input_NL, position_NL, row_T = _lay_out(rows, own)
    teachers = max(len(s.teacher_views) for row in rows for s in row)
    return Batch(
        input_NL,
        position_NL,
        row_T,
        _long(whole["target"]),
        _real(whole["advantage"]),
        _real(whole["old_logp"]),
        _real(whole["off_policy"]),
        _long(whole["span"]),
        _real(np.concatenate(spans)),
        _long(whole["sample"]),
        packed,
        tuple(_view(rows, i) for i in range(teachers)),
    )


def _view(rows: list[list[Sample]], teacher: int) -> BatchView | None:
    samples = [s for row in rows for s in row]
    views = [s.teacher_views[teacher] if teacher < len(s.teacher_views) else None for s in samples]
    if not any(views):
        return None
    aligned_P, at = [], 0
    for sample, view in zip(samples, views):
        chosen = (
            np.arange(len(sample.rollout.ids))
            if view is None or view.student_positions is None
            else view.student_positions
        )
        aligned_P.append(chosen + at)
        at += len(sample.rollout.ids)
    compared = any(v is not None and v.student_positions is not None for v in views)
    return BatchView(
        *_lay_out(rows, lambda s: _read_by(s, teacher)),
        _long(np.concatenate(aligned_P)) if compared else None,
    )


def _lay_out(
    rows: list[list[Sample]], text_of: Callable[[Sample], tuple]
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and positions [N, L], and where each response token, or each chosen one, is
    predicted.
    """
    texts = [list(map(text_of, row)) for row in rows]
    # 1: a model reads something
    width = max(1, *(sum(len(p) + len(r) - 1 for p, r, _ in row) for row in texts))
    input_NL, position_NL = (
        np.zeros((len(rows), width), np.int64),
        np.zeros((len(rows), width), np.int64),
    )
    predictors = []
    for n, row in enumerate(texts):
        at = 0
        for prompt, response, chosen in row:
            length = len(prompt) + len(response) - 1
            input_NL[n, at : at + length] = (prompt + response)[:-1]
            position_NL[n, at : at + length] = np.arange(length)
            predictors.append(
                n * width
                + at
                + len(prompt)
                - 1
                + (np.arange(len(response)) if chosen is None else chosen)
            )
            at += length
        # padding: a document of its own, behind all others
        position_NL[n, at:] = np.arange(width - at)
    return _long(input_NL), _long(position_NL), _long(np.concatenate(predictors))


def _long(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64))


def _real(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))


def _or_zeros(x: np.ndarray | None, n: int) -> np.ndarray:
    return np.zeros(n, np.float32) if x is None else np.asarray(x, np.float32)
