"""The one check of every model that is loaded, trained or frozen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from assets import save_model
from engine_cases import edit_config, edited, load_frozen, positions, random_ids, reference_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reflux.trainer.engine import weights as weights_module
from reflux.trainer.engine.hf_adapter import HFAdapter
from reflux.trainer.engine.hf_models import HFDecoder
from reflux.trainer.engine.weights import check_finite

UP = "model.layers.1.mlp.up_proj.weight"


def layers(path, count: int) -> None:
    kinds = json.loads((path / "config.json").read_text()).get("layer_types")
    one = {"layer_types": [kinds[0]] * count} if kinds else {}
    edit_config(path, num_hidden_layers=count, **one)


def nan(tensors) -> None:
    tensors[UP][3, 5] = torch.nan


def infinite(tensors) -> None:
    tensors["model.norm.weight"][0] = -torch.inf


WRONG_TENSORS = [
    (lambda t: t.pop(UP), f"no tensor '{UP}'"),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(32)}),
        r"model.safetensors: tensor 'model.norm.weight' is \(32,\).*wants \(64,\)",
    ),
    (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}),
        "model.safetensors: 1 tensors that the model does not have",
    ),
    (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"tensor '{UP}' is F8_E4M3; want"),
    (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"tensor '{UP}' is I8; want float32"),
    (nan, f"model.safetensors: tensor '{UP}' holds NaN or inf"),
    (infinite, "tensor 'model.norm.weight' holds NaN or inf"),
]


@pytest.mark.parametrize("name", ["qwen3", "mistral", "llama3"])
@pytest.mark.parametrize("edit, message", WRONG_TENSORS)
def test_weights_that_do_not_fit_are_errors_that_name_file_and_tensor(
    host, assets, tmp_path, name, edit, message
):
    path = edited(assets, name, tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load_frozen(host, path)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize(
    "count, message", [(1, "model-?.*tensors that the model"), (3, "no tensor 'model.layers.2")]
)
def test_a_config_with_another_number_of_layers_is_an_error(
    host, assets, tmp_path, name, count, message
):
    path = edited(assets, name, tmp_path, lambda t: None)
    layers(path, count)
    with pytest.raises(ValueError, match=f"{message}.*describes {count} layers, the file holds 2"):
        load_frozen(host, path)


def test_a_tied_head_stored_twice_is_accepted(host, assets, tmp_path):
    def twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    path = edited(assets, "qwen3_tied", tmp_path, twice)
    want = load_frozen(host, assets / "qwen3_tied").weights_hash()
    assert load_frozen(host, path).weights_hash() == want


def other_head(tensors) -> None:
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1e-3
    tensors["lm_head.weight"] = head


@pytest.mark.parametrize(
    "name, backend", [("qwen3_tied", "auto"), ("qwen3_tied", "hf"), ("gemma3", "auto")]
)
def test_a_tied_head_that_differs_in_one_number_is_refused_and_untied_is_used(
    host, assets, tmp_path, name, backend
):
    path = edited(assets, name, tmp_path, other_head)
    with pytest.raises(
        ValueError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"
    ):
        load_frozen(host, path, backend)
    edit_config(path, tie_word_embeddings=False)
    with load_frozen(host, path, backend).open_head() as head_VD:
        assert torch.equal(head_VD, load_file(path / "model.safetensors")["lm_head.weight"])


def test_transformers_computes_with_the_head_of_the_file(assets, tmp_path):
    """Why a head that differs is refused: config.json says one model, transformers another."""
    path = edited(assets, "qwen3_tied", tmp_path, other_head)
    head_VD = AutoModelForCausalLM.from_pretrained(path).lm_head.weight
    assert torch.equal(head_VD, load_file(path / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    "kind, tied", [("opt", True), ("xglm", True), ("biogpt", True), ("opt", False)]
)
def test_tied_names_of_other_families_are_transformers_own(host, tmp_path, kind, tied):
    save_model(tmp_path, kind, tie_word_embeddings=tied)
    model, ids_NL = load_frozen(host, tmp_path).model, random_ids(1, 9)
    with torch.no_grad():
        got_NLV = model(ids_NL, positions=positions(9))
    assert (got_NLV - reference_logits(tmp_path, ids_NL)).abs().max() < 1e-5


def test_buffers_of_old_exports_are_ignored_and_matrices_of_their_name_are_not(
    host, assets, tmp_path
):
    def buffer(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    want = load_frozen(host, assets / "qwen3").weights_hash()
    path = edited(assets, "qwen3", tmp_path, buffer)
    assert load_frozen(host, path).weights_hash() == want

    def matrix(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16, 16)

    shutil.rmtree(path)
    with pytest.raises(ValueError, match="1 tensors that the model does not have"):
        load_frozen(host, edited(assets, "qwen3", tmp_path, matrix))


def test_a_load_that_did_nothing_is_noticed(host, assets, monkeypatch):
    monkeypatch.setattr(weights_module.dcp, "load", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="were not loaded"):
        load_frozen(host, assets / "qwen3")


def split(source: Path, out: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(out, max_shard_size="100kB")
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_shards_load_by_the_index_and_no_other_file_does(host, assets, tmp_path, name):
    parts = split(assets / name, tmp_path / "parts")
    zeros = {
        n: torch.zeros_like(t) for n, t in load_file(assets / name / "model.safetensors").items()
    }
    save_file(zeros, parts / "consolidated.safetensors")
    want = load_frozen(host, assets / name).weights_hash()
    assert load_frozen(host, parts).weights_hash() == want


def test_numbers_of_files_are_those_of_the_index(assets, tmp_path):
    parts = split(assets / "qwen2", tmp_path / "parts")
    adapter = HFAdapter(HFDecoder.Config(path=str(parts)), str(parts))
    numbers = adapter.fqn_to_index_mapping
    assert set(numbers.values()) == set(range(1, len(list(parts.glob("*.safetensors"))) + 1))
    single = HFAdapter(HFDecoder.Config(path=str(assets / "qwen2")), str(assets / "qwen2"))
    assert single.fqn_to_index_mapping is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_kind_of_number_that_is_none_is_found(dtype, value):
    weights = {name: torch.randn(7, 9).to(dtype) for name in "abc"} | {"ids": torch.ones(3).long()}
    check_finite(weights | {"empty": torch.zeros(0, 4)}, {})
    for at in (0, 31, 62):
        weights["b"] = torch.randn(7, 9).to(dtype)
        weights["b"].view(-1)[at] = value
        with pytest.raises(ValueError, match="^some/file: tensor 'b' holds NaN or inf. Take"):
            check_finite(weights, {"b": "some/file"})


def test_dropout_of_config_json_is_off(assets, tmp_path):
    path = edited(assets, "qwen2", tmp_path, lambda t: None)
    edit_config(path, attention_dropout=0.3)
    model = HFDecoder(HFDecoder.Config(path=str(path))).train()
    ids_NL, positions_NL = random_ids(2, 9), positions(9, rows=2)
    with torch.no_grad():
        hidden = [model(ids_NL, positions=positions_NL) for _ in range(2)]
    assert torch.equal(*hidden)
