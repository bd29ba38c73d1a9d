"""torchtitan's sections: laid over its own dataclasses; unknown keys, wrong types and settings that
would fail silently are errors.
"""

from types import SimpleNamespace

import pytest
from runs import config

from reflux.trainer.engine.trainer_config import titan_config


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
