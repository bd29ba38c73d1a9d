"""What the ops on class probabilities share: the class of each id, and a head in class order.

[T, V] logits exist chunk by chunk with their columns sorted by class. For that the head's rows are
gathered into class order once per call, and its gradient goes back the other way; ids without a
class are left out of both.

Shapes: T tokens, V ids, N classes, D hidden, L ids that have a class (columns), H long classes, C
rows of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import _class_rows
from ._chunks import Part, chunk_plan, head_plan, on_tensor_cores
from ._class_rows import class_rows, class_rows_backward
from ._head import Head, HeadGradients, checked_head
from ._parallel import VocabShard, slice_of
from ._plan import Plan
from ._triton import runs_triton


@dataclass(frozen=True, eq=False)
class ClassMap:
    """The class of each id of one vocabulary, prepared by `class_map`; tensors on one device."""

    num_classes: int
    vocab_size: int  # ids of the whole vocabulary, those without a class too
    start: int  # the first id of this slice; 0 if it is no slice
    in_order: bool  # columns are the ids themselves: a head needs no gathering
    empty: frozenset[int]  # classes that no id of the whole vocabulary is in
    class_V: Tensor  # int64, of this slice
    order_L: Tensor  # int64, ids of this slice by class, then by id
    column_class_L: Tensor  # int32, class of each column
    first_N1: Tensor  # int64 [N + 1], where each class begins among the columns
    long_H: Tensor  # int64, classes of so many columns that they get a program of their own

    @property
    def columns(self) -> list[Tensor]:
        """For the ops: ids in class order (empty: as they are), classes, begins, long classes."""
        return [
            self.order_L[:0] if self.in_order else self.order_L,
            self.column_class_L,
            self.first_N1,
            self.long_H,
        ]

    def to(self, device: torch.device | str) -> "ClassMap":
        return replace(
            self,
            **{
                f.name: getattr(self, f.name).to(device)
                for f in fields(self)
                if isinstance(getattr(self, f.name), Tensor)
            },
        )

    def slice(self, start: int, stop: int) -> "ClassMap":
        """Of ids start .. stop - 1, for the rank that holds those head rows. Waits for a GPU."""
        if not (0 <= start <= stop <= self.class_V.shape[0]):
            raise ValueError(
                f"ClassMap.slice: {start} .. {stop} of {self.class_V.shape[0]} ids; want 0 <= "
                "start <= stop <= ids"
            )
        return _prepare(
            self.class_V[start:stop],
            self.num_classes,
            self.vocab_size,
            self.start + start,
            self.empty,
        )


def class_map(class_V: Tensor, num_classes: int) -> ClassMap:
    """Prepare the classes of V ids, once per vocabulary.

    class_V: integers [V] in -1 .. num_classes - 1; -1: no class. The result lies where class_V
    does; preparing waits for a GPU. A head can be put in class order for good, which saves
    gathering it in every call: head[classes.order_L] with class_map(class_V[classes.order_L],
    num_classes). ValueError on shapes, floating values, or a class out of range.
    """
    if not (class_V.ndim == 1 and not class_V.is_floating_point() and num_classes > 0):
        raise ValueError(
            f"class_map: classes are {class_V.dtype} {list(class_V.shape)} of {num_classes}; want "
            "integers [V], one per row of the head, and at least one class"
        )
    used = class_V.unique().tolist()
    if not (bool(used) and -1 <= used[0] <= used[-1] < num_classes and used[-1] >= 0):
        raise ValueError(
            f"class_map: classes from {used[:1]} to {used[-1:]} for {num_classes} classes; want -1 "
            f".. {num_classes - 1}, -1 for an id that is not in the softmax, and at least one id "
            "that is"
        )
    empty = frozenset(range(num_classes)) - set(used)
    return _prepare(class_V.long(), num_classes, class_V.shape[0], 0, empty)


def _prepare(
    class_V: Tensor, num_classes: int, vocab_size: int, start: int, empty: frozenset[int]
) -> ClassMap:
    sorted_V, id_V = torch.sort(class_V, stable=True)
    outside = int((class_V < 0).sum())
    order_L, column_class_L = id_V[outside:].contiguous(), sorted_V[outside:].contiguous()
    edges = torch.arange(num_classes + 1, device=class_V.device)
    first_N1 = torch.searchsorted(column_class_L, edges)
    in_order = torch.equal(order_L, torch.arange(len(order_L), device=class_V.device))
    return ClassMap(
        num_classes,
        vocab_size,
        start,
        in_order,
        empty,
        class_V,
        order_L,
        column_class_L.int(),
        first_N1,
        (first_N1.diff() > _class_rows.LONG).nonzero()[:, 0],
    )


def in_class_order(weight: Tensor, columns: list[Tensor]) -> Tensor:
    """Rows of a head, or entries of a bias, in class order, without those of no class."""
    order_L, class_L = columns[:2]
    return weight[order_L] if order_L.numel() else weight[: class_L.shape[0]]


def from_class_order(d_L: Tensor, columns: list[Tensor], like: Tensor) -> Tensor:
    """The gradient of `like` from one in class order, in like's dtype; 0 for ids of no class."""
    d = torch.zeros_like(like, memory_format=torch.contiguous_format)
    if columns[0].numel():
        return d.index_copy_(0, columns[0], d_L.to(like.dtype))
    d[: d_L.shape[0]] = d_L
    return d


