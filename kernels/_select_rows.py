"""The k largest logits of each row, the lowest id first among equal ones, on one rank or several.

torch.topk says nothing about which of several equal values it returns, and GPUs and CPUs differ.
Its values are right, though; so the ids of the k-th value are looked up again, in a running count
of how often that value has occurred.

Shapes: C rows of a chunk, V vocabulary (this rank's slice of it), K top-k ids.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ._parallel import process_group

NO_ID = -1  # padding: its value is -inf
LAST = 2**31 - 1


def sort_pairs(value_CK: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    """By falling value, equal values by rising id, NO_ID last."""
    ids_CK, order_CK = ids_CK.masked_fill(ids_CK == NO_ID, LAST).sort(1)
    value_CK, by_value_CK = value_CK.gather(1, order_CK).sort(dim=1, descending=True, stable=True)
    ids_CK = ids_CK.gather(1, by_value_CK)
    return value_CK, ids_CK.masked_fill(ids_CK == LAST, NO_ID)


def largest(x_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values [C, k], ids int64 [C, k]) of the k largest of each row, ordered by `sort_pairs`."""
    top_CK, ids_CK = x_CV.topk(k, dim=1)
    last_C1 = top_CK[:, -1:]
    seen_CV = (x_CV == last_C1).cumsum(1, dtype=torch.int32)  # of the k-th value, up to here
    above_C1 = (top_CK > last_C1).sum(1, keepdim=True, dtype=torch.int32)
    nth_CK = (torch.arange(1, k + 1, device=x_CV.device, dtype=torch.int32) - above_C1).clamp(min=1)
    return sort_pairs(
        top_CK, torch.where(top_CK == last_C1, torch.searchsorted(seen_CV, nth_CK), ids_CK)
    )


def largest_of_all(x_CV: Tensor, k: int, start: int, width: int, group: str) -> Tensor:
    """Ids [C, k] of the whole vocabulary. x: columns from start on; k candidates a rank travel."""
    if not group:
        return largest(x_CV[:, :width], k)[1]
    value_CK, ids_CK = (
        x_CV.new_full((len(x_CV), k), -torch.inf),
        x_CV.new_full((len(x_CV), k), NO_ID, dtype=torch.int64),
    )
    if local := min(k, width):
        value_CK[:, :local], ids_CK[:, :local] = largest(x_CV[:, :width], local)
        ids_CK[:, :local] += start
    return sort_pairs(all_gather(value_CK, group), all_gather(ids_CK, group))[1][:, :k]


def all_gather(x_CK: Tensor, group: str) -> Tensor:
    """The columns of all ranks side by side [C, ranks * K], in the order of the ranks."""
    ranks = process_group(group)
    parts = [torch.empty_like(x_CK) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, x_CK.contiguous(), group=ranks)
    return torch.cat(parts, 1)


def without_repeats(ids_CK: Tensor) -> Tensor:
    """The same ids by rising number, each once; NO_ID where one has gone."""
    ids_CK = ids_CK.sort(1).values
    twice_CK = torch.zeros_like(ids_CK, dtype=torch.bool)
    twice_CK[:, 1:] = ids_CK[:, 1:] == ids_CK[:, :-1]
    return ids_CK.masked_fill(twice_CK, NO_ID)
