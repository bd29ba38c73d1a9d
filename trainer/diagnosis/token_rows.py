"""Token stats as the lines of tokens.jsonl: every per-token number of every text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reflux.trainer.data.chat import Chat

from .measure import SampledBy, SpanAlignment, TokenStats
from .metrics import Divergence

STOP = "<stop>"  # the piece that stands for the end of a text of two tokenizers


@dataclass(frozen=True)
class TextRow:
    """One text. Numbers are per token, rounded to six digits; nats. Of two tokenizers the unit is a
    span: `pieces` are the spans' texts, and a KL is None where the models cannot be compared.
    """

    prompt: int
    sampled_by: SampledBy
    correct: bool | None
    answer: str | None
    text: str
    ids: list[int]
    pieces: list[str]
    student_logp: list[float]
    teacher_logp: list[float]
    kl_forward: list[float | None]
    kl_reverse: list[float | None]
    outside_nucleus: list[int] | None = None  # 1: outside the teacher's top-p set
    overlap: list[float] | None = None  # of the top-K sets
    # of two tokenizers only
    teacher_ids: list[int] | None = None
    student_pieces: list[list[str]] | None = None  # the tokens of each span
    teacher_pieces: list[list[str]] | None = None
    student_span: list[int] | None = None
    teacher_span: list[int] | None = None

    def kl(self, divergence: Divergence) -> list[float | None]:
        return self.kl_forward if divergence == "forward" else self.kl_reverse


def token_rows(stats: Sequence[TokenStats], chat: Chat, teacher_chat: Chat) -> list[TextRow]:
    return [
        _row(s, chat) if s.alignment is None else _span_row(s, s.alignment, chat, teacher_chat)
        for s in stats
    ]


def _common(s: TokenStats) -> dict[str, Any]:
    outside = None if s.outside_n is None else [int(x) for x in s.outside_n]
    return {
        "prompt": s.prompt,
        "sampled_by": s.sampled_by,
        "correct": s.correct,
        "answer": s.answer,
        "text": s.rollout.text,
        "ids": list(s.rollout.ids),
        "student_logp": _rounded(s.student_logp_n),
        "teacher_logp": _rounded(s.teacher_logp_n),
        "outside_nucleus": outside,
    }


def _row(s: TokenStats, chat: Chat) -> TextRow:
    return TextRow(
        **_common(s),
        pieces=_spell(chat, s.rollout.ids),
        overlap=_rounded(s.overlap_n),
        kl_forward=[*_rounded(s.kl["forward"])],
        kl_reverse=[*_rounded(s.kl["reverse"])],
    )


def _span_row(s: TokenStats, a: SpanAlignment, chat: Chat, teacher_chat: Chat) -> TextRow:
    spans = len(s.student_logp_n)
    student_pieces = _pieces_of_spans(chat, s.rollout.content_ids, a.student_span, spans)
    teacher_pieces = _pieces_of_spans(teacher_chat, a.teacher_ids, a.teacher_span, spans)
    text = s.rollout.text.encode()
    ends = [*s.start_n[1:].tolist(), s.n_bytes]
    pieces = [text[b:e].decode(errors="replace") for b, e in zip(s.start_n.tolist(), ends)]
    if s.rollout.ended:
        pieces[-1] = STOP
        student_pieces[-1] = _spell(chat, [chat.stop_id])
        teacher_pieces[-1] = _spell(teacher_chat, [teacher_chat.stop_id])
    return TextRow(
        **_common(s),
        pieces=pieces,
        kl_forward=_by_span(s.kl["forward"], a.start_span, spans),
        kl_reverse=_by_span(s.kl["reverse"], a.start_span, spans),
        teacher_ids=list(a.teacher_ids),
        student_pieces=student_pieces,
        teacher_pieces=teacher_pieces,
        student_span=a.student_span.tolist(),
        teacher_span=a.teacher_span.tolist(),
    )


def _by_span(kl_P: np.ndarray, span_P: np.ndarray, spans: int) -> list[float | None]:
    kl: list[float | None] = [None] * spans
    for span, value in zip(span_P.tolist(), _rounded(kl_P)):
        kl[span] = value
    return kl


def _pieces_of_spans(
    chat: Chat, ids: Sequence[int], span_n: np.ndarray, spans: int
) -> list[list[str]]:
    pieces = _spell(chat, ids)
    return [[pieces[i] for i in np.flatnonzero(span_n == span)] for span in range(spans)]


def _spell(chat: Chat, ids: Iterable[int]) -> list[str]:
    """Tokens as text; a control token, which spells nothing, by its name."""
    return [chat.table.pieces[i].decode(errors="replace") for i in ids]


def _rounded(x: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in x]
