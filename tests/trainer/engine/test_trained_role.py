"""The trained role meets the checks of a frozen one, before anything runs."""

import os

import pytest
import torch
import torch.distributed as dist
from assets import free_port, save_model, save_tokenizer, sentences, train_tokenizer
from engine_cases import edit_config, edited
from runs import config
from safetensors.torch import save_file

from reflux.trainer.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("titan_process")
UP = "model.layers.1.mlp.up_proj.weight"


def start(talkers, tmp_path, path, **over) -> None:
    """Builds the engine of a distillation of this student, and closes it."""
    os.environ["MASTER_PORT"] = str(free_port())
    try:
        cfg = config(talkers, tmp_path / "run", "distill", model={"path": str(path)}, **over)
        Engine(cfg).close()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def set_nan(tensors) -> None:
    tensors[UP][3, 5] = torch.nan


def set_other_head(tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(UP), f"no tensor '{UP}'"),
        (
            lambda t: t.update({UP: torch.ones(3)}),
            rf"'{UP}' is \(3,\); the model of its config.json",
        ),
        (
            lambda t: t.update({"x.3.weight": torch.ones(8)}),
            "safetensors: 1 tensors that the model",
        ),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"'{UP}' is F8_E4M3; want"),
        (set_nan, f"model.safetensors: tensor '{UP}' holds NaN"),
        (set_other_head, "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
    ],
)
def test_weights_that_do_not_fit_are_errors(talkers, assets, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        start(talkers, tmp_path, edited(assets, "qwen3_tied", tmp_path, edit))


def test_layers_of_the_file_are_not_dropped(talkers, assets, tmp_path):
    path = edited(assets, "qwen3", tmp_path, lambda t: None)
    edit_config(path, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(
        ValueError, match="model.safetensors: .*describes 1 layers, the file holds 2"
    ):
        start(talkers, tmp_path, path)


def test_a_file_beside_the_weights_is_not_read(talkers, assets, tmp_path):
    path = edited(assets, "qwen3", tmp_path, lambda t: None)
    save_file({UP: torch.full((96, 64), torch.nan)}, path / "consolidated.safetensors")
    start(talkers, tmp_path, path)


def test_packing_is_refused_for_an_architecture_that_ignores_document_ends(talkers, tmp_path):
    save_model(tmp_path / "xglm", "xglm")
    save_tokenizer(train_tokenizer(sentences(300), 512), tmp_path / "xglm")
    start(talkers, tmp_path, tmp_path / "xglm")
    with pytest.raises(ValueError, match="batch.pack = true, but the architecture 'xglm' lets a"):
        start(talkers, tmp_path, tmp_path / "xglm", batch={"pack": True})
