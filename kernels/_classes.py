"""Class maps, and a head in class order: what the ops on class probabilities share.

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
from ._chunks import (
    Rows,
    as_autocast,
    backproject,
    check_bias,
    check_linear,
    fold_scale,
    gradient_block,
    gradient_buffers,
    project,
    wide,
)
from ._class_rows import class_rows, class_rows_backward
from ._parallel import VocabShard, all_sum, local_head
from ._triton import require, runs_triton


@dataclass(frozen=True, eq=False)
class ClassMap:
    """The class of each id, prepared by `class_map` for the kernels. Frozen tensors on one
    device.
    """

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
        """What the ops need: ids in class order (none: they are in order), class of each column,
        begins, long classes.
        """
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
        """The map of ids start .. stop - 1, for the rank that holds those rows of the head. Waits
        for a GPU.
        """
        require(
            0 <= start <= stop <= self.class_V.shape[0],
            f"ClassMap.slice: {start} .. {stop} of {self.class_V.shape[0]} ids; want 0 <= start <= "
            "stop <= ids",
        )
        return _prepare(
            self.class_V[start:stop],
            self.num_classes,
            self.vocab_size,
            self.start + start,
            self.empty,
        )


def class_map(class_V: Tensor, num_classes: int) -> ClassMap:
    """Prepare the classes of V ids, once per vocabulary. class_V: integers [V] in -1 .. num_classes
    - 1; -1: no class.

    The result lies where class_V does; preparing waits for a GPU. A head can be put in class order
    for good, which saves gathering it in every call: head[classes.order_L] with
    class_map(class_V[classes.order_L], num_classes). ValueError on shapes, floating values, or a
    class out of range.
    """
    require(
        class_V.ndim == 1 and not class_V.is_floating_point() and num_classes > 0,
        f"class_map: classes are {class_V.dtype} {list(class_V.shape)} of {num_classes}; want "
        "integers [V], "
        "one per row of the head, and at least one class",
    )
    found = class_V.unique().tolist()
    require(
        bool(found) and -1 <= found[0] <= found[-1] < num_classes and found[-1] >= 0,
        f"class_map: classes from {found[:1]} to {found[-1:]} for {num_classes} classes; want "
        f"-1 .. {num_classes - 1}, "
        "-1 for an id that is not in the softmax, and at least one id that is",
    )
    return _prepare(
        class_V.long(), num_classes, class_V.shape[0], 0, frozenset(range(num_classes)) - set(found)
    )


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
    """Rows of a head, or entries of a bias, in class order; those of ids without a class are
    gone.
    """
    order_L, class_L = columns[:2]
    return weight[order_L] if order_L.numel() else weight[: class_L.shape[0]]


def from_class_order(d_L: Tensor, columns: list[Tensor], like: Tensor) -> Tensor:
    """The gradient of `like` from one in class order, in like's dtype; 0 for ids without a
    class.
    """
    d = torch.zeros_like(like, memory_format=torch.contiguous_format)
    if columns[0].numel():
        return d.index_copy_(0, columns[0], d_L.to(like.dtype))
    d[: d_L.shape[0]] = d_L
    return d


def row_floats(x: Tensor, columns: int, num_classes: int) -> int:
    """Numbers that one row of a chunk keeps alive: row kernels work in place, PyTorch makes
    temporaries.
    """
    return (2 if runs_triton(x) else 6) * columns + 4 * num_classes


class Side(NamedTuple):
    """A model's hidden states and its head, in class order."""

    hidden_TD: Tensor
    head_LD: Tensor
    bias_L: Tensor | None
    columns: list[Tensor]
    logit_scale: float
    softcap: float

    @classmethod
    def of(
        cls,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        columns: list[Tensor],
        logit_scale: float,
        softcap: float,
    ) -> "Side":
        bias_L = None if bias_V is None else in_class_order(bias_V, columns)
        return cls(
            hidden_TD, in_class_order(head_VD, columns), bias_L, columns, logit_scale, softcap
        )

    def logits(self, c: Rows) -> Tensor:
        """[C, L], columns by class."""
        return project(self.hidden_TD[c], self.head_LD, self.softcap, self.bias_L, self.logit_scale)

    def scales(self, temperature: float) -> tuple[float, float]:
        return fold_scale(temperature, self.logit_scale, self.softcap)

    def classes(self, logits_CL: Tensor, temperature: float, group: str) -> tuple[Tensor, Tensor]:
        """(z [C, N] relative to the row's largest scaled logit, that logit [C])."""
        return class_rows(logits_CL, *self.columns[1:], self.scales(temperature)[0], group)

    def backward(
        self,
        c: Rows,
        logits_CL: Tensor,
        classes: tuple[Tensor, Tensor],
        dz_CN: Tensor,
        temperature: float,
        grads: "Gradients",
    ) -> None:
        """Add the gradient in z to those in hidden, head and bias. classes: what `classes`
        returned.
        """
        z_CN, top_C = classes
        d_CL = class_rows_backward(
            logits_CL,
            self.columns[1],
            top_C,
            z_CN,
            dz_CN,
            self.scales(temperature),
            self.softcap,
            gradient_block(logits_CL, self.hidden_TD),
        )
        d_CD = backproject(
            d_CL,
            self.hidden_TD[c],
            self.head_LD,
            grads.need[0],
            grads.dhead_LD if grads.need[1] else None,
            grads.dbias_L if grads.need[2] else None,
        )
        if grads.need[0]:
            grads.dhidden_TD[c] = d_CD


