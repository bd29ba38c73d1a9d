"""Several ranks as threads of this process, for what only gathers."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ThreadRank:
    """A Host of data/fitted_prompts.py."""

    rank: int = 0
    world: int = 1
    seq_len: int = 96
    inputs: Mapping[str, Any] = field(default_factory=dict)
    exchange: "_Exchange | None" = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: list) -> list:
        return rows if self.exchange is None else self.exchange.gather(self.rank, rows)


class _Exchange:
    def __init__(self, world: int):
        self.barrier, self.parts = threading.Barrier(world, timeout=60), [[] for _ in range(world)]

    def gather(self, rank: int, rows: list) -> list:
        self.parts[rank] = rows
        self.barrier.wait()
        everything = [row for part in self.parts for row in part]
        self.barrier.wait()
        return everything


def on_ranks(world: int, work: Callable[[ThreadRank], Any], **host: Any) -> list[Any]:
    """What `work` returns, or the ValueError that it raises, on every rank."""
    exchange, results = _Exchange(world), [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, world, exchange=exchange, **host))
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
