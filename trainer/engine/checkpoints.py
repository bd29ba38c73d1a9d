"""Going back to an earlier checkpoint of the same run."""

from pathlib import Path
from typing import Any

import torch.distributed as dist


def restore(checkpointer: Any, section: Any, step: int) -> int:
    """Loads the newest checkpoint that is not after `step`, or else the weights that the run
    started from (step 0). Returns its step. Collective.

    checkpointer, section: torchtitan's CheckpointManager and its Config. Later checkpoints are
    renamed to given-up-*, so that a resumed run does not start from them; nothing is deleted.
    """
    folder = Path(checkpointer.folder)
    saved = [int(p.parent.name.removeprefix("step-")) for p in folder.glob("step-*/.metadata")]
    newest = max((n for n in saved if n <= step), default=0)
    if newest:
        checkpointer.load(step=newest)
    elif section.initial_load_path:
        checkpointer.dcp_load(
            checkpointer._states_to_load(model_only=True),
            checkpoint_id=section.initial_load_path,
            from_hf=section.initial_load_in_hf,
            from_quantized=False,
        )
    dist.barrier()
    if dist.get_rank() == 0:
        for later in (n for n in saved if n > newest):
            (folder / f"step-{later}").rename(folder / f"given-up-{later}")
    dist.barrier()
    return newest
