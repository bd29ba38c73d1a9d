"""Engines with adapters, and a few steps of theirs."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from assets import free_port
from engine_cases import likelihood_loss, samples
from runs import table
from safetensors.torch import load_file

from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Batch, pack
from reflux.trainer.engine.engine import Engine
from reflux.trainer.losses import HeadInputs, Loss

SETTINGS = {"rank": 4, "alpha": 12.0}
ROUTING = ("mlp.gate.weight", "e_score_correction_bias")  # of deepseek_v3, float32 in any dtype
SMALL = 300  # ids below it are in every vocabulary of assets.MODELS


def lora_config(path: Path, folder: Path, **over) -> Config:
    """A distillation of the model in `path`; `over` holds more tables."""
    over = {"lora": SETTINGS, "steps": 3, "optim": {"lr": 0.01}} | over
    over["model"] = {"path": str(path)} | over.get("model", {})
    over["teacher"] = {"path": str(path)}
    return fill(Config, table(path.parent, folder, "distill", **over), "test")


def start(path: Path, folder: Path, **over) -> Engine:
    """The engine of such a run, in this process; `close` ends it."""
    os.environ["MASTER_PORT"] = str(free_port())
    return Engine(lora_config(path, folder, **over))


def save_family(family: str, folder: Path, assets: Path) -> Path:
    """A random model of the family (bench/model_families.py), with a tokenizer of `assets`."""
    # here: scripts that torchrun starts import this file and have no folder of the project
    from bench.model_families import make_model

    make_model(family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets / "qwen3" / name, folder / name)
    return folder


def check_float32(base: Path, made: Mapping[str, torch.Tensor], ends: tuple[str, ...]) -> None:
    """What the model keeps in float32 is the base's to the last digit; all else is in bf16."""
    stored = load_file(base / "model.safetensors")
    kept = {name for name in stored if name.endswith(ends)}
    assert kept and made.keys() >= kept
    assert all(torch.equal(made[name], stored[name]) for name in kept)
    assert any(not torch.equal(stored[n], stored[n].bfloat16().float()) for n in kept)
    assert {w.dtype for name, w in made.items() if name not in kept} == {torch.bfloat16}


def close(engine: Engine) -> None:
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def batches() -> list[Batch]:
    found = pack(samples(), tokens=99, seq_len=64)
    for batch in found:
        batch.input_NL.remainder_(SMALL)
        batch.target_T.remainder_(SMALL)
    return found


def train(engine: Engine) -> list[dict[str, float]]:
    """All steps of the run on one batch of the first data rank."""
    mine = batches() if engine.rank == 0 else []
    return [engine.step([[mine]], likelihood_loss) for _ in engine.steps()]


def logits(engine: Engine, ids_NL: torch.Tensor) -> torch.Tensor:
    """[N, L, V] of the trained model, its adapters on."""
    positions_NL = torch.arange(ids_NL.shape[1]).expand_as(ids_NL)
    with engine.open_head() as head_VD:
        return engine.hidden(ids_NL, positions_NL) @ head_VD.T


def constant_loss(out: HeadInputs, batch: Batch) -> Loss:
    return out.hidden_TD.float().sum() * 0, {}
