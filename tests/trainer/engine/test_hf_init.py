"""Initialisation of sharded models whose own code wants plain tensors."""

import pytest
import torch
from engine_cases import positions, random_ids

from bench.model_families import make_model
from reflux.trainer.engine.frozen import _sharded
from reflux.trainer.engine.model_builder import build_spec


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "falcon_h1"])
def test_a_state_space_model_starts_from_its_own_distribution(host, tmp_path, family):
    make_model(family, tmp_path)
    spec = build_spec(str(tmp_path))
    model = _sharded(spec, host.config, host.parallel_dims, host.device, torch.float32)
    state = {n: t.full_tensor() for n, t in model.state_dict().items() if hasattr(t, "full_tensor")}
    assert all(bool(t.isfinite().all()) for t in state.values())
    name, matrix = max(
        ((n, t) for n, t in state.items() if "embed" in n), key=lambda item: item[1].numel()
    )
    assert 0.1 < float(matrix.std()) < 0.3, f"{name}: initializer_range is 0.2"
    scales = [t for n, t in state.items() if n.endswith("A_log")]
    assert scales and all(bool((t != 0).any()) for t in scales), "decay rates are not normal"
    with torch.no_grad():
        assert model(random_ids(1, 9), positions=positions(9)).isfinite().all()
