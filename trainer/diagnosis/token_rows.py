"""Token stats as the lines of tokens.jsonl: every per-token number of every text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reflux.trainer.data.chat import Chat

from .measure import ByteAlignment, SampledBy, TokenStats
from .metrics import Divergence

STOP = "<stop>"  # the piece that stands for the end of a text of two tokenizers


@dataclass(frozen=True)
class TextRow:
    """One text. Numbers are per token, rounded to six digits; nats. Of two tokenizers they are per
    unit: the whole characters from one compared byte position to the next.
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
    student_pieces: list[list[str]] | None = None  # the tokens that begin in each unit
    teacher_pieces: list[list[str]] | None = None
    student_unit: list[int] | None = None
    teacher_unit: list[int] | None = None
    question: str = ""  # of the prompt

    def kl(self, divergence: Divergence) -> list[float | None]:
        return self.kl_forward if divergence == "forward" else self.kl_reverse


def token_rows(stats: Sequence[TokenStats], chat: Chat, teacher_chat: Chat) -> list[TextRow]:
    return [
        _row(s, chat) if s.alignment is None else _unit_row(s, s.alignment, chat, teacher_chat)
        for s in stats
    ]


def _common(s: TokenStats) -> dict[str, Any]:
    return {
        "prompt": s.prompt,
        "sampled_by": s.sampled_by,
        "correct": s.correct,
        "answer": s.answer,
        "question": s.rollout.prompt.question if s.rollout.prompt.messages else "",
        "text": s.rollout.text,
        "ids": list(s.rollout.ids),
    }


def _row(s: TokenStats, chat: Chat) -> TextRow:
    outside = None if s.outside_n is None else [int(x) for x in s.outside_n]
    return TextRow(
        **_common(s),
        student_logp=_rounded(s.student_logp_n),
        teacher_logp=_rounded(s.teacher_logp_n),
        outside_nucleus=outside,
        pieces=_spell(chat, s.rollout.ids),
        overlap=_rounded(s.overlap_n),
        kl_forward=[*_rounded(s.kl["forward"])],
        kl_reverse=[*_rounded(s.kl["reverse"])],
    )


def _unit_row(s: TokenStats, a: ByteAlignment, chat: Chat, teacher_chat: Chat) -> TextRow:
    text = s.rollout.text.encode()
    # a unit begins at the first byte of a character, or behind the text
    begins = [i == 0 or b == len(text) or text[b] & 0xC0 != 0x80 for i, b in enumerate(s.start_n)]
    first = np.flatnonzero(begins)
    unit = np.cumsum(begins) - 1

    def summed(x: np.ndarray) -> list[float]:
        return _rounded(np.add.reduceat(x, first))

    start = s.start_n[first].tolist()
    pieces = [text[b:e].decode(errors="replace") for b, e in zip(start, [*start[1:], len(text)])]
    stop = s.rollout.ended and start[-1] == len(text)
    if stop:
        pieces[-1] = STOP
    teacher_ids = a.teacher_ids[: len(a.teacher_unit)]
    sides = (
        (chat, s.rollout.content_ids, unit[a.student_unit]),
        (teacher_chat, teacher_ids, unit[a.teacher_unit]),
    )
    begun = [_begun(*side, len(first)) for side in sides]
    if stop:
        for tokens, c in zip(begun, (chat, teacher_chat)):
            tokens[-1] = _spell(c, [c.stop_id])
    return TextRow(
        **_common(s),
        student_logp=summed(s.student_logp_n),
        teacher_logp=summed(s.teacher_logp_n),
        pieces=pieces,
        kl_forward=[*summed(s.kl["forward"])],
        kl_reverse=[*summed(s.kl["reverse"])],
        teacher_ids=list(teacher_ids),
        student_pieces=begun[0],
        teacher_pieces=begun[1],
        student_unit=sides[0][2].tolist(),
        teacher_unit=sides[1][2].tolist(),
    )


def _begun(chat: Chat, ids: Sequence[int], unit_n: np.ndarray, units: int) -> list[list[str]]:
    """The tokens that begin in each unit."""
    pieces = _spell(chat, ids)
    return [[pieces[i] for i in np.flatnonzero(unit_n == unit)] for unit in range(units)]


def _spell(chat: Chat, ids: Iterable[int]) -> list[str]:
    """Tokens as text; a control token, which spells nothing, by its name."""
    return [chat.table.pieces[i].decode(errors="replace") for i in ids]


def _rounded(x: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in x]
