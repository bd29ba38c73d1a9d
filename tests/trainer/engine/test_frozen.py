"""Frozen models: loaded or an error, never changed, never trained."""

import json

import pytest
import torch
from engine_cases import edited, load_frozen, positions, random_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench.model_families import make_model
from reflux.trainer.engine.decoding import gathered
from reflux.trainer.engine.forward import hidden_states
from reflux.trainer.engine.head import head_weight
from reflux.trainer.engine.model_builder import build_spec


def ids_and_positions(L=16):
    return random_ids(2, L), positions(L, rows=2)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_training_another_model_through_it_leaves_it_as_it_was(host, assets, name):
    frozen, policy = load_frozen(host, assets / name), host.model_parts[0]
    before, (ids_NL, positions_NL) = frozen.weights_hash(), ids_and_positions()
    assert not frozen.model.training and not any(p.requires_grad for p in frozen.model.parameters())
    target = frozen.hidden(ids_NL, positions_NL)
    with frozen.open_head() as head_VD:
        assert (
            not target.requires_grad
            and not head_VD.requires_grad
            and len(head_VD) == frozen.vocab_size
        )
        loss = (
            hidden_states(policy, ids_NL, positions_NL) @ head_weight(policy).T
        ).mean() + target.mean()
        loss.backward()
    host.optimizers.step()
    host.optimizers.zero_grad()
    with gathered(frozen.model):
        pass
    assert frozen.weights_hash() == before and torch.equal(
        frozen.hidden(ids_NL, positions_NL), target
    )
    owned = {id(p) for p in frozen.model.parameters()}
    assert not any(id(p) in owned for part in host.model_parts for p in part.parameters())
    assert not any(
        id(p) in owned
        for o in host.optimizers.optimizers
        for g in o.param_groups
        for p in g["params"]
    )


def test_a_routing_bias_stays_in_float32_beside_weights_in_bfloat16(host, tmp_path):
    """A parameter in transformers' afmoe, which FSDP2 would round with the others."""
    make_model("afmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("expert_bias"))
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] = 1 + 0.002 * noise  # bfloat16 has steps of 0.008 there
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids_NL, positions_NL = random_ids(4, 40), positions(40, rows=4)
    want = []
    for rounds in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        bias = model.get_parameter(name)
        assert bias.dtype == torch.float32
        with torch.no_grad():
            bias.copy_(bias.bfloat16() if rounds else bias)
            want.append(model(ids_NL).logits.float())
    frozen = load_frozen(host, tmp_path, dtype="bfloat16")
    with torch.no_grad():
        got = frozen.model(ids_NL, positions=positions_NL).float()
    assert (got - want[0]).abs().max() <= 0.05 * (want[1] - want[0]).abs().max()
    assert frozen.model.state_dict()[f"hf.{name}"].dtype == torch.float32


def test_the_hash_tells_the_smallest_change_and_two_models_apart(host, assets):
    frozen, other = load_frozen(host, assets / "qwen3_tied"), load_frozen(host, assets / "qwen3")
    before = frozen.weights_hash()
    assert (
        before != other.weights_hash()
        and before == load_frozen(host, assets / "qwen3_tied").weights_hash()
    )
    with torch.no_grad():
        weight = list(frozen.model.parameters())[3].to_local().view(-1)
        weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
    assert frozen.weights_hash() != before


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_bfloat16_is_the_files_weights_rounded_and_close(host, assets, name):
    frozen = load_frozen(host, assets / name, dtype="bfloat16")
    ids_NL, positions_NL = ids_and_positions()
    reference = AutoModelForCausalLM.from_pretrained(assets / name, dtype=torch.bfloat16).eval()
    want_NLV = reference(ids_NL).logits
    hidden_NLD = frozen.hidden(ids_NL, positions_NL)
    with frozen.open_head() as head_VD:
        assert hidden_NLD.dtype == head_VD.dtype == torch.bfloat16
        embedding_VD = load_file(assets / name / "model.safetensors")["model.embed_tokens.weight"]
        if name == "qwen2":  # tied
            assert torch.equal(head_VD, embedding_VD.bfloat16())
        gap = (hidden_NLD @ head_VD.T).float() - want_NLV.float()
    assert gap.abs().mean() < 0.02 * want_NLV.float().abs().mean()


def test_a_bfloat16_file_becomes_float32_exactly(host, assets, tmp_path):
    def halve(tensors):
        tensors |= {key: value.bfloat16() for key, value in tensors.items()}

    path = edited(assets, "qwen3", tmp_path, halve)
    with load_frozen(host, path).open_head() as head_VD:
        assert torch.equal(head_VD, load_file(path / "model.safetensors")["lm_head.weight"].float())


def test_other_choices_that_cannot_work_are_errors(host, assets, tmp_path):
    with pytest.raises(ValueError, match="seq_len = 300; the model has 256 positions"):
        load_frozen(host, assets / "qwen3", seq_len=300)
    with pytest.raises(ValueError, match="want 'float32' or 'bfloat16'"):
        load_frozen(host, assets / "qwen3", dtype="float16")
    (tmp_path / "config.json").write_text((assets / "qwen3" / "config.json").read_text())
    with pytest.raises(ValueError, match="no .*safetensors"):
        load_frozen(host, tmp_path)
    quantised = json.loads((assets / "qwen3" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8"}
    }
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match="quantised"):
        build_spec(str(tmp_path))


def test_one_spec_serves_models_of_several_row_lengths(host, assets):
    """torchtitan cuts the RoPE cache inside the spec; that must not reach a longer model built from
    it later.
    """
    spec = build_spec(str(assets / "qwen3"))
    short, long = (load_frozen(host, assets / "qwen3", seq_len=n, spec=spec) for n in (16, 200))
    ids_NL, positions_NL = ids_and_positions(200)
    with torch.no_grad():
        reference = (
            AutoModelForCausalLM.from_pretrained(assets / "qwen3").model(ids_NL).last_hidden_state
        )
    assert (long.hidden(ids_NL, positions_NL) - reference).abs().max() < 1e-5
    assert short.weights_hash() == long.weights_hash()
