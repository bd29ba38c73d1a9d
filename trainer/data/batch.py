"""The data of a step, each frozen and built from the one before: Prompt -> Rollout -> Sample ->
Batch.

Shapes: N rows, L row length, T response tokens of a batch (the positions that carry loss), S spans,
P aligned positions of a student and a teacher, n tokens of one response, K top-k entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .prompt import Prompt


@dataclass(frozen=True)
class Rollout:
    """One response, by ids of the model that sampled it; that model never encodes it again."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # response tokens; the last one is a stop token iff `ended`
    # log p of each id under the distribution that was sampled from (nats); 0.0 for given texts
    logp: tuple[float, ...]
    stop_logp: float  # log of the stop set's probability at the end; 0.0 if truncated
    text: str  # what `ids` spell, without the stop token
    ended: bool  # False: truncated at the length limit

    @property
    def content_ids(self) -> tuple[int, ...]:
        """The response without its stop token."""
        return self.ids[:-1] if self.ended else self.ids


@dataclass(frozen=True, eq=False)
class TopKRows:
    """What is known of a teacher at each token of a response: some ids, their log-probabilities,
    and the log-mass of all others. Nats, at the temperature that they were taken at.
    """

    ids: np.ndarray  # [n, K] distinct in a row; -1 is padding
    logp: np.ndarray  # [n, K]; -inf at padding
    tail: np.ndarray  # [n]; -inf where the ids stand for everything


@dataclass(frozen=True, eq=False)
class TeacherView:
    """A response as one teacher reads it, where its template or its tokens are not the student's.

    The aligned positions: [P] response tokens of each model whose predictions are compared. None:
    all of them, one by one.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...] | None = None  # the response in the teacher's tokens; None: the student's
    student_positions: np.ndarray | None = None
    teacher_positions: np.ndarray | None = None
    space: bool = False  # the first byte of its ids is a space that its tokenizer put there
    student_space: bool = False  # the same of the student's ids
    # what a teacher that is not asked again has said of the response; None: its model reads it
    rows: TopKRows | None = None
    # [n, K] fp64 in [0, 1): where the teacher's tokens are drawn (distill.tail = "sampled")
    uniform: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """A scored rollout: what the loss needs of it, one entry per response token."""

    rollout: Rollout
    advantage: np.ndarray | None = None  # [n] calibrate: A of equation (4)
    old_logp: np.ndarray | None = None  # [n] log-probabilities of the behaviour policy, nats
    off_policy: bool = False  # distill: the student did not sample the text
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
    aligned_P: Tensor | None  # their tokens among the student's T; None: all of them, in order
    target_P: Tensor  # what they predict, in the teacher's tokens
    sample_P: Tensor  # as Batch.sample_T
    space_P: Tensor  # as Batch.leading_space
    # what it has said of every response token; None: its model reads the batch
    topk_ids_TK: Tensor | None = None
    topk_logp_TK: Tensor | None = None
    tail_T: Tensor | None = None
    uniform_TK: Tensor | None = None  # fp64, of draws from the teacher


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank. Response tokens are listed flat: the logits at `row_T` predict
    `target_T`.
    """

    input_NL: Tensor
    position_NL: Tensor  # restarts at 0 with every document of a packed row
    row_T: Tensor  # of each token's predictor, among the flattened [N * L] positions
    target_T: Tensor
    advantage_T: Tensor
    old_logp_T: Tensor
    off_policy_T: Tensor  # 1.0 where the student did not sample the text
    span_T: Tensor  # global in the batch, -1 = outside
    teacher_span_logp_S: Tensor
    sample_T: Tensor  # which of the packed samples a token belongs to
    packed: bool = False
    # bool: of a text whose first byte is a space that the tokenizer put there; None: of no text
    leading_space: Tensor | None = None
    # by teacher; None or missing: it reads this batch
    teacher_views: tuple[BatchView | None, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.target_T)

    def to(self, device: torch.device) -> "Batch":
        def move(x: Any) -> Any:
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        moved: dict[str, Any] = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        moved["teacher_views"] = tuple(v and BatchView(*map(move, v)) for v in self.teacher_views)
        return replace(self, **moved)

    def for_teacher(self, teacher: int = 0) -> "Batch":
        """The same responses behind the teacher's own rendering of the prompts, and in its own
        tokens if they differ.
        """
        view = self._view(teacher)
        if view is None:
            return self
        return replace(
            self,
            input_NL=view.input_NL,
            position_NL=view.position_NL,
            row_T=view.row_P,
            target_T=view.target_P,
            sample_T=view.sample_P,
            leading_space=view.space_P,
        )

    def aligned_positions(self, teacher: int = 0) -> Tensor | None:
        """[P] tokens among the student's T at which the teacher is compared; None: all of them."""
        view = self._view(teacher)
        return None if view is None else view.aligned_P

    def stored_topk(self, teacher: int = 0) -> tuple[Tensor, Tensor, Tensor] | None:
        """(ids [T, K], log-probabilities [T, K], tails [T]) of a teacher that is not asked again;
        None where the batch holds none.
        """
        view = self._view(teacher)
        if view is None or view.topk_ids_TK is None:
            return None
        assert view.topk_logp_TK is not None and view.tail_T is not None
        return view.topk_ids_TK, view.topk_logp_TK, view.tail_T

    def uniform(self, teacher: int = 0) -> Tensor | None:
        """[T, K] fp64 in [0, 1): where this teacher's tokens are drawn; None where none are."""
        view = self._view(teacher)
        return None if view is None else view.uniform_TK

    def _view(self, teacher: int) -> BatchView | None:
        return self.teacher_views[teacher] if teacher < len(self.teacher_views) else None


