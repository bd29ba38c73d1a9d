"""The forward without the head: transformers' logits, packed documents separate, padding without
effect.
"""

import pytest
import torch
from engine_cases import (
    BACKENDS,
    head_product,
    load_frozen,
    positions,
    random_ids,
    reference_logits,
)
from hypothesis import given
from hypothesis import strategies as st

from bench.model_families import make_model
from reflux.trainer.engine.forward import document_mask, hidden_states
from reflux.trainer.engine.head import head_logits
from reflux.trainer.engine.hf_models import HFDecoder


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_logits_are_transformers_own(host, assets, name, backend):
    model = load_frozen(host, assets / name, backend).model
    assert isinstance(model, HFDecoder) == (backend == "hf")
    ids_NL, positions_NL = random_ids(2, 40), positions(40, rows=2)
    want_NLV = reference_logits(assets / name, ids_NL)
    with torch.no_grad():
        hidden_NLD = hidden_states(model, ids_NL, positions_NL)
        got_NLV = head_logits(model, hidden_NLD)
        # llama3: complex RoPE in pairs, another rounding
        assert (got_NLV - want_NLV).abs().max() <= (2e-5 if name == "llama3" else 0.0)
        assert (head_product(model, hidden_NLD) - want_NLV).abs().max() <= 2e-5
        assert torch.equal(model(ids_NL, positions=positions_NL), got_NLV)


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(host, assets, name, backend):
    frozen, lengths = load_frozen(host, assets / name, backend), (15, 1, 11, 13)
    ids_NL, positions_NL = random_ids(2, 40), positions(*lengths, rows=2)
    separate = [
        frozen.hidden(ids, positions(n, rows=2))
        for n, ids in zip(lengths, ids_NL.split(lengths, 1))
    ]
    packed = frozen.hidden(ids_NL, positions_NL, packed=True)
    scale = packed.abs().max()
    assert (packed - torch.cat(separate, 1)).abs().max() <= 2e-6 * scale
    one_document = frozen.hidden(ids_NL, positions(40, rows=2))
    assert (one_document - packed).abs().max() > 0.1 * scale, "the test is blind"
    if backend == "hf":  # the way flash attention takes packed rows: one long row
        frozen.model.flattens_packed_rows = True
        flat = frozen.hidden(ids_NL, positions_NL, packed=True)
        assert (flat - packed).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("family", ["gpt_oss", "afmoe", "qwen2_vl", "mixtral"])
def test_packed_documents_of_experts_do_not_see_each_other(host, tmp_path, family):
    make_model(family, tmp_path)
    frozen, lengths = load_frozen(host, tmp_path), (15, 1, 11, 13)
    ids_NL = random_ids(2, 40)
    separate = [
        frozen.hidden(ids, positions(n, rows=2))
        for n, ids in zip(lengths, ids_NL.split(lengths, 1))
    ]
    packed = frozen.hidden(ids_NL, positions(*lengths, rows=2), packed=True)
    assert (packed - torch.cat(separate, 1)).abs().max() <= 1e-5 * packed.abs().max()


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_padding_on_either_side_changes_no_real_token(host, assets, name):
    frozen, ids_NL = load_frozen(host, assets / name), random_ids(1, 12)
    want = frozen.hidden(ids_NL, positions(12))
    for left, right in ((5, 0), (0, 5), (3, 2)):
        padded = torch.cat([random_ids(1, left, seed=1), ids_NL, random_ids(1, right, seed=2)], 1)
        real = torch.zeros(1, 17, dtype=torch.bool)
        real[:, left : left + 12] = True
        positions_NL = (real.long().cumsum(1) - 1).clamp(min=0)
        got = frozen.hidden(padded, positions_NL, mask_NL=real)
        assert (got[:, left : left + 12] - want).abs().max() <= 1e-6 * want.abs().max()
        assert got.isfinite().all()


@given(rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_mask_is_causal_within_documents_and_never_empty(rows):
    L = max(map(sum, rows))
    padding = [torch.zeros(L - sum(row), dtype=torch.long) for row in rows]
    positions_NL = torch.stack(
        [torch.cat([positions(*row)[0], pad]) for row, pad in zip(rows, padding)]
    )
    mask = document_mask(positions_NL, packed=True)
    assert mask.shape == (len(rows), 1, L, L) and mask.diagonal(dim1=-2, dim2=-1).all()
    assert not mask.triu(1).any()
    # a token sees its document's past: as many as its position says
    assert torch.equal(mask[:, 0].sum(-1), positions_NL + 1)
    assert document_mask(positions_NL, packed=False) is None