def class_plan(
    x_TD: Tensor,
    columns: int,
    blocks_N: int,
    teacher: int,
    need: tuple[bool, bool, bool],
    workspace_mb: float,
    rows_M: Tensor | None = None,
) -> Plan:
    """How an op on classes cuts its rows; arguments as in `head_plan`.

    columns, the same on all ranks. blocks_N: numbers a row in blocks of [rows, N] alive at once.
    A row of logits is alive in the wide dtype (with PyTorch alone in 5 copies), its gradient
    beside it.
    """
    if not (on_tensor_cores(x_TD) and any(need)):
        row = (2 if runs_triton(x_TD) else 6) * columns + blocks_N
        return chunk_plan(x_TD, row, 1, workspace_mb)
    extra = blocks_N / max(columns, 1)
    blocks = 1 + extra, 5 + extra
    return head_plan(x_TD, columns, blocks, teacher, need, workspace_mb, rows_M)


class ClassSide(NamedTuple):
    """A model's hidden states and its head, in class order."""

    head: Head  # rows by class, [L, D]
    columns: list[Tensor]

    @classmethod
    def of(cls, head: Head, columns: list[Tensor]) -> "ClassSide":
        bias_L = None if head.bias_V is None else in_class_order(head.bias_V, columns)
        return cls(
            head._replace(head_VD=in_class_order(head.head_VD, columns), bias_V=bias_L), columns
        )

    def classes(self, logits_CL: Tensor, temperature: float, group: str) -> tuple[Tensor, Tensor]:
        """(z [C, N] relative to the row's largest scaled logit, that logit [C])."""
        _, class_L, first_N1, long_H = self.columns
        inv_temp = self.head.scales(temperature)[0]
        return class_rows(logits_CL, class_L, first_N1, long_H, inv_temp, group)

    def backward(
        self,
        part: Part,
        logits_CL: Tensor,
        classes: tuple[Tensor, Tensor],
        dz_CN: Tensor,
        temperature: float,
        grads: HeadGradients,
    ) -> None:
        """Add the gradient in z, times `grads.lift`, to those of the head.

        classes: what `classes` returned.
        """
        z_CN, top_C = classes
        d_CL = class_rows_backward(
            logits_CL,
            self.columns[1],
            top_C,
            z_CN,
            dz_CN,
            self.head.scales(temperature),
            self.head.softcap,
            grads.block(part, logits_CL),
        )
        grads.add(part, d_CL, self.head)

    def gradients(
        self,
        need: tuple[bool, bool, bool],
        plan: Plan,
        temperature: float,
        largest: float,
        unit: Tensor | None = None,
    ) -> HeadGradients:
        """Zeros in class order. largest: a bound of the gradient in z, for fp16."""
        x_TD, head_LD = self.head.hidden_TD, self.head.head_VD
        scale, d_scale = self.head.scales(temperature)
        largest *= scale * d_scale
        return HeadGradients.zeros(x_TD, head_LD, need, len(head_LD), plan, largest, unit)


def gradients_by_id(
    grads: HeadGradients, head_VD: Tensor, bias_V: Tensor | None, columns: list[Tensor], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, head and bias, in dtype and order of the inputs; empty where not needed."""
    dhead_VD, dbias_V = head_VD.new_empty(0), head_VD.new_empty(0)
    if grads.unit is not None:
        grads.dhead_VD.mul_(grads.unit), grads.dbias_V.mul_(grads.unit)
    if grads.need[1]:
        dhead_VD = from_class_order(grads.dhead_VD, columns, head_VD)
    if grads.need[2] and bias_V is not None:
        dbias_V = from_class_order(grads.dbias_V, columns, bias_V)
    return grads.summed_dhidden(group), dhead_VD, dbias_V


def fake_gradients(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of `gradients_by_id`."""
    like_bias = head_VD if bias_V is None else bias_V
    return (
        hidden_TD.new_empty(hidden_TD.shape if need[0] else (0,)),
        head_VD.new_empty(head_VD.shape if need[1] else (0,)),
        like_bias.new_empty(like_bias.shape) if need[2] else head_VD.new_empty(0),
    )


def checked_side(
    op: str,
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    classes: ClassMap,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> Head:
    """The head as the ops take it, still in the order of ids; ValueError for what does not fit."""
    whole = classes.vocab_size if shard else vocab_size
    head, _ = checked_head(op, hidden_TD, head_VD, bias, logit_scale, softcap, whole, shard)
    V, rows = classes.class_V.shape[0], len(head.head_VD) if vocab_size is None else vocab_size
    if not (V == rows if shard is None else V <= len(head.head_VD)):
        raise ValueError(
            f"{op}: the class map has {V} ids and the head {rows} rows; want a class for every "
            "row, -1 for padding. Pass vocab_size if only the first rows are ids, and with a "
            "shard the map's slice(start, stop)"
        )
    start = slice_of(shard)[1]
    if classes.start != start:
        raise ValueError(
            f"{op}: the class map starts at id {classes.start} and the head at {start}; want both "
            "of one slice: shard=VocabShard(group, start) with classes.slice(start, stop)"
        )
    if classes.class_V.device != hidden_TD.device:
        raise ValueError(
            f"{op}: hidden is on {hidden_TD.device} and the class map on {classes.class_V.device}; "
            "want classes.to(device) once"
        )
    return head
