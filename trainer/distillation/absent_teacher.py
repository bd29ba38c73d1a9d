"""What the teachers share whose weights are not loaded: their rows come with the batch, from a
cache or a server, and they score no text in this process.

Shapes: T tokens of a batch, K top-k entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reflux.kernels.teacher_topk import TopK
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Batch
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs, Loss, topk_kl
from reflux.trainer.phase import TextScore


@dataclass(frozen=True, eq=False)
class AbsentTeacher:
    """Part of a Teacher of phase.py."""

    spec: DistillSection
    chat: Chat
    shares_ids: bool
    weight: float = 1.0

    def divergence(self, student: HeadInputs, batch: Batch, index: int) -> Loss:
        """See phase.Teacher."""
        return topk_kl(student, self.rows_of_batch(student, batch, index), self.spec)

    def rows_of_batch(self, student: HeadInputs, batch: Batch, index: int) -> TopK:
        """What it has said at every token of the batch."""
        stored = batch.stored_topk(index)
        if stored is None:  # a batch without tokens, for a rank that has none left
            nothing_TK = student.hidden_TD.new_zeros(0, 1, dtype=torch.float32)
            stored = nothing_TK.long(), nothing_TK, nothing_TK[:, 0]
        return TopK(*stored)

    def score_texts(
        self,
        jobs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        spaces: Sequence[bool] | None = None,
    ) -> list[TextScore]:
        """See phase.Teacher; only of no text at all."""
        assert not jobs, "check_cached_teacher and check_served_teacher refuse what would ask"
        return []
