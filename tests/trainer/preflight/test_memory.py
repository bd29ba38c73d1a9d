"""The memory of a rank: bytes by hand, and activations against autograd."""

from types import SimpleNamespace

import pytest
import torch

from reflux.trainer.config.loader import fill
from reflux.trainer.config.phases import roles
from reflux.trainer.config.schema import Config
from reflux.trainer.engine.forward import hidden_states
from reflux.trainer.preflight.memory import (
    RankPlan,
    activation_bytes,
    memory_parts,
    plan_ranks,
    shard_numel,
    totals,
)
from reflux.trainer.preflight.shapes import build_shape, planned_shapes


def test_memory_of_a_rank_by_hand(calibrate):
    cfg = calibrate(parallelism={"data_parallel_shard_degree": 4}, rollout={"prompts": 4})
    shapes, findings = planned_shapes(cfg)
    ranks = plan_ranks(
        SimpleNamespace(
            data_parallel_replicate_degree=1, data_parallel_shard_degree=4, tensor_parallel_degree=1
        ),
        1,
    )
    training = SimpleNamespace(
        dtype="float32",
        mixed_precision_param="float32",
        enable_cpu_offload=False,
        seq_len=96,
        sync_every_microbatch=True,
    )
    parts = {(p.role, p.what): p.bytes for p in memory_parts(cfg, training, ranks, shapes)}
    D, V, F, q, kv, c = 64, 512, 96, 128, 64, 32  # of tests/assets.py: qwen3_tied
    block = 2 * D + 2 * c + D * q + 2 * D * kv + q * D + 3 * D * F
    policy = V * D + 2 * block + D
    assert (policy, shapes[0].block, shapes[0].ends, findings) == (119232, block, V * D, [])
    assert parts["policy", "master weights, float32"] == policy  # 4 bytes, 4 ranks
    assert parts["policy", "AdamW moments"] == 2 * policy
    assert parts["policy", "gradients"] == policy
    training.sync_every_microbatch, training.mixed_precision_reduce = False, "float32"
    whole = {(p.role, p.what): p.bytes for p in memory_parts(cfg, training, ranks, shapes)}
    assert whole["policy", "gradients, whole between micro-batches"] == 4 * policy
    assert parts["reference", "weights, float32"] == policy
    assert parts["policy", "gathered copy"] == 4 * policy
    assert parts["policy", "KV cache, 4 rows"] == 4 * 96 * (2 * 2 * kv) * 4
    assert parts["policy", "head gradient of the fused loss, fp32"] == 4 * V * D
    sums = totals(memory_parts(cfg, training, ranks, shapes))
    always = sum(parts[k] for k in parts if "weights" in k[1] or "moments" in k[1])
    assert sums["always"] == always and sums["host"] == 0
    assert sums["while sampling"] == always + sum(
        parts[k] for k in parts if k[1].startswith(("gathered", "KV", "sampler"))
    )


def test_an_engine_of_its_own_is_planned_for_and_one_on_other_machines_costs_nothing(calibrate):
    ranks, training = (
        RankPlan(1, 1, 1, 1),
        SimpleNamespace(
            dtype="float32",
            mixed_precision_param="float32",
            enable_cpu_offload=False,
            seq_len=96,
            sync_every_microbatch=True,
        ),
    )

    def sampling(**rollout):
        cfg = calibrate(rollout=rollout)
        parts = memory_parts(cfg, training, ranks, planned_shapes(cfg)[0])
        return {p.what: p.bytes for p in parts if p.when == "sample"}

    assert sampling(engine="server", servers=["http://h:1"]) == {}
    assert sampling(engine="vllm", max_running=8, tensor_parallel=2) == {
        "vLLM's weights": 119232 * 4 // 2,
        "its cache, 8 rows": 8 * 96 * (2 * 2 * 64) * 4 // 2,
    }


