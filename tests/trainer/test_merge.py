"""python -m reflux.trainer.merge: base plus adapter as a model folder."""

import pytest
import torch
from lora_cases import ROUTING, check_float32, save_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reflux.trainer.merge import main


def test_the_merged_folder_computes_what_peft_does(assets, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(assets / "qwen2", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged"
    assert main([str(tmp_path / "adapter"), str(out), "--dtype", "float32"]) == 0
    ids_NL = torch.arange(3, 23)[None]
    whole = AutoModelForCausalLM.from_pretrained(assets / "qwen2", dtype=torch.float32)
    with torch.no_grad():
        before_NLV = whole(ids_NL).logits
        want_NLV = PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()(ids_NL).logits
        got_NLV = AutoModelForCausalLM.from_pretrained(out)(ids_NL).logits
    assert (got_NLV - want_NLV).abs().max() < 2e-5 * want_NLV.abs().max()
    assert (before_NLV - want_NLV).abs().max() > 0.01
    name = "tokenizer.json"
    assert (out / name).read_bytes() == (assets / "qwen2" / name).read_bytes()
    for arguments, message in (
        ([str(tmp_path / "adapter"), str(out)], "merged exists"),
        ([str(assets / "qwen2"), str(tmp_path / "x")], "no adapter_config.json there"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_what_the_model_keeps_in_float32_is_not_rounded(assets, tmp_path):
    folder = save_family("deepseek_v3", tmp_path / "deepseek_v3", assets)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(r=2, target_modules=["o_proj"])
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    check_float32(folder, load_file(tmp_path / "merged" / "model.safetensors"), ROUTING)
