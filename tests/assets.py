"""Tiny random checkpoints with tokenizers, made once per test session, and a process in which
torchtitan may run.

    assets            fixture: folder with the models and text.jsonl of studies/debug_models.py
    titan_process     fixture: a world of one process; resets the globals that torchtitan changes
"""

import gc
import logging
import os
import socket
from pathlib import Path

import pytest
import torch

from reflux.trainer.studies.debug_models import (
    LARGE_VOCAB,
    MODELS,
    SPECIALS,
    save_model,
    save_tokenizer,
    sentences,
    train_tokenizer,
    write_models,
)

__all__ = ["MODELS", "SPECIALS", "save_model", "save_tokenizer", "sentences", "train_tokenizer"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("assets"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def titan_process():
    """RANK, WORLD_SIZE ... of a single process. Afterwards there is no process group, and Python's
    and torch's defaults are back.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    handlers, level = list(logging.root.handlers), logging.root.level
    os.environ.update(zip(names, ("0", "1", "0", "127.0.0.1", str(free_port()))))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.enable()  # torchtitan leaves both of these off
    torch.autograd.set_multithreading_enabled(True)
    logging.root.handlers[:], logging.root.level = handlers, level
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def make_trainer(path, dump_folder, *, backend="auto", seq_len=64, **sections):
    """torchtitan's own Trainer on one of the checkpoints, loaded, as a host for tests."""
    # first: it prepares torchtitan for this machine
    from reflux.trainer.engine.model_builder import build_spec

    from torchtitan.components.checkpoint import CheckpointManager  # isort: skip
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    from reflux.trainer.engine.torchtitan_host import NoData
    from reflux.trainer.engine.weights import load_weights

    path = str(path)
    config = dict(
        model_spec=build_spec(path, backend=backend),
        hf_assets_path=path,
        dump_folder=str(dump_folder),
        loss=CrossEntropyLoss.Config(global_vocab_size=LARGE_VOCAB),
        optimizer=default_adamw(lr=1e-2),
        dataloader=NoData.Config(),
        training=TrainingConfig(
            local_batch_size=2,
            seq_len=seq_len,
            steps=3,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=1000,
            last_save_model_only=False,
        ),
        debug=DebugConfig(seed=1, enable_structured_logging=False),
    )
    trainer = Trainer.Config(**config | sections).build()
    load_weights(trainer.model_parts[0], trainer.config.model_spec, path)
    return trainer
