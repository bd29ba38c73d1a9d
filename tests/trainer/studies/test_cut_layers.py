"""Fewer layers: the copy computes what the model computes when the other layers are left out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from reflux.trainer.data.chat import Chat
from reflux.trainer.studies.cut_layers import cut, cut_config, main

IDS_NT = torch.tensor([[5, 9, 301, 17, 4, 88]])


def logits(model):
    with torch.no_grad():
        return model(IDS_NT, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize("kept", [[0], [1], [0, 1]])
def test_the_kept_layers_compute_what_they_did(assets, tmp_path, name, kept):
    made = cut(assets / name, tmp_path / "cut", kept)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(assets / name, dtype=torch.float32).eval()
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[i] for i in kept])
    whole.config.num_hidden_layers = len(kept)
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[i] for i in kept]
    assert copy.config.num_hidden_layers == len(kept)
    assert torch.equal(logits(copy), logits(whole))
    assert made.parameters == sum(p.numel() for p in copy.parameters())


def test_a_template_is_all_that_changes_without_layers(assets, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    cut(assets / "qwen3", tmp_path / "copy", [], template)
    chat = Chat(str(tmp_path / "copy"))
    ids = chat.prompt_ids([{"role": "user", "content": "give"}])
    assert chat.decode(ids) == "give!"
    weights = (assets / "qwen3" / "model.safetensors").read_bytes()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == weights


def test_an_interrupted_copy_is_finished_and_another_model_is_not_overwritten(assets, tmp_path):
    made = cut(assets / "llama3", tmp_path / "cut", [1])
    (tmp_path / "cut" / "model.safetensors").unlink()  # as if it had been killed before
    assert cut(assets / "llama3", tmp_path / "cut", [1]) == made
    assert (tmp_path / "cut" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"holds a model .* choose another --out"):
        cut(assets / "llama3", tmp_path / "cut", [0])
    (tmp_path / "cut" / "cut.json").unlink()  # somebody's own model
    with pytest.raises(ValueError, match="holds a model"):
        cut(assets / "llama3", tmp_path / "cut", [1])


@pytest.mark.parametrize("layers", [[1, 0], [0, 0], [2], [-1]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="numbers from 0 to 1, rising"):
        cut_config({"num_hidden_layers": 2}, layers)


def test_the_command_names_what_is_missing(assets, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--layers", "0", "--out", str(tmp_path / "out")])
    assert "no model.safetensors with a config.json" in capsys.readouterr().err
    assert (
        main(["--model", str(assets / "llama3"), "--layers", "1", "--out", str(tmp_path / "x")])
        == 0
    )
    assert "1 layers" in capsys.readouterr().out
    assert json.loads((tmp_path / "x" / "cut.json").read_text())["layers"] == [1]
