"""How a linear_* op cuts its tokens on a GPU: a cost model of the bytes that a cut costs.

A chunk is the rows whose logits are alive at once, a group the chunks whose dlogits go through the
GEMMs of the backward together. With w bytes an operand, the cut costs what is read and written
anew for each of them:

    bytes  = ceil(T / chunk) w V (D + E)       the heads, for the logits
           + ceil(T / group) w V D             the head, for dhidden
           + ceil(T / group) 8 V D             the fp32 dhead, read and written
    memory = V (logit_bytes chunk + grad_bytes group)

With group = chunk the third term is the largest, and it is the one that no maths hides: a product
of 768 rows takes 0.6 ms on an H200 and its dhead 0.6 ms more. dlogits take 2 bytes where the
logits of two models took 8, so that a group holds several chunks in the memory of one.

Splitting the vocabulary and not the rows would write dhead once, and project both heads twice, as
the softmax needs all of a row first: V (D + E) / 395e12 s a row more on an H200 against
8 V D / 4.3e12 s a group less, worth it below 370 rows a group at D = E. So rows are split.

Shapes: T tokens, V vocabulary, D student hidden, E teacher hidden (0 without a teacher).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

TILE = 128  # rows of a GEMM's tile: smaller chunks waste it
WORKSPACE_MB = 1200  # MiB of logits and their gradient alive at once
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of WORKSPACE_MB that `workspace_for` gives
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """What decides the bytes of one call."""

    tokens: int
    vocab: int
    student: int  # hidden size
    teacher: int  # 0: its logits come from elsewhere
    itemsize: int  # of hidden states and heads
    logit_bytes: int  # a token and column of a chunk: 4 for each block of fp32 logits
    grad_bytes: int  # of a group
    dhidden: bool = True
    dhead: bool = True


class Plan(NamedTuple):
    chunk: int  # rows
    group: int  # rows, a multiple of chunk


def bytes_moved(work: Work, plan: Plan) -> int:
    """What `plan` reads and writes of heads and of dhead."""
    chunks, groups = -(-work.tokens // plan.chunk), -(-work.tokens // plan.group)
    heads = work.itemsize * work.vocab * (work.student + work.teacher)
    a_group = (work.itemsize if work.dhidden else 0) + (8 if work.dhead else 0)
    return chunks * heads + groups * a_group * work.vocab * work.student


def bytes_held(work: Work, plan: Plan) -> int:
    """The workspace that `plan` needs."""
    return work.vocab * (work.logit_bytes * plan.chunk + work.grad_bytes * plan.group)


@lru_cache(maxsize=1024)
def plan_for(work: Work, budget: int) -> Plan:
    """The plan of least bytes within `budget` bytes of workspace; of equal ones the smallest.

    Multiples of TILE rows where the budget allows one, and at least one row. A function of its
    arguments alone: equal calls sum in equal order.
    """
    step = TILE if bytes_held(work, Plan(TILE, TILE)) <= budget else 1
    best, cost = Plan(step, step), (float("inf"), 0)
    for chunk in range(step, max(work.tokens, 1) + step, step):
        room = budget - work.vocab * work.logit_bytes * chunk
        most = room // (work.vocab * work.grad_bytes * chunk)
        if most < 1:
            break
        # as few groups as fit, and as few chunks in each as that takes
        groups = max(1, -(-work.tokens // (most * chunk)))
        fewest = max(1, -(-work.tokens // (groups * chunk))) if work.dhidden or work.dhead else 1
        plan = Plan(chunk, fewest * chunk)
        of_plan = bytes_moved(work, plan), bytes_held(work, plan)
        best, cost = (plan, of_plan) if of_plan < cost else (best, cost)
    return best


def workspace_for(
    free_bytes: int, tokens: int, vocab: int, itemsize: int = 2, share: float = 0.25
) -> int:
    """MiB of workspace for a device with `free_bytes` free: STEPS of WORKSPACE_MB, the largest that
    `share` of them holds and `tokens` can use; the smallest step where none does.

    tokens and vocab: of a call of `linear_kl`, whose two logits are fp32 (fp64 for 8 bytes an
    element) and whose gradient has the itemsize of its inputs. In steps, because the workspace
    decides in which order the head's gradient is summed: two runs that find about the same memory
    get the same numbers. ValueError for a share outside 0 to 1.
    """
    if not (0 < share <= 1):
        raise ValueError(f"workspace_for: share is {share}; want 0 < share <= 1")
    wide = max(itemsize, 4)
    useful = tokens * vocab * (2 * wide + itemsize) / MIB
    sizes = [int(WORKSPACE_MB * step) for step in STEPS]
    enough = next((mb for mb in sizes if mb >= useful), sizes[-1])
    return max(
        (mb for mb in sizes if mb <= min(share * free_bytes / MIB, enough)), default=sizes[0]
    )
