"""Our configuration laid over torchtitan's: its sections keep their names, its dataclasses keep
their validation.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec

from reflux.trainer.adapter_folder import read_adapter
from reflux.trainer.config.fit import fit, nearest
from reflux.trainer.config.schema import Config

from .checkpoints import Checkpointer
from .torchtitan_host import NoData, NoLoss, NoTokenizer, RefluxTrainer

# torchtitan's keys that our own tables decide
REPLACED = {
    "training.steps": "steps",
    "training.local_batch_size": "batch.tokens",
    "training.global_batch_size": "rollout.prompts",
    "checkpoint.folder": "folder",
    "checkpoint.initial_load_path": "model.path",
    "debug.seed": "seed",
}


@dataclasses.dataclass(kw_only=True, slots=True)
class Training(TrainingConfig):
    """torchtitan's section, and what is ours of it."""

    # gradients are reduced after every micro-batch and kept as shards; False: once a step, with
    # whole gradients in between (their memory: one model in mixed_precision_reduce on every rank)
    sync_every_microbatch: bool = True


def titan_config(cfg: Config, spec: ModelSpec) -> RefluxTrainer.Config:
    """torchtitan's configuration of a run. ValueError for unknown keys and wrong types of its
    sections, and for keys that have no effect or do harm here.
    """
    path = os.path.abspath(os.path.expanduser(cfg.model.path))
    initial: dict[str, Any] = {}
    # with adapters the engine itself loads what is in the folder
    if not (cfg.model.from_scratch or cfg.lora.rank or read_adapter(path)):
        initial = {"initial_load_in_hf": True, "initial_load_path": path}
    config = RefluxTrainer.Config(
        model_spec=spec,
        hf_assets_path=path,
        dump_folder=os.path.abspath(cfg.folder),
        tokenizer=NoTokenizer.Config(),
        dataloader=NoData.Config(),
        loss=NoLoss.Config(),
        optimizer=default_adamw(
            lr=cfg.optim.lr,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
        ),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=min(10, cfg.steps // 10), decay_ratio=0.0
        ),
        training=Training(disable_cuda_graphs=True, gc_freq=10, steps=max(cfg.steps, 1)),
        # spmd_types needs torch 2.14
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        # rollouts and rewards skew ranks
        comm=CommConfig(train_timeout_seconds=1800, init_timeout_seconds=1800),
        metrics=MetricsProcessor.Config(
            disable_color_printing=True,
            enable_tensorboard=cfg.log.tensorboard,
            enable_wandb=cfg.log.wandb,
        ),
        checkpoint=Checkpointer.Config(
            enable=True, interval=50, keep_latest_k=3, last_save_model_only=False, **initial
        ),
        debug=DebugConfig(seed=cfg.seed, enable_structured_logging=False),
        activation_checkpoint={
            "none": None,
            "selective": SelectiveAC.Config(),
            "full": FullAC.Config(),
        }[cfg.activation_checkpoint],
    )
    _check_replaced(cfg.titan)
    for section, values in cfg.titan.items():
        _lay_over(getattr(config, section), values, f"{section}.")
    if not config.checkpoint.enable:
        # torchtitan's own meaning: no manager at all, and random weights in place of the model's
        config.checkpoint.enable = config.checkpoint.load_only = True
    _check_supported(config)
    if cfg.lora.rank and config.checkpoint.last_save_in_hf:
        raise ValueError(
            "checkpoint.last_save_in_hf = true with lora.rank > 0: checkpoints hold adapters only. "
            "Leave it out; export.merge = true writes the whole model"
        )
    return config


def check_world(parallelism: ParallelismConfig, world: int) -> None:
    """ValueError where the degrees do not make `world` processes, or are none that exist here."""
    for kind in ("context", "pipeline", "expert"):
        name = f"{kind}_parallel_degree"
        if getattr(parallelism, name) > 1:
            raise ValueError(
                f"parallelism.{name} = {getattr(parallelism, name)}; want 1: there is data and "
                "tensor parallelism only"
            )
    replicate = parallelism.data_parallel_replicate_degree
    shard = parallelism.data_parallel_shard_degree
    tensor = parallelism.tensor_parallel_degree
    if min(replicate, tensor) < 1 or shard == 0 or shard < -1:
        raise ValueError(
            f"parallelism: replicate {replicate}, shard {shard}, tensor {tensor}; want degrees >= "
            "1, or data_parallel_shard_degree = -1 for all processes that are left"
        )
    fixed = replicate * tensor
    wanted = fixed * (max(world // fixed, 1) if shard == -1 else shard)
    if wanted != world:
        raise ValueError(
            f"parallelism: data_parallel_replicate_degree {replicate} x data_parallel_shard_degree "
            f"{shard} x tensor_parallel_degree {tensor} want {wanted} processes, and {world} "
            f"{'was' if world == 1 else 'were'} started. Use --nproc-per-node {wanted}, "
            "or lower the degrees"
        )


def _check_replaced(sections: Mapping[str, Mapping[str, Any]]) -> None:
    for name, ours in REPLACED.items():
        section, key = name.split(".")
        if key in sections.get(section, {}):
            raise ValueError(f"{name} is torchtitan's and has no effect here; set {ours} instead")


def _check_supported(config: Any) -> None:
    if config.parallelism.spmd_backend != "partial_dtensor":
        raise ValueError(
            f"parallelism.spmd_backend = {config.parallelism.spmd_backend!r}; want "
            "'partial_dtensor', the only one that runs on every supported torch"
        )


def _lay_over(target: Any, values: Mapping[str, Any], where: str) -> None:
    """Sets fields of a nested dataclass; ValueError for unknown keys and wrong types. Each
    __post_init__ runs again, because torchtitan validates there.
    """
    hints = typing.get_type_hints(type(target), include_extras=True)
    names = [f.name for f in dataclasses.fields(target)]
    for key, value in values.items():
        if key not in names:
            raise ValueError(
                f"unknown key {where}{key}{nearest(key, names, where)} Known there: "
                f"{', '.join(sorted(names))}"
            )
        current = getattr(target, key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(current):
            _lay_over(current, value, f"{where}{key}.")
        else:
            setattr(target, key, fit(value, hints[key], f"{where}{key}"))
    if hasattr(target, "__post_init__"):
        target.__post_init__()
