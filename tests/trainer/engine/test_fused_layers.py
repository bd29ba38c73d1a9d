"""liger-kernel's layers: refused in words where they cannot be; on a GPU, the same function."""

import importlib.util

import pytest
import torch
from assets import save_model
from engine_cases import positions, random_ids

from reflux.trainer.engine.hf_models import HFDecoder
from reflux.trainer.engine.model_builder import build_spec

ON_GPU = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")
def test_a_cpu_refuses_them_if_asked_for_and_auto_changes_nothing(assets):
    path = str(assets / "qwen2")
    with pytest.raises(ValueError, match="liger = 'on' needs a CUDA device; want 'off' or 'auto'"):
        build_spec(path, liger="on")
    ids_NL, positions_NL = random_ids(1, 9), positions(9)
    hidden = []
    for liger in ("off", "auto"):
        torch.manual_seed(0)
        model = HFDecoder(HFDecoder.Config(path=path, liger=liger))
        with torch.no_grad():
            hidden.append(model(ids_NL, positions=positions_NL))
    assert torch.equal(*hidden)


def test_another_word_is_an_error(assets):
    with pytest.raises(ValueError, match="liger = 'yes'; want 'off', 'auto' or 'on'"):
        build_spec(str(assets / "qwen2"), liger="yes")


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA and liger-kernel")
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma2", "qwen3_moe"])
def test_on_a_gpu_they_compute_what_transformers_layers_compute(tmp_path, kind):
    save_model(tmp_path, kind)
    ids_NL, positions_NL = random_ids(2, 40).cuda(), positions(40, rows=2).cuda()
    models = []
    for liger in ("off", "on"):  # in this order: liger patches modules by name
        torch.manual_seed(0)
        models.append(HFDecoder(HFDecoder.Config(path=str(tmp_path), liger=liger)).cuda())
        models[-1].load_state_dict(models[0].state_dict())
        logits_NLV = models[-1](ids_NL, positions=positions_NL)
        logits_NLV.square().mean().backward()
        if liger == "off":
            want_NLV = logits_NLV.detach()
    assert (logits_NLV - want_NLV).abs().max() <= 1e-4 * want_NLV.abs().max()
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models)):
        assert (a.grad - b.grad).norm() <= 1e-3 * a.grad.norm(), name
