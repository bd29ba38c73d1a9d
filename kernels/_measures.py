"""What a divergence op can tell of its rows besides the loss, from logits that exist anyway.

    entropy[t]       = - sum_v p[t, v] log p[t, v], p the student's softmax at the temperature, nats
    student_top1[t]  = argmax_v of the student's logits, teacher_top1 of the teacher's

    their agreement  = (student_top1 == teacher_top1).float().mean()
    their accuracy   = (student_top1 == labels).float().mean()

Rows that were not chosen have entropy 0 and top-1 -1. None has a gradient.

Shapes: T tokens, C rows of a chunk, V vocabulary (this rank's slice of it).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import Rows, padded, wide
from ._logprob_rows import logprob_rows
from ._parallel import all_max

UNKNOWN = -1  # top-1 of a row that was not computed


class KLMeasures(NamedTuple):
    entropy: Tensor  # [T], nats
    student_top1: Tensor  # [T], int64 ids of the whole vocabulary
    teacher_top1: Tensor  # [T], likewise

    @classmethod
    def empty(cls, x_TD: Tensor, asked: bool) -> "KLMeasures":
        """Of T rows that are not computed; of none, where nobody asked."""
        T = x_TD.shape[0] if asked else 0
        ids_2T = x_TD.new_full((2, T), UNKNOWN, dtype=torch.int64)
        return cls(x_TD.new_zeros(T, dtype=wide(x_TD.dtype)), ids_2T[0].clone(), ids_2T[1].clone())

    def read(
        self, c: Rows, logits: tuple[Tensor, Tensor], scale: float, group: str, start: int
    ) -> None:
        """Of a chunk, (student, teacher) logits [C, V] by `project`, before they are overwritten;
        nothing, where nobody asked.

        scale: what the student's are multiplied by; start: the slice's first id.
        """
        if not len(self.entropy):
            return
        z_CV, u_CV = logits
        any_C1 = torch.zeros_like(z_CV[:, :1], dtype=torch.int64)
        self.entropy[c] = logprob_rows(padded(z_CV), any_C1, scale, True, group)[2]
        self.student_top1[c] = top1_rows(z_CV, group, start)
        self.teacher_top1[c] = top1_rows(u_CV, group, start)


def top1_rows(logits_CV: Tensor, group: str, start: int) -> Tensor:
    """argmax [C] over all slices, as ids of the whole vocabulary; of equal ones the lowest."""
    if not logits_CV.shape[1]:  # a slice of nothing but padding
        logits_CV = logits_CV.new_full((len(logits_CV), 1), -torch.inf)
    value_C, id_C = logits_CV.max(1)
    id_C = id_C + start
    if not group:
        return id_C
    none = torch.iinfo(torch.int64).max
    mine_C = value_C == all_max(value_C.clone(), group)
    return -all_max(-torch.where(mine_C, id_C, none), group)
