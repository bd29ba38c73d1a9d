"""What the ranks of a run agree on: sums, means, gathered rows, equal numbers of micro-batches.

Data-parallel ranks hold different rows. The ranks of a tensor-parallel group hold the same rows and
count once.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reflux.trainer.data.batch import Batch, empty_batch

from .metrics import MetricSums

Result = TypeVar("Result")


def from_all_ranks(
    work: Callable[[], Result], group: dist.ProcessGroup | None = None
) -> list[Result]:
    """work() of every rank, in rank order, on every rank. Collective over `group` (None: all).

    Where it raises on some, it raises on all: each failed rank its own error, the others the first
    rank's, as OSError with the same errno, ValueError or RuntimeError.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [work()]
    result, error, failure = None, None, None
    try:
        result = work()
    except Exception as caught:
        error, failure = caught, _portable(caught)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, (result, failure), group=group)
    if error is not None:
        raise error
    for rank, (_, other) in enumerate(parts):
        if other is not None:
            kind, arguments = other
            raise kind(*arguments[:-1], f"rank {rank}: {arguments[-1]}")
    return [value for value, _ in parts]


def _portable(error: Exception) -> tuple[type[Exception], tuple]:
    """The error as a class and arguments that pickle takes; a user's class may refuse."""
    if isinstance(error, OSError) and error.errno is not None:
        name = f"{error.filename}: " if error.filename else ""
        return OSError, (error.errno, f"{name}{error.strerror}")
    return (ValueError if isinstance(error, ValueError) else RuntimeError), (str(error),)


class RankGroup:
    """The data-parallel ranks. Every method is collective; reductions are in float64.

    rank, world: of this process among them, and their number.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        row: dist.ProcessGroup | None = None,
    ):
        """group: None where there is a single data-parallel rank. row: the ranks that hold the rows
        of this one; None without tensor parallelism.
        """
        self._group, self._row, self._device = group, row, device
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
        """Means over all ranks' entries, the same on every rank; names without an entry are left
        out. Every rank must have added under the same names.
        """
        names = sorted(metric_sums.sums)
        flat = [self._scalar(v) for n in names for v in metric_sums.sums[n]]
        reduced = self.reduce(flat, dist.ReduceOp.SUM)
        return {
            name: total / count
            for name, total, count in zip(names, reduced[::2], reduced[1::2])
            if count
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

    def once_per_row(self, work: Callable[[], Result]) -> Result:
        """work() of the first of the ranks that hold these rows, on all of them; its error too."""
        return work() if self._row is None else Peers(self._row).from_first(work)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process, tensor-parallel ones included."""
        value = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._device)


class Peers:
    """The ranks of a run as they read and write the files of checkpoints. Every method but `share`
    is collective.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group  # for collectives on CPU; None: the default one

    @property
    def is_first(self) -> bool:
        return dist.get_rank(self.group) == 0

    def from_all(self, work: Callable[[], Result]) -> list[Result]:
        """work() of every rank; see from_all_ranks."""
        return from_all_ranks(work, self.group)

    def from_first(self, work: Callable[[], Result]) -> Result:
        """work() of the first rank, on every rank; its error too."""
        results = from_all_ranks(lambda: work() if self.is_first else None, self.group)
        return results[0]  # type: ignore[return-value]  # the first rank's is no None of the others

    def share(self, names: Sequence[str]) -> list[str]:
        """The files that this rank reads: those it wrote, and its part of the others."""
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        owners = [_writer_of(name) for name in names]
        return [
            name
            for i, (name, owner) in enumerate(zip(names, owners))
            if (owner if owner is not None and owner < world else i % world) == rank
        ]


def _writer_of(name: str) -> int | None:
    """The rank in the name of a file of torch's format, __RANK_INDEX.distcp."""
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else None