def pack(
    samples: Sequence[Sample], *, tokens: int, seq_len: int, joined: bool = False
) -> list[Batch]:
    """Ragged samples -> micro-batches of at most `tokens` positions, padding included; one row at
    least. No two samples may be the same object.

    A sequence is prompt + response. Its inputs are all but the last token, its targets the response
    tokens: the first target is predicted at the last prompt position. Long rows come first, so that
    rows of one length share a batch. With `joined`, short sequences share rows of `seq_len`.
    ValueError for a sequence longer than `seq_len` + 1.
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
    if joined:
        rows = _join(samples, seq_len)
    else:
        rows = [[s] for s in sorted(samples, key=_length, reverse=True)]
    batches, start = [], 0
    while start < len(rows):
        width = _width(rows[start])
        count = max(1, tokens // max(width, 1))
        batches.append(_batch(rows[start : start + count], joined, order))
        start += count
    return batches


def empty_batch() -> Batch:
    """A row of one token and no targets, for a rank with fewer batches than the others."""
    long, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    zero_NL = torch.zeros(1, 1, dtype=torch.long)
    return Batch(zero_NL, zero_NL, long, long, real, real, real, long, real, long)


def _length(sample: Sample) -> int:
    """Inputs of the longest rendering. A teacher's may be longer than the student's, and its
    forward has to fit too.
    """
    texts = [_own_text(sample), *(_text_of(sample, i) for i in range(len(sample.teacher_views)))]
    return max(len(t.prompt_ids) + len(t.ids) for t in texts) - 1


class _Text(NamedTuple):
    """A sample as one model reads it; None: it predicts every response token."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    positions: np.ndarray | None


def _own_text(sample: Sample) -> _Text:
    return _Text(sample.rollout.prompt_ids, sample.rollout.ids, None)


def _text_of(sample: Sample, teacher: int) -> _Text:
    views = sample.teacher_views
    view = views[teacher] if teacher < len(views) else None
    if view is None:
        return _own_text(sample)
    ids = sample.rollout.ids if view.ids is None else view.ids
    return _Text(view.prompt_ids, ids, view.teacher_positions)


def _width(row: list[Sample]) -> int:
    return sum(map(_length, row))


def _join(samples: Sequence[Sample], seq_len: int) -> list[list[Sample]]:
    """First fit, longest first."""
    rows: list[list[Sample]] = []
    free: list[int] = []
    for sample in sorted(samples, key=_length, reverse=True):
        need = _length(sample)
        row = next((i for i, room in enumerate(free) if room >= need), None)
        if row is None:
            rows.append([sample])
            free.append(seq_len - need)
        else:
            rows[row].append(sample)
            free[row] -= need
    return sorted(rows, key=_width, reverse=True)


def _batch(rows: list[list[Sample]], packed: bool, order: dict[int, int]) -> Batch:
    columns: dict[str, list[np.ndarray]] = {
        k: [] for k in ("target", "advantage", "old_logp", "off_policy", "span", "sample", "space")
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
        space = any(v is not None and v.student_space for v in sample.teacher_views)
        columns["space"].append(np.full(n, space))
        span = np.full(n, -1) if sample.span is None else np.asarray(sample.span)
        columns["span"].append(np.where(span >= 0, span + offset, -1))
        if sample.teacher_span_logp is not None:
            spans.append(np.asarray(sample.teacher_span_logp, np.float32))
            offset += len(sample.teacher_span_logp)
    whole = {k: np.concatenate(v) for k, v in columns.items()}
    input_NL, position_NL, row_T = _lay_out(rows, _own_text)
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
        torch.from_numpy(whole["space"]) if whole["space"].any() else None,
        teacher_views=tuple(_view(rows, i, order) for i in range(teachers)),
    )


