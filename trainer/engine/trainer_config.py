"""Our configuration laid over torchtitan's: its sections keep their names, its dataclasses keep
their validation.
"""

# ruff: noqa: E402  install() has to run between the imports
from . import compat

compat.install()

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from reflux.trainer.config.schema import Config


def titan_config(
    cfg: Config, cls: type, spec: Any, dataloader: Any, tokenizer: Any, loss: Any
) -> Any:
    """torchtitan's Trainer.Config for a run. Raises ValueError for unknown keys and wrong types of
    its sections.
    """
    path = os.path.abspath(os.path.expanduser(cfg.model.path))
    given = (
        {} if cfg.model.from_scratch else {"initial_load_in_hf": True, "initial_load_path": path}
    )
    config = cls(
        model_spec=spec,
        hf_assets_path=path,
        dump_folder=os.path.abspath(cfg.folder),
        tokenizer=tokenizer,
        dataloader=dataloader,
        loss=loss,
        optimizer=default_adamw(
            lr=cfg.optim.lr,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
        ),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=min(10, cfg.steps // 10), decay_ratio=0.0
        ),
        training=TrainingConfig(disable_cuda_graphs=True, gc_freq=10, steps=max(cfg.steps, 1)),
        # spmd_types needs torch 2.14
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        # rollouts and rewards skew ranks
        comm=CommConfig(train_timeout_seconds=1800, init_timeout_seconds=1800),
        metrics=MetricsProcessor.Config(
            disable_color_printing=True,
            enable_tensorboard=cfg.log.tensorboard,
            enable_wandb=cfg.log.wandb,
        ),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=50, keep_latest_k=3, last_save_model_only=False, **given
        ),
        debug=DebugConfig(seed=cfg.seed, enable_structured_logging=False),
        activation_checkpoint={
            "none": None,
            "selective": SelectiveAC.Config(),
            "full": FullAC.Config(),
        }[cfg.activation_checkpoint],
    )
    _refuse_replaced(cfg.titan)
    for section, values in cfg.titan.items():
        _lay_over(getattr(config, section), values, f"{section}.")
    _refuse(config)
    return config


REPLACED = {
    "training.steps": "steps",
    "training.local_batch_size": "batch.tokens",
    "training.global_batch_size": "rollout.prompts",
    "checkpoint.folder": "folder",
    "checkpoint.initial_load_path": "model.path",
    "debug.seed": "seed",
}  # torchtitan's keys that our own tables decide


def _refuse_replaced(sections: Mapping[str, Mapping[str, Any]]) -> None:
    for name, ours in REPLACED.items():
        section, key = name.split(".")
        if key in sections.get(section, {}):
            raise ValueError(f"{name} is torchtitan's and has no effect here; set {ours} instead")


def _refuse(config: Any) -> None:
    if not config.checkpoint.enable:
        raise ValueError(
            "checkpoint.enable = false: torchtitan would then start from random weights without a "
            "word. Raise checkpoint.interval instead; the last step is always saved"
        )
    if config.parallelism.spmd_backend != "partial_dtensor":
        raise ValueError(
            f"parallelism.spmd_backend = {config.parallelism.spmd_backend!r}; want "
            "'partial_dtensor', the only one that runs on every supported torch"
        )


def _lay_over(target: Any, values: Mapping[str, Any], where: str) -> None:
    """Sets fields of a nested dataclass, strictly; each __post_init__ runs again, because
    torchtitan validates there.
    """
    hints = typing.get_type_hints(type(target), include_extras=True)
    names = [f.name for f in dataclasses.fields(target)]
    for key, value in values.items():
        if key not in names:
            near = get_close_matches(key, names, n=1)
            guess = f", did you mean {where}{near[0]}?" if near else "."
            raise ValueError(
                f"unknown key {where}{key}{guess} Known there: {', '.join(sorted(names))}"
            )
        current = getattr(target, key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(current):
            _lay_over(current, value, f"{where}{key}.")
        elif _fits(value, hints[key]):
            setattr(target, key, value)
        else:
            raise ValueError(f"{where}{key} = {value!r}; want {hints[key]}")
    if hasattr(target, "__post_init__"):
        target.__post_init__()


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin is typing.Literal:
        return value in args
    if origin is typing.Annotated:
        return _fits(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is not type(None) and isinstance(hint, type) and isinstance(value, hint)
