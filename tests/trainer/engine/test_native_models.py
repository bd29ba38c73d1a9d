"""Attention that decodes: grouped heads are repeated heads, the cache forgets nothing; and which
models torchtitan's own modules compute exactly.
"""

import pytest
import torch
from assets import save_model
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.engine.model_builder import build_spec
from reflux.trainer.engine.native_models import KVCache, grouped_sdpa


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("L", [1, 7])
def test_grouped_attention_is_attention_with_repeated_heads(group, masked, L):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, L, 8, generator=g) for n in (4, 4 // group, 4 // group))
    mask = None
    seen = torch.ones(L, L, dtype=torch.bool).tril()
    if masked:
        random = torch.rand(2, 1, L, L, generator=g) > 0.5
        mask = seen = random | torch.eye(L, dtype=torch.bool)
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * 0.3
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
    assert torch.allclose(grouped_sdpa(q, k, v, mask, 0.3), want, atol=1e-6)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 9))
def test_the_cache_returns_everything_ever_stored(lengths, capacity):
    cache, keys = KVCache(capacity), torch.randn(2, 3, sum(lengths), 4)
    values, end = keys.neg(), 0
    for n in lengths:
        got_k, got_v = cache.append(keys[:, :, end : end + n], values[:, :, end : end + n])
        end += n
        assert torch.equal(got_k, keys[:, :, :end]) and torch.equal(got_v, values[:, :, :end])


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope type 'yarn'",
        ),
        (dict(attention_bias=True), "biases"),
        (dict(hidden_act="gelu"), "activation"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding-window"),
    ],
)
def test_what_torchtitan_would_compute_differently_goes_to_transformers(tmp_path, config, reason):
    save_model(tmp_path, "qwen3", head_dim=32, **config)
    assert build_spec(str(tmp_path)).name == "hf"
    with pytest.raises(ValueError, match=reason):
        build_spec(str(tmp_path), backend="native")
