"""Adapters that do not fit, or are no plain LoRA, are errors that name the file and the layer."""

import pytest
import torch
from safetensors.torch import save_file

from reflux.trainer.adapter_folder import WEIGHTS, AdapterFolder
from reflux.trainer.engine.adapter_weights import add_adapter, check_adapter, saved_adapter

A, B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
WEIGHT = {"x.weight": torch.arange(6.0).reshape(3, 2).bfloat16()}


def folder(tmp_path, tensors, rslora=False) -> AdapterFolder:
    save_file(tensors, tmp_path / WEIGHTS)
    return AdapterFolder(str(tmp_path), "/base", 6.0, rslora)


def pair(rank=4, size=2, out=3, name="x"):
    stream = torch.Generator().manual_seed(0)
    return {
        A.format(name): torch.randn(rank, size, generator=stream),
        B.format(name): torch.randn(out, rank, generator=stream),
    }


@pytest.mark.parametrize("rslora, scale", [(False, 1.5), (True, 3.0)])
def test_the_sum_is_rounded_once(tmp_path, rslora, scale):
    tensors, weights = pair(), {k: v.clone() for k, v in WEIGHT.items()}
    with saved_adapter(folder(tmp_path, tensors, rslora)) as saved:
        add_adapter(weights, saved)
    delta = tensors[B.format("x")].double() @ tensors[A.format("x")].double()
    want = (WEIGHT["x.weight"].double() + scale * delta).float().bfloat16()
    assert torch.equal(weights["x.weight"], want)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (pair(name="y"), "an adapter of 'y', which /base does not have"),
        (pair(size=5), r"A \[4, 5\] and B \[3, 4\] of 'x' do not fit its weight \[3, 2\]"),
        ({A.format("x"): torch.ones(4, 2)}, "lacks 'base_model.model.x.lora_B.weight'"),
        (pair() | {"lm_head.weight": torch.ones(2)}, "has 'lm_head.weight'; want pairs"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        with saved_adapter(folder(tmp_path, tensors)) as saved:
            check_adapter(WEIGHT, saved)


def test_nan_and_torn_files_are_named(tmp_path):
    tensors = pair()
    tensors[A.format("x")][0, 0] = torch.nan
    with pytest.raises(ValueError, match="adapter of 'x' holds NaN"):
        with saved_adapter(folder(tmp_path, tensors)) as saved:
            add_adapter({k: v.clone() for k, v in WEIGHT.items()}, saved)
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated, or no safetensors"):
        with saved_adapter(AdapterFolder(str(tmp_path), "/base", 6.0, False)):
            pass
