"""How many GPUs a run takes, by a made-up need."""

import io

from rich.console import Console

from reflux.trainer.preflight.gpus import GPUS, USABLE, fewest_ranks, gpu_table
from reflux.trainer.preflight.memory import RankPlan

GIB = 2**30


def need(plan: RankPlan) -> int:
    """20 GiB that every rank has, and 100 that the ranks share."""
    return 20 * GIB + 100 * GIB // (plan.shard * plan.tensor)


def test_the_fewest_ranks_are_the_first_power_of_two_that_fits():
    one = RankPlan(1, 1, 1, 1)
    assert fewest_ranks(one, 121 * GIB, need) == 1
    assert fewest_ranks(one, 45 * GIB, need) == 4
    assert fewest_ranks(RankPlan(1, 2, 2, 4), 45 * GIB, need) == 8  # replicas help nothing
    assert fewest_ranks(one, 20 * GIB, need) is None


def test_the_table_says_what_fits_and_what_is_short():
    table = gpu_table(RankPlan(1, 1, 1, 1), need)
    out = io.StringIO()
    Console(width=120, file=out).print(table)
    rows = {name: next(x for x in out.getvalue().splitlines() if name in x) for name in GPUS}
    assert "fits" in rows["H200"] and "fits" in rows["B200"]
    assert "short" in rows["A100 40 GB"] and rows["A100 40 GB"].split()[-1] == "8"
    assert USABLE < 1
