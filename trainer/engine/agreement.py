"""What one rank finds wrong ends all of them, with the same words and without a hang."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def agreed(check: Callable[[], Result]) -> Result:
    """`check()` on every rank. Where it raises ValueError or OSError on some, all ranks raise
    ValueError with the first of these messages. Collective; without a process group, a plain call.
    """
    result, error = None, None
    try:
        result = check()
    except (ValueError, OSError) as caught:
        error = caught
    messages: list[str | None] = [None if error is None else str(error)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
    first = next((m for m in messages if m is not None), None)
    if first is not None:
        raise ValueError(first) from error
    return result  # type: ignore[return-value]  # check() has returned


def is_first_rank() -> bool:
    """Whether this process does what one of them is enough for."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return rank == 0
