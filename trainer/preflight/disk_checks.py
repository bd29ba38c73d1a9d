"""Whether the checkpoints and the export of a run fit on the disk of its folder."""

import math
from pathlib import Path
from typing import Any

from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.disk_space import free_bytes, size
from reflux.trainer.engine.checkpoint_folder import folder_bytes

from .report import Finding
from .shapes import BYTES, Shape


def disk_findings(cfg: Config, config: Any, shape: Shape) -> list[Finding]:
    """One finding for a run that trains: a warning where they do not fit. config: torchtitan's."""
    if not cfg.trains:
        return []
    section, whole = config.checkpoint, checkpoint_bytes(config, shape)
    every = _saving_evaluations(cfg)
    count, export = kept_at_once(cfg.steps, section, every), export_bytes(cfg, shape)
    needed = count * whole + export
    if section.last_save_model_only and count and count == written(cfg.steps, section, every):
        needed -= whole * 2 // 3  # the last one has no moments, and was never beside as many whole
    try:
        free = free_bytes(cfg.folder) + _replaced(cfg, section)
    except OSError as error:
        return [Finding("warning", f"disk: {error}", "choose a folder that can be entered")]
    what = (
        f"disk: at least {count} checkpoint(s) of {size(whole)} at once and an export of "
        f"{size(export)}, {size(needed)}; {size(free)} are free for them in {cfg.folder}"
    )
    if needed <= free:
        return [Finding("ok", what)]
    keeps_all = not section.keep_latest_k and count > 2
    advice = "make room, or choose another folder"
    return [Finding("warning", what, "set checkpoint.keep_latest_k" if keeps_all else advice)]


def _replaced(cfg: Config, section: Any) -> int:
    """Bytes of the checkpoints that a resumed run replaces by its own."""
    if cfg.on_existing_run != "resume" or not section.keep_latest_k:
        return 0
    return sum(map(folder_bytes, (Path(cfg.folder) / section.folder).glob("step-*")))


def checkpoint_bytes(config: Any, shape: Shape) -> int:
    """Trained weights and both of AdamW's moments, over all ranks."""
    numel = sum(map(math.prod, shape.adapters)) or shape.numel
    return 3 * numel * BYTES[config.training.dtype]


def export_bytes(cfg: Config, shape: Shape) -> int:
    """Of the model, or with [lora] of the adapter, in fp32, unless it is merged."""
    if not cfg.export.enable:
        return 0
    if shape.adapters and not cfg.export.merge:
        return sum(map(math.prod, shape.adapters)) * BYTES["float32"]
    return shape.numel * BYTES[cfg.export.dtype]


def _saving_evaluations(cfg: Config) -> int:
    """Steps between the evaluations whose checkpoint guard.utility_drop goes back to; 0: none."""
    watched = spec_of(cfg.phase).has_reference and cfg.guard.utility_drop and cfg.eval.asks
    return cfg.eval.every if watched else 0


def kept_at_once(steps: int, checkpoint: Any, every: int = 0) -> int:
    """How many whole checkpoints there have to be room for. Retention deletes after it has written,
    or before it where the disk is full: all but one fewer than it keeps, and at least one. every:
    steps between evaluations that save; the last one that passed stays beside the newest.
    """
    count, keep = written(steps, checkpoint, every), checkpoint.keep_latest_k
    return min(count, max(keep, 2) + bool(every)) if keep else count


def written(steps: int, checkpoint: Any, every: int = 0) -> int:
    """How many checkpoints a run writes, if every evaluation passes; guards may ask for more."""
    if not checkpoint.enable or checkpoint.load_only:
        return 0
    first = {1} if checkpoint.enable_first_step_checkpoint else set()
    passed = range(every, steps, every) if every else ()
    return len(
        {*range(checkpoint.interval, steps, checkpoint.interval), *passed, *first, steps} - {0}
    )
