"""objective = "byte": the divergence of two models' exact next-byte distributions, whatever their
tokenizers (reflux.tokenalign.linear_next_byte).

Both models read the same bytes, each in its own tokens behind its own template. Compared are the
256 bytes and the end of the text at every byte of a response.

Shapes: P byte positions of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reflux.kernels.teacher_topk import TopK
from reflux.tokenalign.byte_trie import ByteTrie, alphabet
from reflux.tokenalign.byte_windows import NextBytes
from reflux.tokenalign.linear_next_byte import (
    ByteDivergence,
    ByteKL,
    byte_kl,
    next_bytes,
    next_bytes_of_topk,
)
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Batch
from reflux.trainer.data.byte_texts import windows_of
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs, Loss
from reflux.trainer.phase import Engine


@dataclass(frozen=True, eq=False)
class ByteLoss:
    """Both vocabularies as tries, on the engine's device."""

    spec: DistillSection
    student: ByteTrie
    teacher: ByteTrie
    symbols: Tensor  # bool [257]: what both can spell

    @classmethod
    def of(
        cls, spec: DistillSection, student: Vocabulary, teacher: Vocabulary, device: torch.device
    ) -> "ByteLoss":
        """ValueError for a lossy tokenizer."""
        own, other = ByteTrie.of(student, device), ByteTrie.of(teacher, device)
        return cls(spec, own, other, alphabet([own, other]))

    def __call__(
        self, student: HeadInputs, teacher: HeadInputs, batch: Batch, teacher_batch: Batch
    ) -> Loss:
        """(sum over byte positions, metrics as sums). teacher_batch: Batch.for_teacher."""
        others = next_bytes(
            teacher, self.teacher, windows_of(self.teacher, teacher_batch), symbols=self.symbols
        )
        return self.against(student, others, batch)

    def of_cache(self, student: HeadInputs, rows: TopK, batch: Batch, teacher_batch: Batch) -> Loss:
        """The same by a teacher's likeliest ids at every token of its texts."""
        windows = windows_of(self.teacher, teacher_batch)
        others = next_bytes_of_topk(rows, self.teacher, windows, symbols=self.symbols)
        return self.against(student, others, batch)

    def against(self, student: HeadInputs, others: NextBytes, batch: Batch) -> Loss:
        spec = self.spec
        how = ByteDivergence(spec.divergence, spec.beta, spec.temperature, spec.max_missing)
        windows = windows_of(self.student, batch)
        result = byte_kl(student, self.student, windows, others, how, symbols=self.symbols)
        scale = spec.temperature**2 if spec.scale_t2 else 1.0
        return scale * result.total, _metrics(result, others.missing_P)


def byte_loss(
    spec: DistillSection, student: Chat, teacher: Chat, engine: Engine, *, same: bool
) -> ByteLoss:
    """ValueError for a tokenizer that is not byte-exact."""
    rows = engine.vocab_size if same else teacher.vocab_size
    return ByteLoss.of(
        spec,
        Vocabulary(student.table, student.stop_ids, engine.vocab_size),
        Vocabulary(teacher.table, teacher.stop_ids, rows),
        engine.device,
    )


def _metrics(result: ByteKL, teacher_missing_P: Tensor) -> dict[str, Tensor]:
    """kl: nats. byte_positions: all; byte_left_out: of them, those with too much mass missing.
    missing/...: sums of the shares of the distributions that were left out, at all positions.
    """
    return {
        "kl": result.kl_P.sum(),
        "byte_positions": torch.full_like(result.total.detach(), len(result.kl_P)),
        "byte_left_out": (~result.compared_P).sum(),
        "missing/student": result.missing_P.sum(),
        "missing/teacher": teacher_missing_P.sum(),
    }
