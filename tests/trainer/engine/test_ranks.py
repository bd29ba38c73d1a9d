"""Sums, means and padding over two ranks, against numbers by hand."""

import pytest
import torch
import torch.distributed as dist
from shards import run_on_ranks

from reflux.trainer.data.batch import empty_batch
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.engine.ranks import RankGroup

CPU = torch.device("cpu")


def answers() -> dict:
    """What each method returns where rank 0 holds 1, 2 and rank 1 holds 6."""
    ranks = RankGroup(dist.group.WORLD, CPU)
    rows = ([1.0, 2.0], [6.0])[ranks.rank]
    sums = MetricSums()
    sums.add("a", rows)
    sums.add("b", [4.0][ranks.rank :])  # one rank alone has an entry
    sums.add("none", [])
    return {
        "rank": ranks.rank,
        "sum": ranks.sum(sum(rows)),
        "max": ranks.max(max(rows)),
        "mean": ranks.mean(sums),
        "gather": ranks.gather(rows),
        "batches": len(ranks.pad([empty_batch()] * len(rows))),
        "none": len(ranks.pad([])),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
    }


def test_two_ranks_agree():
    same = {
        "sum": 9.0,
        "max": 6.0,
        "mean": {"a": 3.0, "b": 4.0},  # none: a mean of nothing is no number
        "gather": [1.0, 2.0, 6.0],
        "batches": 2,
        "none": 1,
        "any": (True, False),
    }
    assert run_on_ranks(answers) == [same | {"rank": rank} for rank in range(2)]


def shared_work() -> tuple:
    """Two ranks that hold the same rows."""
    ranks = RankGroup(None, CPU, dist.group.WORLD)
    done = []

    def work(fails=False):
        done.append(dist.get_rank())
        if fails:
            raise ValueError("no answer")
        return {"rank": dist.get_rank()}

    answer = ranks.once_per_row(work)
    try:
        ranks.once_per_row(lambda: work(fails=True))
    except ValueError as error:
        return answer, done, str(error)


def test_ranks_of_a_row_share_an_answer_and_an_error():
    first, second = run_on_ranks(shared_work)
    assert first == ({"rank": 0}, [0, 0], "no answer")
    assert second == ({"rank": 0}, [], "rank 0: no answer")


def test_a_single_rank_needs_no_group():
    ranks = RankGroup(None, CPU)
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.once_per_row(lambda: 3) == 3
    assert ranks.sum(2.5) == 2.5 and ranks.gather([1, 2]) == [1, 2]
    assert ranks.reduce([], dist.ReduceOp.SUM) == []
    # the third of three numbers that float32 would round away
    assert ranks.sum(1e9 + 0.25) == pytest.approx(1e9 + 0.25, rel=0, abs=0)
