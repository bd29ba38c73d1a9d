"""What one model says about another model's text: log-probabilities over the same bytes, cut into
aligned spans.

The writer's sampled ids are never re-encoded; only the reader tokenizes the text, with its own
template and tokenizer. Calibration reads the policy's texts with the proxy; distillation across
tokenizers reads the student's texts with the
teacher.  Shapes: n tokens of one text, S spans, T tokens of a batch, K stop ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from reflux.tokenalign.offsets import Side, side, spell
from reflux.tokenalign.span_starts import SpanStarts, span_starts
from reflux.tokenalign.spans import Alignment, align_spans
from reflux.trainer.data.batch import Prompt, Rollout, Sample, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import token_logprob_of


@dataclass(frozen=True, eq=False)
class TextScore:
    """log p of each content token [n], and of the stop set right behind them; nats."""

    logp: np.ndarray
    stop: float


@dataclass(frozen=True, eq=False)
class Aligned:
    """A writer's text as a reader sees it. `spans` is None when the reader cannot score the text
    (no round trip).
    """

    scorer_ids: tuple[int, ...]
    scorer_span: np.ndarray  # [m] span of each reader token, -1 outside
    sampler_span: np.ndarray  # [n] span of each content token of the writer, -1 outside
    spans: int | None
    n_bytes: int
    ended: bool  # by itself, so that a stop follows on both sides
    parts: tuple[Alignment, Side, Side] | None = None  # the writer is side a

    @cached_property
    def starts(self) -> SpanStarts:
        """Where both have read the same bytes: tokens of the writer (a) and of the reader (b) whose
        predictions can be compared.
        """
        if self.parts is None:  # the same tokens on both sides, or no text at all
            span = np.arange((self.spans or 0) + (self.ended and self.spans is not None))
            a, b = (
                np.append(span[: self.spans], len(side))[: len(span)]
                for side in (self.sampler_span, self.scorer_ids)
            )
            return SpanStarts(a, b, span)
        return span_starts(*self.parts, ended=self.ended)


def score_ids(
    reader: Any,
    engine: Any,
    jobs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    chat: Chat,
    *,
    tokens: int,
    temperature: float = 1.0,
    stop: bool = True,
) -> list[TextScore]:
    """Scores of (prompt ids, content ids) pairs under `reader`, a frozen model or the engine
    itself. Collective.

    stop: score the stop set behind each text; that takes one position more than the text has.
    """
    empty = Prompt(0, ())
    samples = [
        Sample(Rollout(empty, p, (*ids, chat.stop_id) if stop else ids, (), 0.0, "", True))
        for p, ids in jobs
    ]
    logp = [np.zeros(len(s.rollout.ids)) for s in samples]
    stops = np.zeros(len(samples))
    longest = max((len(p) + len(ids) for p, ids in jobs), default=1)
    stop_ids = torch.tensor(chat.stop_ids)
    for batch in engine.pad_across_ranks(pack(samples, tokens=tokens, seq_len=longest)):
        batch = batch.to(engine.device)
        last_T = (
            batch.sample_T
            != torch.cat([batch.sample_T[1:], batch.sample_T.new_full((1,), -1)])[: batch.tokens]
        )
        stop_TK = torch.where(last_T[:, None], stop_ids.to(engine.device)[None], -1)
        with engine.forward_no_grad(reader, batch, chat.vocab_size) as out, torch.no_grad():
            scores_TK = token_logprob_of(
                out, torch.cat([batch.target_T[:, None], stop_TK], 1), temperature=temperature
            ).logp
        rows = scores_TK.double().cpu().numpy()
        which, is_last = batch.sample_T.cpu().numpy(), last_T.cpu().numpy()
        for i in np.unique(which):
            logp[i] = rows[which == i, 0]
        for t in np.flatnonzero(is_last):
            stops[which[t]] = np.logaddexp.reduce(rows[t, 1:])
    return [TextScore(x[:-1] if stop else x, float(s)) for x, s in zip(logp, stops)]


def align_texts(
    writer: Chat, reader: Chat, rollouts: Sequence[Rollout], *, same: bool
) -> list[Aligned]:
    """The reader's tokens of each rollout's text and the minimal byte spans both tokenizations
    share.

    `same`: both have one id -> bytes map, so the reader reads the writer's ids and every token is
    its own span.
    """
    if same:
        return [_own_tokens(writer, r) for r in rollouts]
    spelled = [spell(writer.table, r.content_ids) for r in rollouts]
    ids = [reader.encode(s.text) if s.text is not None else () for s in spelled]
    writers = [side(writer.table, r.content_ids, s.bytes) for r, s in zip(rollouts, spelled)]
    readers = [
        side(reader.table, i, s.bytes, normalize=reader.normalize) for i, s in zip(ids, spelled)
    ]
    usable = [
        k
        for k, s in enumerate(spelled)
        if s.text and writers[k].reproduces and readers[k].reproduces
    ]
    found = dict(
        zip(usable, align_spans([writers[k] for k in usable], [readers[k] for k in usable]))
    )
    nothing = np.zeros(0, np.int64)
    return [
        Aligned(
            ids[k],
            found[k].span_b,
            found[k].span_a,
            found[k].num_spans,
            len(s.bytes),
            rollouts[k].ended,
            (found[k], writers[k], readers[k]),
        )
        if k in found
        else Aligned(
            (),
            nothing,
            np.full(len(rollouts[k].content_ids), -1),
            0 if s.text == "" else None,
            len(s.bytes),
            rollouts[k].ended,
        )
        for k, s in enumerate(spelled)
    ]


def _own_tokens(chat: Chat, rollout: Rollout) -> Aligned:
    ids = rollout.content_ids
    own = np.arange(len(ids))
    return Aligned(
        ids, own, own, len(ids), int(chat.table.lens[list(ids)].sum()) if ids else 0, rollout.ended
    )
