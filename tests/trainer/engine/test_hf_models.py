"""transformers' models under torchtitan's names: weights there and back, and what cannot work."""

from types import SimpleNamespace

import pytest
import torch
from assets import save_model

from bench.model_families import make_model
from reflux.trainer.engine.hf_adapter import HFAdapter
from reflux.trainer.engine.hf_models import HFDecoder
from reflux.trainer.engine.model_builder import build_spec


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied"])
def test_names_are_hugging_faces_there_and_back(assets, name):
    config = HFDecoder.Config(path=str(assets / name))
    state = HFDecoder(config).state_dict()
    adapter = HFAdapter(config, None)
    weights = adapter.to_hf(state)
    assert "model.embed_tokens.weight" in weights
    assert ("lm_head.weight" in weights) == (name == "qwen3"), "a tied head is stored once"
    back = adapter.from_hf(weights)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)


def test_rows_longer_than_the_models_positions_are_an_error(assets):
    config = HFDecoder.Config(path=str(assets / "qwen2"))
    for seq_len in (256, 257):
        run = SimpleNamespace(training=SimpleNamespace(seq_len=seq_len))
        if seq_len == 256:
            config.update_from_config(config=run)
            continue
        with pytest.raises(ValueError, match="seq_len = 257; the model has 256 positions"):
            config.update_from_config(config=run)


def test_weights_shared_between_blocks_are_an_error(tmp_path):
    make_model("zamba2", tmp_path)
    with pytest.raises(ValueError, match="its blocks share weights"), torch.device("meta"):
        build_spec(str(tmp_path)).model.build()


def test_what_is_neither_decoder_nor_head_is_dropped(tmp_path):
    make_model("gemma3", tmp_path)
    model = HFDecoder(HFDecoder.Config(path=str(tmp_path)))
    names = {name for name, _ in model.named_parameters()}
    assert names and all(".language_model." in name for name in names), "the head is tied"


def test_routing_biases_are_buffers_and_lie_where_the_forward_runs(tmp_path):
    """Off-loaded shards are brought there by FSDP2, buffers are not."""
    make_model("afmoe", tmp_path)
    model = HFDecoder(HFDecoder.Config(path=str(tmp_path)))
    names = {name for name, _ in model.named_buffers() if name in model.state_dict()}
    assert {name.rpartition(".")[2] for name in names} == {"expert_bias"}
    assert not any(name.endswith("expert_bias") for name, _ in model.named_parameters())
    model.init_weights(buffer_device=torch.device("meta"))
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_head_with_a_bias_is_an_error(tmp_path):
    save_model(tmp_path, "phi")
    with pytest.raises(ValueError, match="without bias"), torch.device("meta"):
        build_spec(str(tmp_path)).model.build()
