"""What the ranks of a run agree on: sums, means, gathered rows, equal numbers of micro-batches.

Data-parallel ranks hold different rows. The ranks of a tensor-parallel group hold the same rows and
count once.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from reflux.trainer.data.batch import Batch, empty_batch

from .metrics import MetricSums


class RankGroup:
    """The data-parallel ranks. Every method is collective; reductions are in float64.

    rank, world: of this process among them, and their number.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        """group: None where there is a single data-parallel rank."""
        self._group, self._device = group, device
        self.rank = dist.get_rank(group) if group else 0
        self.world = dist.get_world_size(group) if group else 1

    def reduce(self, values: Sequence[Tensor], op: dist.ReduceOp.RedOpType) -> list[float]:
        """Each scalar of `values` over all ranks, in one all-reduce."""
        if not values:
            return []
        stacked = torch.stack([v.detach().double() for v in values])
        if self.world > 1:
            dist.all_reduce(stacked, op, group=self._group)
        return stacked.tolist()

    def sum(self, value: float) -> float:
        return self.reduce([self._scalar(value)], dist.ReduceOp.SUM)[0]

    def max(self, value: float) -> float:
        return self.reduce([self._scalar(value)], dist.ReduceOp.MAX)[0]

    def mean(self, metric_sums: MetricSums) -> dict[str, float]:
        """Means over all ranks' entries; 0.0 where there is none. Every rank must have added under
        the same names.
        """
        names = sorted(metric_sums.sums)
        flat = [self._scalar(v) for n in names for v in metric_sums.sums[n]]
        reduced = self.reduce(flat, dist.ReduceOp.SUM)
        return {
            name: total / count if count else 0.0
            for name, total, count in zip(names, reduced[::2], reduced[1::2])
        }

    def gather(self, rows: list) -> list:
        """All ranks' rows in rank order, on every rank."""
        if self.world == 1:
            return rows
        parts: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, rows, group=self._group)
        return [row for part in parts for row in part]

    def pad(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same number of micro-batches on every rank, at least one: ranks that have fewer get
        empty ones.
        """
        most = int(self.max(float(len(batches))))
        return [*batches, *(empty_batch() for _ in range(max(most, 1) - len(batches)))]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process, tensor-parallel ones included."""
        value = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._device)
