"""Our configuration laid over torchtitan's: its sections keep their names, its dataclasses keep
their validation.
"""

import dataclasses
import os
import sys
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec

from reflux.trainer.adapter_folder import base_of, read_adapter
from reflux.trainer.config.origins import blamed
from reflux.trainer.config.schema import Config

from .checkpoints import Checkpointer
from .hf_models import positions_of, text_config
from .titan_sections import lay_sections
from .torchtitan_host import NoData, NoLoss, NoTokenizer, RefluxTrainer

SEQ_LEN = 2048  # torchtitan's default; a model with fewer positions has them


@dataclasses.dataclass(kw_only=True, slots=True)
class Training(TrainingConfig):
    """torchtitan's section, and what is ours of it."""

    # gradients are reduced after every micro-batch and kept as shards; False: once a step, with
    # whole gradients in between (their memory: one model in mixed_precision_reduce on every rank)
    sync_every_microbatch: bool = True


def titan_config(cfg: Config, spec: ModelSpec) -> RefluxTrainer.Config:
    """torchtitan's configuration of a run. ValueError as from `lay_sections`."""
    path = os.path.abspath(os.path.expanduser(cfg.model.path))
    initial: dict[str, Any] = {}
    # with adapters the engine itself loads what is in the folder
    if not (cfg.model.from_scratch or cfg.lora.rank or read_adapter(path)):
        initial = {"initial_load_in_hf": True, "initial_load_path": path}
    assert cfg.optim.lr is not None, "set by Config"
    positions = _positions(path)
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
        training=Training(
            disable_cuda_graphs=True,
            gc_freq=10,
            steps=max(cfg.steps, 1),
            seq_len=min(SEQ_LEN, positions),
        ),
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
    lay_sections(config, cfg)
    if config.training.seq_len > positions:
        text = (
            f"training.seq_len = {config.training.seq_len}; the model has {positions} positions "
            f"(max_position_embeddings of {cfg.model.path}); want at most these"
        )
        raise blamed(cfg, ["training.seq_len"], text)
    return config


def traces_folder(cfg: Config) -> str:
    """In the run's folder; torchtitan makes it when it starts."""
    return cfg.titan.get("comm", {}).get("save_traces_folder", CommConfig().save_traces_folder)


def _positions(path: str) -> int:
    """Of the longest row of the model; no limit where there is no model to ask."""
    if not os.path.isfile(os.path.join(base_of(path), "config.json")):
        return sys.maxsize
    return positions_of(text_config(path)) or sys.maxsize


def check_degrees(parallelism: ParallelismConfig, cfg: Config) -> None:
    """ValueError for degrees that no number of processes has, and for kinds that are not here."""
    for kind in ("context", "pipeline", "expert"):
        name = f"parallelism.{kind}_parallel_degree"
        degree = getattr(parallelism, f"{kind}_parallel_degree")
        if degree > 1:
            text = f"{name} = {degree}; want 1: there is data and tensor parallelism only"
            raise blamed(cfg, [name], text)
    shard, tensor = "data_parallel_shard_degree", "tensor_parallel_degree"
    for key in ("data_parallel_replicate_degree", shard, tensor):
        degree = getattr(parallelism, key)
        if degree < 1 and (key, degree) != (shard, -1):
            or_rest = ", or -1 for all processes that are left" if key == shard else ""
            text = f"parallelism.{key} = {degree}; want degrees >= 1{or_rest}"
            raise blamed(cfg, [f"parallelism.{key}"], text)


def check_world(parallelism: ParallelismConfig, world: int, cfg: Config) -> None:
    """`check_degrees`, and ValueError where the degrees do not make `world` processes."""
    check_degrees(parallelism, cfg)
    replicate = parallelism.data_parallel_replicate_degree
    shard = parallelism.data_parallel_shard_degree
    tensor = parallelism.tensor_parallel_degree
    fixed = replicate * tensor
    wanted = fixed * (max(world // fixed, 1) if shard == -1 else shard)
    if wanted != world:
        text = (
            f"parallelism: data_parallel_replicate_degree {replicate} x data_parallel_shard_degree "
            f"{shard} x tensor_parallel_degree {tensor} want {wanted} processes, and {world} "
            f"{'was' if world == 1 else 'were'} started. Use --nproc-per-node {wanted}, "
            "or lower the degrees"
        )
        raise blamed(cfg, ["parallelism"], text)
