"""A model's last layer as the linear_* ops take it: checked once, projected chunk by chunk.

Shapes: T tokens, C rows of a chunk, D hidden, V vocabulary (this rank's slice of it).
"""

from typing import NamedTuple

from torch import Tensor

from ._chunks import (
    Part,
    Rows,
    as_autocast,
    backproject,
    check_bias,
    check_linear,
    check_logit_scale,
    check_softcap,
    fold_scale,
    gradient_buffers,
    gradient_room,
    lift_for,
    needs_gradient,
    project,
    wide,
)
from ._parallel import VocabShard, all_sum, local_head
from ._plan import Plan
from ._triton import check_plain


class Head(NamedTuple):
    """logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap); softcap 0: no tanh."""

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    softcap: float

    def cut(self, V: int) -> "Head":
        """Only the first V rows of the head: those of real tokens."""
        bias_V = None if self.bias_V is None else self.bias_V[:V]
        return self._replace(head_VD=self.head_VD[:V], bias_V=bias_V)

    def detach(self) -> "Head":
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return self._replace(
            hidden_TD=self.hidden_TD.detach(), head_VD=self.head_VD.detach(), bias_V=bias_V
        )

    def logits(self, c: Rows) -> Tensor:
        """[C, V] in fp32 or fp64, by `project`: without a cap they lack the factor of `scales`."""
        return project(self.hidden_TD[c], self.head_VD, self.softcap, self.bias_V, self.logit_scale)

    def scales(self, temperature: float) -> tuple[float, float]:
        """(factor of the logits, further factor of the gradients)."""
        return fold_scale(temperature, self.logit_scale, self.softcap)

    def needs(self, frozen: bool) -> tuple[bool, bool, bool]:
        """Which gradients the op has to make: of hidden, head and bias."""
        return (
            needs_gradient(self.hidden_TD),
            needs_gradient(self.head_VD, frozen),
            needs_gradient(self.bias_V, frozen),
        )


def checked_head(
    op: str,
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> tuple[Head, int]:
    """(plain tensors in the dtype of autocast, size of the whole vocabulary), or ValueError."""
    check_plain(op, hidden_TD, head_VD, bias_V)
    head_VD = local_head(op, head_VD, shard)
    bias_V = None if bias_V is None else local_head(f"{op} (bias)", bias_V, shard)
    hidden_TD, head_VD, bias_V = as_autocast(hidden_TD, head_VD, bias_V)
    V = check_linear(op, hidden_TD, head_VD, vocab_size, 1.0, shard)
    check_bias(op, bias_V, head_VD)
    scale, cap = check_logit_scale(op, logit_scale), check_softcap(op, softcap)
    return Head(hidden_TD, head_VD, bias_V, scale, cap), V


class HeadGradients(NamedTuple):
    """Where the chunks of a call add up their gradients; empty where not needed.

    Head and bias in fp32 or fp64, with all rows of the head, those of padding too.
    """

    dhidden_TD: Tensor
    dhead_VD: Tensor
    dbias_V: Tensor
    need: tuple[bool, bool, bool]  # hidden, head, bias
    room: Tensor  # the dlogits of a group [G, V] until its GEMMs; empty: they overwrite the logits
    lift: float  # factor of the dlogits, taken out by the GEMMs
    unit: Tensor | None  # what the caller divided their coefficients by

    @classmethod
    def zeros(
        cls,
        hidden_TD: Tensor,
        head_VD: Tensor,
        need: tuple[bool, bool, bool],
        V: int = 0,
        plan: Plan | None = None,
        largest: float = 1.0,
        unit: Tensor | None = None,
    ) -> "HeadGradients":
        """V, plan of `head_plan` and largest of `lift_for`: for ops that ask for `block`."""
        dbias_V = hidden_TD.new_zeros(len(head_VD) if need[2] else 0, dtype=wide(hidden_TD.dtype))
        rows = min(plan.group, len(hidden_TD)) if plan is not None and any(need) else 0
        room_GV = gradient_room(hidden_TD, rows, V)
        buffers = gradient_buffers(hidden_TD, head_VD, *need[:2])
        lift = 1.0 if plan is None else lift_for(hidden_TD, largest)
        return cls(*buffers, dbias_V, need, room_GV, lift, unit)

    def block(self, part: Part, logits_CV: Tensor) -> Tensor:
        """Where a row kernel writes lift * dlogits of a chunk: over the logits without a room."""
        C, V = logits_CV.shape
        return self.room[part.begin : part.begin + C, :V] if self.room.numel() else logits_CV

    def add(self, part: Part, dlogits_CV: Tensor, head: Head) -> None:
        """Add what the logits' gradients of a group come to, once its last chunk is there."""
        if part.group is None or not any(self.need):
            return
        V = len(head.head_VD)
        if self.room.numel():
            dlogits_CV = self.room[: part.begin + len(dlogits_CV), :V]
        dhidden_CD = backproject(
            dlogits_CV,
            head.hidden_TD[part.group],
            head.head_VD,
            self.need[0],
            self.dhead_VD[:V] if self.need[1] else None,
            self.dbias_V[:V] if self.need[2] else None,
            self.lift,
        )
        if dhidden_CD is not None:
            dhidden_CD = dhidden_CD if self.unit is None else dhidden_CD.mul_(self.unit)
            self.dhidden_TD[part.group] = dhidden_CD.to(self.dhidden_TD.dtype)

    def summed_dhidden(self, group: str) -> Tensor:
        """A slice's dhidden is a partial sum: one all-reduce of [T, D]."""
        return all_sum(self.dhidden_TD, group) if self.need[0] else self.dhidden_TD

    def finish(
        self, head_VD: Tensor, bias_V: Tensor | None, group: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden, dhead and dbias in the dtypes of the inputs."""
        if self.unit is not None:
            self.dhead_VD.mul_(self.unit), self.dbias_V.mul_(self.unit)
        return (
            self.summed_dhidden(group),
            self.dhead_VD.to(head_VD.dtype),
            self.dbias_V if bias_V is None else self.dbias_V.to(bias_V.dtype),
        )


def fake_gradients(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of `HeadGradients.finish`."""
    dbias_dtype = wide(hidden_TD.dtype) if bias_V is None else bias_V.dtype
    return (
        hidden_TD.new_empty(hidden_TD.shape if need[0] else (0,)),
        head_VD.new_empty(head_VD.shape if need[1] else (0,)),
        hidden_TD.new_empty(head_VD.shape[0] if need[2] else 0, dtype=dbias_dtype),
    )
