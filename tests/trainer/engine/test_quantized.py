"""Packed weights are within the stated error of the originals, and a CPU is refused in words. The
arithmetic is bitsandbytes' own, tried on the CPU.
"""

import pytest
import torch
from lora_cases import close, start
from torch import nn

from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.engine.frozen import build_frozen, build_quantized
from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.engine.quantized import BLOCK, PackedLinear, check_quantizes

CPU = torch.device("cpu")
# half the widest gap between neighbours of the NF4 code, from -1 to -0.6962
NF4_ERROR = (1 - 0.6961928) / 2


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_near_the_original_and_the_product_is_its_own(kind, dtype):
    layer = nn.Linear(128, 96, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    packed = PackedLinear(layer, kind, CPU)
    again, weight = packed.weight_again(), layer.weight.detach()
    assert again.dtype == dtype and again.shape == weight.shape
    rounding = torch.finfo(dtype).eps * weight.abs().max()
    if kind == "int8":
        limit = weight.float().abs().amax(1, keepdim=True) / 254
    else:
        blocks = weight.float().reshape(-1, BLOCK)
        limit = (blocks.abs().amax(1, keepdim=True) * NF4_ERROR).expand_as(blocks).reshape(96, 128)
    error = (again.float() - weight.float()).abs()
    assert (error <= limit * 1.001 + rounding).all()
    assert error.max() > 0.2 * limit.max(), "hardly an error: nothing was packed"
    x = torch.randn(5, 128, dtype=dtype, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed(x), nn.functional.linear(x, again, layer.bias))
    bits = packed.packed.numel() * packed.packed.element_size() * 8 / weight.numel()
    assert bits == {"int8": 8, "nf4": 4}[kind]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_frozen_model_of_packed_weights_is_the_model_of_the_unpacked_ones(
    assets, titan_process, tmp_path, monkeypatch, name, kind
):
    engine = start(assets / name, tmp_path / "run", steps=0)
    monkeypatch.setattr("reflux.trainer.engine.frozen.check_quantizes", lambda *_: None)
    path = str(assets / name)
    role = FrozenSection(path, dtype="float32", quantization=kind)
    trainer = engine._trainer
    packed = build_quantized(build_spec(path), path, engine._config, CPU, role, 64)
    whole = build_frozen(
        build_spec(path),
        path,
        engine._config,
        trainer.parallel_dims,
        CPU,
        dtype="float32",
        seq_len=64,
    )
    ids_NL = torch.arange(3, 23).expand(2, -1)
    positions_NL = torch.arange(20).expand(2, -1)
    a, b = (m.hidden(ids_NL, positions_NL) for m in (packed, whole))
    kinds = (nn.Linear, PackedLinear)
    off = float((a - b).norm() / b.norm())
    assert 1e-3 < off < 1, off
    pairs = [[m for m in x.model.modules() if isinstance(m, kinds)] for x in (packed, whole)]
    for ours, theirs in zip(*pairs, strict=True):
        if isinstance(ours, PackedLinear):
            theirs.weight.detach().to_local().copy_(ours.weight_again())
    c = whole.hidden(ids_NL, positions_NL)
    assert float((a - c).norm() / c.norm()) < 1e-5
    assert sum(isinstance(m, PackedLinear) for m in pairs[0]) == 2 * 7
    assert packed.weights_hash() == packed.weights_hash() != whole.weights_hash()
    with engine.gathered_frozen_weights(packed) as decode, decode(2, 32) as (step, _):
        real_NL = torch.ones_like(ids_NL, dtype=torch.bool)
        logits_NV = step(ids_NL, positions_NL, real_NL, True)
    with packed.open_head() as head_VD:
        assert (logits_NV - a[:, -1] @ head_VD.T).abs().max() < 1e-4 * logits_NV.abs().max()
    close(engine)


def test_a_cpu_is_refused_in_words(assets, titan_process, tmp_path):
    with pytest.raises(ValueError, match="'nf4' needs a CUDA device; on a CPU want 'none'"):
        check_quantizes("nf4", CPU)
    engine = start(assets / "qwen3", tmp_path / "run", steps=0)
    with pytest.raises(ValueError, match="quantization = 'int8' needs a CUDA device"):
        engine.frozen(FrozenSection(str(assets / "qwen3"), quantization="int8"))
    close(engine)


def test_quantised_weights_are_not_offloaded():
    with pytest.raises(ValueError, match="offload = true with quantization = 'nf4'"):
        FrozenSection("m", offload=True, quantization="nf4")
