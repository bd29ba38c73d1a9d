"""torchtitan's sections: laid over its own dataclasses; unknown keys, wrong types and settings that
would fail silently are errors.
"""

from types import SimpleNamespace

import pytest
from runs import config
from torchtitan.config import ParallelismConfig

from reflux.trainer.engine.trainer_config import check_world, titan_config


def titan(talkers, tmp_path, **over):
    spec = SimpleNamespace(name="x", flavor="x", model=None)
    return titan_config(config(talkers, tmp_path / "run", "calibrate", **over), spec)


def test_sections_reach_torchtitans_own_fields(talkers, tmp_path):
    got = titan(
        talkers,
        tmp_path,
        steps=40,
        training={"max_norm": 3},
        checkpoint={"interval": 7},
        parallelism={"tensor_parallel_degree": 1},
        optim={"lr": 0.25, "betas": [0.1, 0.2]},
    )
    assert got.training.max_norm == 3 and got.checkpoint.interval == 7 and got.training.steps == 40
    assert got.checkpoint.initial_load_in_hf and got.checkpoint.initial_load_path == str(
        talkers / "policy"
    )
    assert got.lr_scheduler.warmup_steps == 4 and got.comm.train_timeout_seconds == 1800
    assert not titan(talkers, tmp_path, model={"from_scratch": True}).checkpoint.initial_load_in_hf


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("training", {"seq_length": 3}, "did you mean training.seq_len?"),
        ("training", {"seq_len": "64"}, "training.seq_len = '64'"),
        ("training", {"seq_len": True}, "training.seq_len = True"),
        ("training", {"seq_len": 1.5}, "training.seq_len = 1.5"),
        ("training", {"mixed_precision_param": "float8"}, "float8"),
        ("training", {"steps": 3}, "set steps instead"),
        ("training", {"local_batch_size": 3}, "set batch.tokens"),
        ("debug", {"seed": 3}, "set seed instead"),
        ("checkpoint", {"folder": "x"}, "set folder instead"),
        ("parallelism", {"spmd_backend": "spmd_types"}, "partial_dtensor"),
    ],
)
def test_what_is_unknown_wrong_or_without_effect_is_an_error(
    talkers, tmp_path, section, values, message
):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        titan(talkers, tmp_path, **{section: values})


@pytest.mark.parametrize(
    "degrees, world, says",
    [
        ({}, 1, None),
        ({}, 8, None),
        ({"tensor_parallel_degree": 2}, 8, None),
        ({"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4}, 8, None),
        (
            {"tensor_parallel_degree": 2},
            1,
            "want 2 processes, and 1 was started. Use --nproc-per-node 2",
        ),
        ({"tensor_parallel_degree": 3}, 8, "want 6 processes, and 8 were started"),
        ({"data_parallel_shard_degree": 3}, 1, "--nproc-per-node 3, or lower the degrees"),
        ({"data_parallel_shard_degree": 2}, 8, "want 2 processes, and 8"),
        ({"tensor_parallel_degree": 0}, 1, "want degrees >= 1"),
        ({"data_parallel_shard_degree": 0}, 1, "want degrees >= 1"),
        ({"pipeline_parallel_degree": 2}, 2, "parallelism.pipeline_parallel_degree = 2; want 1"),
        ({"context_parallel_degree": 2}, 2, "parallelism.context_parallel_degree = 2; want 1"),
        ({"expert_parallel_degree": 2}, 2, "parallelism.expert_parallel_degree = 2; want 1"),
    ],
)
def test_the_degrees_make_as_many_processes_as_were_started(degrees, world, says):
    parallelism = ParallelismConfig(**degrees)
    if says is None:
        check_world(parallelism, world)
    else:
        with pytest.raises(ValueError, match=says):
            check_world(parallelism, world)