def test_memory_of_a_rank_with_adapters_by_hand(calibrate):
    """Rank 3 on q and v: gradients and moments are the adapters', the reference costs nothing, the
    frozen weights are bf16.
    """
    lora = {"rank": 3, "targets": ["q_proj", "v_proj"]}
    shapes, findings = planned_shapes(calibrate(lora=lora))
    training = SimpleNamespace(
        dtype="float32",
        mixed_precision_param="bfloat16",
        enable_cpu_offload=False,
        seq_len=96,
        sync_every_microbatch=True,
    )
    ranks = RankPlan(2, 1, 1, 2)
    parts = {
        (p.role, p.what): p.bytes
        for p in memory_parts(calibrate(lora=lora), training, ranks, shapes)
    }
    assert parts["policy", "frozen weights, bfloat16"] == 119232 * 2 // 2 and not findings
    # values of the fullest rank: A's 3 rows are cut into 2 and 1; two layers
    own = 2 * (2 * 2 * 64 + 128 * 3 // 2 + 64 * 3 // 2)
    assert parts["policy", "adapters, float32"] == 4 * own
    assert parts["policy", "AdamW moments"] == 8 * own
    assert parts["policy", "gradients"] == 4 * own
    assert parts["reference", "the policy's weights, adapters off"] == 0
    assert parts["policy", "head gradient of the fused loss, fp32"] == 0


def test_a_quantised_proxy_is_planned_by_its_packed_weights(calibrate):
    cfg = calibrate(proxy={"quantization": "nf4"})
    shapes, _ = planned_shapes(cfg)
    training = SimpleNamespace(
        dtype="float32",
        mixed_precision_param="float32",
        enable_cpu_offload=False,
        seq_len=96,
        sync_every_microbatch=True,
    )
    parts = {p.what: p.bytes for p in memory_parts(cfg, training, RankPlan(4, 1, 1, 4), shapes)}
    proxy = shapes[2]
    linear = sum(a * b for a, b in proxy.linear)
    assert parts["weights, nf4, whole on every rank"] == pytest.approx(
        linear * (0.5 + 4 / 64) + (proxy.numel - linear) * 4, abs=1
    )


def test_one_process_plans_for_the_world_of_the_degrees_and_more_have_to_fit():
    p = SimpleNamespace(
        data_parallel_replicate_degree=2, data_parallel_shard_degree=-1, tensor_parallel_degree=2
    )
    assert plan_ranks(p, 16) == RankPlan(4, 2, 2, 16) and plan_ranks(p, 16).data == 8
    p.data_parallel_shard_degree = 8
    assert plan_ranks(p, 1).world == 32
    with pytest.raises(ValueError, match="WORLD_SIZE is 16"):
        plan_ranks(p, 16)


def test_a_shard_holds_whole_rows():
    assert (
        shard_numel([(5, 2), (7,)], RankPlan(shard=3, replicate=2, tensor=1, world=6)) == 2 * 2 + 3
    )
    assert (
        shard_numel([(10, 2), (7,)], RankPlan(shard=2, replicate=1, tensor=2, world=4)) == 3 * 2 + 4
    )


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activation_estimate_is_above_what_autograd_saves_and_not_far(
    assets, tmp_path, name, dtype
):
    table = {
        "phase": "evaluate",
        "folder": "x",
        "model": {"path": str(assets / name)},
        "batch": {"tokens": 256},
        "eval": {"source": "x"},
        "task": {"name": "exact"},
    }
    cfg = fill(Config, table, "test")
    shape = build_shape(roles(cfg)[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = shape.spec.model.build()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}  # tensors stay referenced, so that no address is used twice

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden_states(model, torch.randint(3, 300, (2, 128)), torch.arange(128).expand(2, 128))
    measured = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in own)
    none, full = activation_bytes(
        cfg, SimpleNamespace(seq_len=128, mixed_precision_param=dtype), shape
    )
    assert measured <= none <= 2.5 * measured and full < none
