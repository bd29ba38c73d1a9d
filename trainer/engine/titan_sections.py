"""torchtitan's sections of a configuration, laid over torchtitan's own dataclasses. Every error
names the file or the `--set` that the value came from.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reflux.trainer.config.fit import fit, nearest
from reflux.trainer.config.origins import blamed
from reflux.trainer.config.schema import Config

# torchtitan's keys that our own tables decide
REPLACED = {
    "training.steps": "steps",
    "training.local_batch_size": "batch.tokens",
    "training.global_batch_size": "rollout.prompts",
    "checkpoint.folder": "folder",
    "checkpoint.initial_load_path": "model.path",
    "debug.seed": "seed",
}


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included; torchtitan itself would divide by 0, hang or go on
    with nonsense. why: what it is, and so what to choose.
    """

    low: float
    high: float = math.inf
    why: str = ""
    but_not: int | None = None

    def holds(self, value: Any) -> bool:
        return value is None or (self.low <= value <= self.high and value != self.but_not)

    def __str__(self) -> str:
        low = "> 0" if self.low == TINY else f">= {self.low:g}"
        span = low if self.high == math.inf else f"{self.low:g} to {self.high:g}"
        return span if self.but_not is None else f"{span}, and not {self.but_not}"


TINY = math.ulp(0.0)  # the least number above 0
SECONDS = "seconds before a collective that does not end is given up"
RANGES = {
    "training.seq_len": Range(1, why="tokens of the longest row, prompt and response"),
    "training.max_norm": Range(TINY, why="the gradient is clipped to it; inf-like: 1e9"),
    "training.gc_freq": Range(1, why="steps between two collections of garbage"),
    "checkpoint.interval": Range(1, why="steps; checkpoint.enable = false writes none"),
    "checkpoint.keep_latest_k": Range(
        0, but_not=1, why="0 keeps all; with one, a crash while it is written would lose it"
    ),
    "checkpoint.load_step": Range(-1, why="-1 is the newest whole one"),
    "comm.init_timeout_seconds": Range(1, why=SECONDS),
    "comm.train_timeout_seconds": Range(1, why=SECONDS),
    "comm.trace_buf_size": Range(0, why="0 is off"),
    "lr_scheduler.warmup_steps": Range(0, why="0 begins at the full rate"),
    "lr_scheduler.total_steps": Range(1, why="of the schedule; leave it out for `steps`"),
    "lr_scheduler.decay_ratio": Range(0, 1, why="a fraction of the steps; 0: the rate stays"),
    "lr_scheduler.min_lr_factor": Range(0, 1, why="a fraction of optim.lr"),
    "metrics.log_freq": Range(1, why="steps"),
    "profiler.profile_freq": Range(1, why="steps; profiler.enable_profiling = false is off"),
    "profiler.profiler_active": Range(1, why="steps in a trace"),
    "profiler.profiler_warmup": Range(0, why="steps"),
    "profiler.profiler_repeat": Range(0, why="traces; 0: to the end"),
    "profiler.profiler_skip_first": Range(0, why="steps before the first trace"),
    "profiler.profiler_skip_first_wait": Range(0, why="not 0: the first wait is left out"),
    "profiler.memory_snapshot_freq": Range(1, why="steps; leave it out for profile_freq"),
    "profiler.memory_snapshot_max_entries": Range(1, why="entries of the allocator's history"),
}


def lay_sections(config: Any, cfg: Config) -> None:
    """torchtitan's sections of `cfg` over `config`, in place. ValueError for unknown keys, wrong
    types, numbers out of range, what has no effect here, and what torchtitan refuses.
    """
    _check_replaced(cfg)
    loads = config.checkpoint.initial_load_in_hf
    for section, values in cfg.titan.items():
        _lay_over(getattr(config, section), values, f"{section}.", cfg)
    _check_choices(config, cfg)
    _check_start(config.checkpoint, loads, cfg)
    _check_schedule(config.lr_scheduler, cfg)
    _check_profiler(config.profiler, cfg)
    if not config.checkpoint.enable:
        # torchtitan's own meaning: no manager at all, and random weights in place of the model's
        config.checkpoint.enable = config.checkpoint.load_only = True


def _check_replaced(cfg: Config) -> None:
    for name, ours in REPLACED.items():
        section, key = name.split(".")
        if key in cfg.titan.get(section, {}):
            text = f"{name} is torchtitan's and has no effect here; set {ours} instead"
            raise blamed(cfg, [name], text)


