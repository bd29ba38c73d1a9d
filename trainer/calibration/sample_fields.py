"""What is saved of a sampled text beside its words: the grade, and r_cal span by span."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.phase import CalibrationScore

MOST_SPANS = 400  # of one text; what follows is one span without a number
DIGITS = 4  # of nats

Span = tuple[str, float | None]  # text, and the clipped difference in nats; None: outside all spans


def sample_fields(
    rollout: Rollout, grade: Grade, score: CalibrationScore | None, chat: Chat
) -> dict[str, Any]:
    """Fields of samples.jsonl. score: None where eta is 0."""
    fields: dict[str, Any] = {"reward": _rounded(grade.reward), "correct": grade.correct}
    if grade.failed:
        fields = {"grader_error": grade.error}
    elif grade.correct is not None:
        fields["extracted"] = grade.extracted
    if score is None:
        return fields
    if not score.scored:
        return fields | {"not_scored": "unaligned with the proxy's tokens, or masked by a rule"}
    fields["r_cal"] = _rounded(score.value)
    return fields | {"spans": spans_of(rollout, score, chat.table.pieces)}


def spans_of(rollout: Rollout, score: CalibrationScore, pieces: Sequence[bytes]) -> list[Span]:
    """The text cut into its spans, in order, with the number of each. Empty where a reward has no
    spans. pieces: what each id spells.
    """
    if not len(score.span_value):
        return []
    ids, span_n = rollout.content_ids, score.span[: len(rollout.content_ids)]
    starts = [0, *(np.flatnonzero(np.diff(span_n)) + 1).tolist(), len(ids)]
    cuts = [(a, b) for a, b in zip(starts, starts[1:]) if a < b]
    spans: list[Span] = []
    for a, b in cuts[:MOST_SPANS]:
        index = int(span_n[a])
        value = None if index < 0 else _rounded(score.span_value[index])
        spans.append((_spell(ids[a:b], pieces), value))
    if len(cuts) > MOST_SPANS:
        spans.append((_spell(ids[cuts[MOST_SPANS][0] :], pieces), None))
    return spans


def _spell(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
    return b"".join(pieces[i] for i in ids).decode(errors="replace")


def _rounded(x: float) -> float:
    return round(float(x), DIGITS)