def _view(rows: list[list[Sample]], teacher: int, order: dict[int, int]) -> BatchView | None:
    samples = [s for row in rows for s in row]
    views = [s.teacher_views[teacher] if teacher < len(s.teacher_views) else None for s in samples]
    if not any(views):
        return None
    text_of = partial(_text_of, teacher=teacher)
    predicted = [_predicted(text_of(s)) for s in samples]
    counts = [len(x) for x in predicted]
    topk = _stored_rows([v.rows for v in views if v is not None and v.rows is not None])
    uniform = [v.uniform for v in views if v is not None and v.uniform is not None]
    uniform_TK = torch.from_numpy(np.concatenate(uniform)) if uniform else None
    return BatchView(
        *_lay_out(rows, text_of),
        _aligned_positions(samples, views),
        _long(np.concatenate(predicted)),
        _long(np.repeat([order[id(s)] for s in samples], counts)),
        torch.from_numpy(np.repeat([v is not None and v.space for v in views], counts)),
        *topk,
        uniform_TK,
    )


def _aligned_positions(
    samples: Sequence[Sample], views: Sequence[TeacherView | None]
) -> Tensor | None:
    """[P] among the batch's T response tokens, those whose predictions are compared; None where
    that is every token of every sample.
    """
    compared = [None if view is None else view.student_positions for view in views]
    if all(own is None for own in compared):
        return None
    positions, first = [], 0  # first: the sample's first response token among the T
    for sample, own in zip(samples, compared):
        n = len(sample.rollout.ids)
        positions.append(first + (np.arange(n) if own is None else own))
        first += n
    return _long(np.concatenate(positions))


def _predicted(text: _Text) -> np.ndarray:
    """int64 [P], the ids of the compared tokens: all where the text names no positions."""
    ids = np.asarray(text.ids, np.int64)
    return ids if text.positions is None else ids[text.positions]


def _stored_rows(rows: Sequence[TopKRows]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The rows of a batch's texts behind one another, padded to the widest."""
    if not rows:
        return None, None, None
    width = max(x.ids.shape[1] for x in rows)

    def joined(parts: Sequence[np.ndarray], padding: float) -> np.ndarray:
        return np.concatenate(
            [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=padding) for x in parts]
        )

    return (
        _long(joined([x.ids for x in rows], -1)),
        _real(joined([x.logp for x in rows], -np.inf)),
        _real(np.concatenate([x.tail for x in rows])),
    )


def _lay_out(
    rows: list[list[Sample]], text_of: Callable[[Sample], _Text]
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and positions [N, L], and the predictor of each response token, or of each aligned
    one.
    """
    texts = [list(map(text_of, row)) for row in rows]
    # at least 1: a model takes no empty row
    width = max(1, *(sum(len(t.prompt_ids) + len(t.ids) - 1 for t in row) for row in texts))
    input_NL = np.zeros((len(rows), width), np.int64)
    position_NL = np.zeros((len(rows), width), np.int64)
    predictors = []
    for n, row in enumerate(texts):
        start = 0
        for prompt_ids, ids, positions in row:
            end = start + len(prompt_ids) + len(ids) - 1
            input_NL[n, start:end] = (prompt_ids + ids)[:-1]
            position_NL[n, start:end] = np.arange(end - start)
            first = n * width + start + len(prompt_ids) - 1
            predictors.append(first + (np.arange(len(ids)) if positions is None else positions))
            start = end
        # padding: a document of its own, behind all others, of a token that the row has. The pad
        # id's embedding may be 0, where gemma3n's norms have no gradient: NaN for every weight
        position_NL[n, start:] = np.arange(width - start)
        input_NL[n, start:] = input_NL[n, 0]
    return _long(input_NL), _long(position_NL), _long(np.concatenate(predictors))


def _long(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64))


def _real(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))


def _or_zeros(x: np.ndarray | None, n: int) -> np.ndarray:
    return np.zeros(n, np.float32) if x is None else np.asarray(x, np.float32)
