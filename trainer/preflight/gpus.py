"""Which GPUs a planned run fits, by the peak of one rank."""

from collections.abc import Callable
from dataclasses import replace

from rich import box
from rich.table import Table

from .memory import RankPlan
from .report import size

# total memory as nvidia-smi prints it, MiB
GPUS = {
    "A100 40 GB": 40_536,
    "A100 80 GB": 81_920,
    "H100 80 GB": 81_559,
    "H200": 143_771,
    "B200": 183_359,
}
USABLE = 0.92  # the rest: CUDA's context, NCCL's buffers, fragments
MOST = 1024  # ranks


def gpu_table(ranks: RankPlan, peak_of: Callable[[RankPlan], int]) -> Table:
    """One row a GPU: does the planned job fit, and how many of them would it take?

    peak_of: device bytes of one rank under a mesh. More GPUs means a larger shard degree.
    """
    title = f"GPUs: a rank may use {USABLE:.0%} of the memory"
    table = Table("GPU", "memory", f"{ranks.world} of them", "fewest", box=box.SIMPLE, title=title)
    planned = peak_of(ranks)
    for name, mib in GPUS.items():
        usable = int(mib * 2**20 * USABLE)
        fits = "fits" if planned <= usable else f"{size(planned - usable)} short"
        fewest = fewest_ranks(ranks, usable, peak_of)
        table.add_row(name, size(mib * 2**20), fits, "none" if fewest is None else str(fewest))
    return table


def fewest_ranks(ranks: RankPlan, usable: int, peak_of: Callable[[RankPlan], int]) -> int | None:
    """The smallest shard degree, a power of two, whose ranks need at most `usable` bytes, as a
    number of GPUs; None up to MOST.
    """
    shard, others = 1, ranks.replicate * ranks.tensor
    while shard * others <= MOST:
        plan = replace(ranks, shard=shard, world=shard * others)
        if peak_of(plan) <= usable:
            return plan.world
        shard *= 2
    return None
