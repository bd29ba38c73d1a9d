"""A few rows tell whether the forwards of a run are one function."""

import time

import pytest
import torch
from assets import save_model
from engine_cases import BACKENDS, load_frozen
from torch import nn

from reflux.trainer.engine.decoding import gathered
from reflux.trainer.engine.hf_models import HFDecoder
from reflux.trainer.engine.probe import prove_decoding, prove_forward


def load(host, tmp_path, kind, dtype="float32", **over):
    save_model(tmp_path, kind, **over)
    return load_frozen(host, tmp_path, dtype=dtype).model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, backend", BACKENDS)
def test_models_that_are_one_function_pass(host, assets, name, backend, dtype):
    model = load_frozen(host, assets / name, backend, dtype=dtype).model
    prove_forward(model, "path", packed=True, trains=True)
    with gathered(model):
        prove_decoding(model, "path")


@pytest.mark.parametrize(
    "kind", ["phi3", "cohere", "granite", "olmo2", "starcoder2", "glm4", "gpt_oss"]
)
def test_more_families_pass(host, tmp_path, kind):
    model = load(host, tmp_path, kind)
    prove_forward(model, "path", packed=True, trains=True)
    with gathered(model):
        prove_decoding(model, "path")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["xglm", "opt", "biogpt"])
def test_architectures_that_ignore_document_ends_may_not_pack(host, tmp_path, kind, dtype):
    model = load(host, tmp_path, kind, dtype)
    prove_forward(model, "path", packed=False, trains=True)
    with pytest.raises(
        ValueError, match=f"path: batch.pack = true, but .*'{kind}' lets a document"
    ):
        prove_forward(model, "path", packed=True)


def test_packed_documents_with_other_positions_are_noticed(host, tmp_path, monkeypatch):
    """Absolute positions that run on across documents: none sees another, and yet it is wrong."""
    model = load(host, tmp_path, "gpt_neox_japanese")
    forward = HFDecoder.forward

    def runs_on(self, tokens, positions=None, packed=False, **more):
        h_NLD = forward(self, tokens, positions=positions, packed=packed, **more)
        return h_NLD * (1 + torch.arange(tokens.shape[1])[:, None]) if packed else h_NLD

    monkeypatch.setattr(HFDecoder, "forward", runs_on)
    with pytest.raises(ValueError, match="computes another function of packed documents: off by"):
        prove_forward(model, "path", packed=True)


class Dropping(nn.Module):
    """A dropout whose rate is in the code."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.1, self.training)


def test_dropout_that_no_configuration_names_is_noticed(host, assets):
    model = load_frozen(host, assets / "qwen2").model
    model.decoder.layers[0].mlp.act_fn = nn.Sequential(
        model.decoder.layers[0].mlp.act_fn, Dropping()
    )
    prove_forward(model, "path", packed=True)
    with pytest.raises(
        ValueError, match="in training mode it computes another function.*drops out"
    ):
        prove_forward(model, "path", packed=False, trains=True)


def test_padding_that_reaches_the_text_is_noticed(host, assets, monkeypatch):
    model = load_frozen(host, assets / "qwen2").model
    forward = HFDecoder.forward

    def looks_ahead(self, tokens, **more):
        h_NLD = forward(self, tokens, **more)
        return h_NLD + h_NLD.mean(1, keepdim=True)

    monkeypatch.setattr(HFDecoder, "forward", looks_ahead)
    with pytest.raises(ValueError, match="hidden states of a text change with the padding"):
        prove_forward(model, "path", packed=False)


def test_hidden_states_that_are_no_numbers_are_noticed(host, assets):
    model = load_frozen(host, assets / "qwen2").model
    with torch.no_grad():
        model.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="or hold NaN: off by nan"):
        prove_forward(model, "path", packed=False)


def test_a_cache_that_is_another_function_is_noticed(host, tmp_path):
    model = load(host, tmp_path, "trocr")
    with gathered(model), pytest.raises(ValueError, match="KV cache gives other logits"):
        prove_decoding(model, "path")


def test_a_model_that_cannot_decode_is_said_so(host, assets, monkeypatch):
    model = load_frozen(host, assets / "qwen2").model
    monkeypatch.setattr("reflux.trainer.engine.decoding.DynamicCache", lambda config: "no cache")
    with gathered(model), pytest.raises(ValueError, match="cannot decode with a KV cache"):
        prove_decoding(model, "path")


def test_it_leaves_mode_and_random_numbers_as_they_were_and_takes_milliseconds(host, assets):
    model = load_frozen(host, assets / "qwen3").model
    for training in (True, False):
        model.train(training)
        before, start = torch.get_rng_state(), time.perf_counter()
        prove_forward(model, "path", packed=True, trains=True)
        took_s = time.perf_counter() - start
        assert model.training == training and torch.equal(before, torch.get_rng_state())
    assert took_s < 0.5


def test_decoding_is_proved_once(host, assets, monkeypatch):
    model = load_frozen(host, assets / "qwen3").model
    with gathered(model):
        prove_decoding(model, "path")
        monkeypatch.delattr("reflux.trainer.engine.probe.kv_decoder")
        prove_decoding(model, "path")