class Gradients(NamedTuple):
    """Where a call adds its gradients up, in fp32 or fp64 and in class order; empty where not
    needed.
    """

    dhidden_TD: Tensor
    dhead_LD: Tensor
    dbias_L: Tensor
    need: tuple[bool, bool, bool]  # hidden, head, bias

    @classmethod
    def of(cls, side: Side, need: tuple[bool, bool, bool]) -> "Gradients":
        L, dtype = side.head_LD.shape[0], wide(side.hidden_TD.dtype)
        return cls(
            *gradient_buffers(side.hidden_TD, side.head_LD, *need[:2]),
            side.hidden_TD.new_zeros(L if need[2] else 0, dtype=dtype),
            need,
        )

    def finish(
        self, head_VD: Tensor, bias_V: Tensor | None, columns: list[Tensor], group: str
    ) -> tuple[Tensor, ...]:
        """Those of hidden, head and bias, in the dtypes and the order of the inputs."""
        return (
            all_sum(self.dhidden_TD, group) if self.need[0] else self.dhidden_TD,
            from_class_order(self.dhead_LD, columns, head_VD)
            if self.need[1]
            else head_VD.new_empty(0),
            from_class_order(self.dbias_L, columns, bias_V)
            if self.need[2]
            else head_VD.new_empty(0),
        )


def fake_gradients(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, need: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if n else like.new_empty(0)
        for x, like, n in zip((hidden_TD, head_VD, bias_V), (hidden_TD, head_VD, head_VD), need)
    )


def checked_side(
    op: str,
    hidden_TD: Tensor,
    head_VD: Tensor,
    classes: ClassMap,
    bias: Tensor | None,
    vocab_size: int | None,
    temperature: float,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, head, bias) as the ops take them: plain tensors, in the dtype of autocast.
    ValueError for what does not fit.
    """
    head_VD, bias = (
        local_head(op, head_VD, shard),
        None if bias is None else local_head(f"{op} (bias)", bias, shard),
    )
    hidden_TD, head_VD, bias = as_autocast(hidden_TD, head_VD, bias)
    check_linear(
        op, hidden_TD, head_VD, classes.vocab_size if shard else vocab_size, temperature, shard
    )
    V, rows = classes.class_V.shape[0], head_VD.shape[0] if vocab_size is None else vocab_size
    require(
        V == rows if shard is None else V <= head_VD.shape[0],
        f"{op}: the class map has {V} ids and the head {rows} rows; want a class for every row, -1 "
        "for padding. Pass vocab_size if only the first rows are ids, and with a shard the map's "
        "slice(start, stop)",
    )
    start = 0 if shard is None else shard.start
    require(
        classes.start == start,
        f"{op}: the class map starts at id {classes.start} and the head at {start}; want both of "
        "one slice: shard=VocabShard(group, start) with classes.slice(start, stop)",
    )
    require(
        classes.class_V.device == hidden_TD.device,
        f"{op}: hidden is on {hidden_TD.device} and the class map on {classes.class_V.device}; "
        "want classes.to(device) once",
    )
    return hidden_TD, head_VD, check_bias(op, bias, head_VD)
