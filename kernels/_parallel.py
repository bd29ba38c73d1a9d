"""Vocabulary parallelism: each rank of a group holds a slice of the head, all see the same hidden.

A softmax over slices needs two things from the others: the largest logit (one MAX all-reduce) and
the sums taken relative to it (one SUM). A few numbers a token travel; logits never do. Ids are
global everywhere, each rank masks to its own range. dhidden is a partial sum on every rank and is
all-reduced once at the end.

A head that fully_shard has sharded is no such slice: its ranks see different tokens. So a slice is
always declared.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary: rows start .. start + len(head) of the whole head.

    Ranks of `group` must hold consecutive slices without overlap; the last may be shorter. `group`
    is the name of the group, `process_group.group_name`: a custom op takes strings, not groups.
    """

    group: str
    start: int

    @classmethod
    def of(cls, head: Tensor) -> "VocabShard":
        """This rank's slice of a DTensor head with one Shard(0), as tensor parallelism makes it."""
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not (
            isinstance(head, DTensor)
            and head.device_mesh.ndim == 1
            and head.placements == (Shard(0),)
        ):
            raise ValueError(
                f"VocabShard.of: got a {type(head).__name__} with placements "
                f"{getattr(head, 'placements', None)}; want a DTensor with one Shard(0) over a "
                "one-dimensional mesh, e.g. the head after ColwiseParallel inside forward"
            )
        _, offset = compute_local_shape_and_global_offset(
            head.shape, head.device_mesh, head.placements
        )
        return cls(head.device_mesh.get_group().group_name, offset[0])


def local_head(op: str, head: Tensor, shard: VocabShard | None) -> Tensor:
    """The plain tensor of a head or bias on this rank. ValueError: a DTensor without a shard."""
    if not hasattr(head, "to_local"):
        return head
    if shard is None and all(p.is_replicate() for p in getattr(head, "placements", [None])):
        return head.to_local()  # every rank holds it whole
    if shard is None:
        raise ValueError(
            f"{op}: the head is a sharded DTensor. Sharded by fully_shard? Call the op inside the "
            "forward of the module that owns it, where a plain tensor has been gathered. Sharded "
            "over the vocabulary by tensor parallelism? Pass shard=VocabShard.of(head)"
        )
    held = VocabShard.of(head)
    if held != shard:
        raise ValueError(
            f"{op}: this DTensor is {held}, shard={shard}. Both sides of a divergence must be cut "
            "at the same rows of the vocabulary: pad their heads to one size before they are "
            "sharded"
        )
    return head.to_local()


def local_width(rows: int, vocab_size: int, start: int) -> int:
    """How many rows of a slice are tokens, 0 if all are padding. vocab_size: of all slices."""
    return max(0, min(rows, vocab_size - start))


def common_width(vocab_size: int, group: str) -> int:
    """The width to cut chunks by, the mean of all slices: then all ranks loop equally often."""
    return -(-vocab_size // dist.get_world_size(process_group(group))) if group else vocab_size


def process_group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str


def slice_of(shard: VocabShard | None) -> tuple[str, int]:
    """(group, first row) as the ops take them: an empty name where there is no group."""
    return (shard.group, shard.start) if shard else ("", 0)


def all_max(x: Tensor, group: str) -> Tensor:
    """Elementwise maximum over the group, in place; without a group, x itself."""
    if group:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=process_group(group))
    return x


def all_sum(x: Tensor, group: str) -> Tensor:
    """Elementwise sum over the group, in place; without a group, x itself."""
    if group:
        dist.all_reduce(x, group=process_group(group))
    return x


def merge_sums(local_max_C: Tensor, sums_NC: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(max, sums relative to it) of all slices.

    Takes a slice's max [C] or [N, C] and its sums [N, C] of e^(x - that max). The sums may carry
    any factor. A slice without a finite logit adds nothing, but a NaN on one rank reaches all.
    """
    if not group:
        return local_max_C, sums_NC
    max_C = all_max(local_max_C.clone(), group)
    scale_C = torch.where(local_max_C == -torch.inf, 0.0, (local_max_C - max_C).exp())
    return max_C, all_sum(
        torch.where((scale_C == 0) & ~sums_NC.isnan(), 0.0, sums_NC * scale_C), group
    )
