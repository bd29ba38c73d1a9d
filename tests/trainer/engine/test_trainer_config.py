"""torchtitan's configuration of a run: our tables and its sections, and its degrees."""

from types import SimpleNamespace

import pytest
from runs import config
from torchtitan.config import ParallelismConfig

from reflux.trainer.config.loader import load
from reflux.trainer.engine.trainer_config import check_world, titan_config

SPEC = SimpleNamespace(name="x", flavor="x", model=None)
MINIMAL = """phase = "distill"
folder = "r"
model.path = "m"
teacher.path = "t"
data.source = "d"
"""


def loaded(folder, text, *sets):
    (folder / "x.toml").write_text(MINIMAL + text)
    return load(folder / "x.toml", sets)


def titan(talkers, tmp_path, **over):
    return titan_config(config(talkers, tmp_path / "run", "calibrate", **over), SPEC)


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
def test_the_degrees_make_as_many_processes_as_were_started(
    talkers, tmp_path, degrees, world, says
):
    parallelism, cfg = ParallelismConfig(**degrees), config(talkers, tmp_path / "run", "calibrate")
    if says is None:
        check_world(parallelism, world, cfg)
    else:
        with pytest.raises(ValueError, match=says):
            check_world(parallelism, world, cfg)


def test_degrees_name_who_set_them(tmp_path):
    cfg = loaded(tmp_path, "[parallelism]\ntensor_parallel_degree = 2\n")
    degrees = titan_config(cfg, SPEC).parallelism
    with pytest.raises(ValueError, match=r"^.*x.toml: parallelism: .* want 2 processes, and 1 was"):
        check_world(degrees, 1, cfg)
    cfg = loaded(tmp_path, "", "parallelism.tensor_parallel_degree=0")
    with pytest.raises(ValueError, match="^--set parallelism.tensor_parallel_degree=0: "):
        check_world(titan_config(cfg, SPEC).parallelism, 1, cfg)
