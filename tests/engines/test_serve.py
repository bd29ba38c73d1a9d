"""Real servers over HTTP: texts, pushes of weights, one step off, two ranks."""

import pytest
from engine_servers import start_server
from runs import config, run_here, run_ranks

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("titan_process")]

GAP = 1e-5  # nats, fp32


def by(server, **more):
    return {"engine": "server", "servers": [server.address], **more}


def test_a_calibration_samples_by_a_server_with_the_weights_that_it_trains(
    policy_server, talkers, tmp_path
):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=3,
        rollout=by(policy_server),
        calibration={"mode": "distillable"},
        eval={"source": str(tmp_path / "data.jsonl"), "limit": 2, "at_start": True},
    )
    for step in run_here(cfg).steps:
        assert step["max/mismatch"] < GAP, step


def test_one_step_off_texts_are_one_update_old(policy_server, talkers, tmp_path):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=4,
        rollout=by(policy_server, overlap=1),
        calibration={"mode": "distillable"},
    )
    steps = run_here(cfg).steps
    assert [s["staleness"] for s in steps] == [0, 1, 1, 1]
    assert steps[0]["max/mismatch"] < GAP
    assert all(s["max/mismatch"] > 10 * GAP for s in steps[1:])  # an update lies between


@pytest.mark.parametrize("overlap", [0, 1])
def test_ranks_that_share_rows_ask_for_their_texts_once(policy_server, talkers, tmp_path, overlap):
    """Two halves of every tensor train on the same texts, by the weights that were pushed."""
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        steps=3,
        rollout=by(policy_server, overlap=overlap, prompts=2, group=4),
        calibration={"mode": "off"},
        parallelism={"tensor_parallel_degree": 2},
    )
    steps = run_ranks(cfg).steps
    assert [s.get("staleness", 0) for s in steps] == [0, overlap, overlap]
    assert steps[0]["max/mismatch"] < GAP
    assert all(overlap or s["max/mismatch"] < GAP for s in steps)


def test_two_ranks_share_servers_and_one_that_is_killed_is_named(policy_server, talkers, tmp_path):
    process, second = start_server(talkers / "policy")
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        rollout=by(policy_server) | {"servers": [second.address, policy_server.address]},
        calibration={"mode": "distillable"},
    )
    for step in run_ranks(cfg).steps:
        assert step["max/mismatch"] < GAP, step
    process.kill()
    process.wait()
    cfg = config(talkers, tmp_path / "gone", "calibrate", rollout=cfg.rollout.__dict__)
    with pytest.raises(ValueError, match=f"rollout.servers: {second.address} does not answer"):
        run_here(cfg)


def test_a_server_of_another_model_is_refused_before_anything_is_trained(
    teacher_server, talkers, tmp_path
):
    cfg = config(talkers, tmp_path / "run", "calibrate", rollout=by(teacher_server))
    with pytest.raises(ValueError, match="rollout.servers: .* with another architecture"):
        run_here(cfg)
