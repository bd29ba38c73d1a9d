"""Decoding with a cache is the full forward, and leaves the sharding as it was."""

import gc
from dataclasses import replace

import pytest
import torch
from assets import make_trainer
from engine_cases import BACKENDS, load_frozen, positions, random_ids, reference_logits
from torch.distributed.tensor import DTensor

from reflux.trainer.engine.decoding import gathered, kv_decoder
from reflux.trainer.engine.native_models import MaskedSDPA
from reflux.trainer.engine.sharding import fsdp_units


@pytest.mark.parametrize("name, backend", BACKENDS)
@pytest.mark.parametrize("room", [0, 64])
def test_decoding_with_a_cache_is_the_full_forward(host, assets, name, backend, room):
    model, ids_NL = load_frozen(host, assets / name, backend).model, random_ids(2, 30)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False  # row 0 is padded on the left
    positions_NL = (real.long().cumsum(1) - 1).clamp(min=0)
    with gathered(model), kv_decoder(model, max_length=room) as step:
        logits = [step(ids_NL[:, :12], positions_NL, real, True)]
        for t in range(12, 30):
            positions_NL = positions_NL[:, -1:] + 1
            real = torch.cat([real, real.new_ones(2, 1)], 1)
            logits.append(step(ids_NL[:, t : t + 1], positions_NL, real, False))
    got = torch.stack(logits, 1)
    for row, padding in ((0, 5), (1, 0)):
        want = reference_logits(assets / name, ids_NL[row : row + 1, padding:])[0, 11 - padding :]
        assert (got[row] - want).abs().max() <= 3e-6 * want.abs().max()
    assert not any(module.cache for module in model.modules() if isinstance(module, MaskedSDPA))


@pytest.mark.parametrize("name, backend", BACKENDS)
@pytest.mark.parametrize("room", [0, 64])
def test_rows_go_on_twice_in_another_order_or_not_at_all(host, assets, name, backend, room):
    """Row n of a call goes on with rows_N[n] of the call before it."""
    model, ids_NL = load_frozen(host, assets / name, backend).model, random_ids(5, 30)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False
    positions_NL = (real.long().cumsum(1) - 1).clamp(min=0)
    origin = torch.tensor([0, 1])
    rows_of_call = {12: [1, 0, 1, 1, 0], 15: [4, 2, 0], 20: [2]}
    own = torch.arange(2)  # which row of random ids each text reads behind its prompt
    with gathered(model), kv_decoder(model, max_length=room) as step:
        step(ids_NL[:2, :12], positions_NL, real, True)
        fed = [ids_NL[i, 5 * (i == 0) : 12].tolist() for i in range(2)]
        for t in range(12, 30):
            rows = torch.tensor(rows_of_call[t]) if t in rows_of_call else None
            if rows is not None:
                origin, real, positions_NL = origin[rows], real[rows], positions_NL[rows]
                own = torch.arange(5) if t == 12 else own[rows]
                fed = [list(fed[i]) for i in rows.tolist()]
            positions_NL = positions_NL[:, -1:] + 1
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
            new = ids_NL[own, t : t + 1]
            fed = [x + y for x, y in zip(fed, new.tolist())]
            logits = step(new, positions_NL, real, False, rows)
            if t in (12, 19, 29):
                for text, got in zip(fed, logits):
                    want = reference_logits(assets / name, torch.tensor([text]))[0, -1]
                    assert (got - want).abs().max() <= 3e-6 * want.abs().max()


@pytest.mark.parametrize("policy", ["default", "always", "never"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "gemma3"])
def test_decoding_leaves_every_group_resharding_as_before(assets, host, tmp_path, name, policy):
    parallelism = replace(host.config.parallelism, fsdp_reshard_after_forward=policy)
    trainer = make_trainer(assets / name, tmp_path, parallelism=parallelism)
    model, ids_NL = trainer.model_parts[0], random_ids(1, 8)

    def sharded_after_a_forward():
        # with grad: under no_grad the root's post-forward differs
        model(ids_NL, positions=positions(8)).sum()
        return [
            isinstance(weight, DTensor)
            for unit in fsdp_units(model)
            for weight in unit.parameters(recurse=False)
        ]

    before = sharded_after_a_forward()
    with gathered(model, policy):
        assert not any(isinstance(weight, DTensor) for weight in model.parameters())
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert sharded_after_a_forward() == before
    trainer.close()


def living_tensors() -> int:
    """Of this process, those in reference cycles too."""
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_a_cache_is_gone_with_its_block_where_the_collector_is_off(host, assets, name, backend):
    """torchtitan switches it off between its own collections."""
    model, ids_NL = load_frozen(host, assets / name, backend).model, random_ids(2, 12)
    real, positions_NL = torch.ones(2, 12, dtype=torch.bool), torch.arange(12).expand(2, 12)

    longer = torch.ones(2, 13, dtype=torch.bool)

    def decode_a_block():
        with gathered(model), kv_decoder(model, max_length=16) as step:
            step(ids_NL, positions_NL, real, True)
            step(ids_NL[:, :1], positions_NL[:, -1:] + 1, longer, False)

    decode_a_block()
    gc.collect()
    gc.disable()
    try:
        before = living_tensors()
        for _ in range(3):
            decode_a_block()
        after = living_tensors()
    finally:
        gc.enable()
    assert after == before


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_the_head_reads_a_contiguous_tensor(host, assets, name, backend):
    """Behind 256 prompts it was a slice: torch copied the head for every row, 15 GB in bfloat16."""
    model, ids_NL = load_frozen(host, assets / name, backend).model, random_ids(3, 12)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous())
    )
    with gathered(model), kv_decoder(model) as step:
        step(ids_NL, torch.arange(12).expand(3, 12), torch.ones(3, 12, dtype=torch.bool), True)
    hook.remove()
    assert seen and all(seen)
