"""FSDP2 groups: the head is one of its own."""

import pytest
from engine_cases import load_frozen
from torch.distributed.fsdp import FSDPModule

from reflux.trainer.engine.hf_models import HFDecoder


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "gemma3"])
def test_the_head_is_a_group_of_its_own_and_the_norm_belongs_to_the_root(host, assets, name):
    model = load_frozen(host, assets / name).model
    norm = model.decoder.norm if isinstance(model, HFDecoder) else model.norm
    assert isinstance(model, FSDPModule) and isinstance(model.lm_head, FSDPModule)
    assert not isinstance(norm, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in model.layers.values())
    state = model._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        groups = [
            [p._module_info.param_name for p in g.fsdp_params] for g in state._fsdp_param_groups
        ]
        assert groups == [["weight"]], "the root holds the final norm alone"
    assert (model.lm_head.weight is model.tok_embeddings.weight) == (name != "qwen3")