def _check_choices(config: Any, cfg: Config) -> None:
    backend = config.parallelism.spmd_backend
    if backend != "partial_dtensor":
        text = (
            f"parallelism.spmd_backend = {backend!r}; want 'partial_dtensor', the only one that "
            "runs on every supported torch"
        )
        raise blamed(cfg, ["parallelism.spmd_backend"], text)
    if cfg.titan.get("compile", {}).get("backend"):
        from torch._dynamo import list_backends

        known, name = list_backends(exclude_tags=()), config.compile.backend
        if name not in known:
            usual = " | ".join(sorted(list_backends()))  # without those for debugging
            text = (
                f"compile.backend = {name!r}{nearest(name, known)} Want {usual}, or one of torch's"
            )
            text += " for debugging; inductor is the default"
            raise blamed(cfg, ["compile.backend"], text)
    if cfg.lora.rank and config.checkpoint.last_save_in_hf:
        text = (
            "checkpoint.last_save_in_hf = true with lora.rank > 0: checkpoints hold adapters only. "
            "Leave it out; export.merge = true writes the whole model"
        )
        raise blamed(cfg, ["checkpoint.last_save_in_hf"], text)


def _check_start(checkpoint: Any, loads: bool, cfg: Config) -> None:
    """What a run starts from. loads: whether torchtitan reads the model's folder."""
    if checkpoint.initial_load_in_hf != loads:
        text = (
            f"checkpoint.initial_load_in_hf = {str(not loads).lower()}; leave it out. It is "
            "decided by model.from_scratch and lora.rank, and is false for an adapter's folder"
        )
        raise blamed(cfg, ["checkpoint.initial_load_in_hf"], text)
    if checkpoint.create_seed_checkpoint:
        text = "checkpoint.create_seed_checkpoint = true; leave it out: a run writes none"
        raise blamed(cfg, ["checkpoint.create_seed_checkpoint"], text)


def _check_schedule(schedule: Any, cfg: Config) -> None:
    """Behind its end torchtitan's schedule goes on: below 0, up again, or into an assertion."""
    total = schedule.total_steps
    if cfg.trains and total is not None and total < cfg.steps:
        text = (
            f"lr_scheduler.total_steps = {total} with steps = {cfg.steps}; want at least steps: "
            "behind its end the schedule has no learning rate. Leave it out for steps"
        )
        raise blamed(cfg, ["lr_scheduler.total_steps"], text)


def _check_profiler(profiler: Any, cfg: Config) -> None:
    """torchtitan asserts it when the first step begins."""
    used = profiler.profiler_warmup + profiler.profiler_active
    if profiler.enable_profiling and profiler.profile_freq < used:
        text = (
            f"profiler.profile_freq = {profiler.profile_freq} with profiler.profiler_warmup = "
            f"{profiler.profiler_warmup} and profiler.profiler_active = "
            f"{profiler.profiler_active}; want at least their sum, {used}"
        )
        raise blamed(cfg, ["profiler"], text)


def _lay_over(target: Any, values: Mapping[str, Any], where: str, cfg: Config) -> None:
    """Sets fields of a nested dataclass. Each __post_init__ runs again, because torchtitan
    validates there.
    """
    hints = typing.get_type_hints(type(target), include_extras=True)
    names = [f.name for f in dataclasses.fields(target)]
    for key, value in values.items():
        name = where + key
        if key not in names:
            known = ", ".join(sorted(names))
            text = f"unknown key {name}{nearest(key, names, where)} Known there: {known}"
            raise blamed(cfg, [name], text)
        current = getattr(target, key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(current):
            _lay_over(current, value, f"{name}.", cfg)
            continue
        try:
            setattr(target, key, fit(value, hints[key], name))
        except ValueError as error:
            raise blamed(cfg, [name], str(error)) from None
        _check_range(name, getattr(target, key), cfg)
    if hasattr(target, "__post_init__"):
        _validate(target, where.removesuffix("."), cfg)


def _check_range(name: str, value: Any, cfg: Config) -> None:
    allowed = RANGES.get(name)
    if allowed is not None and not allowed.holds(value):
        raise blamed(cfg, [name], f"{name} = {value!r}; want {allowed} ({allowed.why})")


def _validate(target: Any, section: str, cfg: Config) -> None:
    """torchtitan's own checks of a section, in its words: it does not name the keys."""
    try:
        target.__post_init__()
    except (ValueError, AssertionError, TypeError) as error:
        given = ", ".join(f"{k} = {v!r}" for k, v in cfg.titan.get(section, {}).items())
        text = f"[{section}] is refused by torchtitan: {error} Given: {given}"
        raise blamed(cfg, [section], text) from None
