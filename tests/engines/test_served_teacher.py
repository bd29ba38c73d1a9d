"""A teacher behind a real server trains a student as the same teacher in the run does."""

from dataclasses import replace

import pytest
from runs import config, run_here, run_ranks

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("titan_process")]

TOP_K = {"top_k": 12, "tail": "bucket", "nll_weight": 0.0}


def distill(talkers, folder, server=None, **distill):
    teacher = {} if server is None else {"source": "server", "servers": [server.address]}
    return config(talkers, folder, "distill", steps=3, teacher=teacher, distill=distill)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_served_teacher_is_the_local_one(teacher_server, talkers, tmp_path, divergence):
    """The student's own texts, sampled by the same embedded sampler: every number of the log."""
    spec = TOP_K | {"divergence": divergence}
    local = run_here(distill(talkers, tmp_path / "local", **spec)).steps
    served = run_here(distill(talkers, tmp_path / "served", teacher_server, **spec)).steps
    for a, b in zip(local, served, strict=True):
        for name in ("loss", "kl", "teacher_mass", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


def test_ranks_that_share_rows_ask_it_once(teacher_server, talkers, tmp_path):
    """The numbers of one rank."""
    spec = TOP_K | {"divergence": "reverse"}
    one = run_here(distill(talkers, tmp_path / "one", teacher_server, **spec)).steps
    cfg = distill(talkers, tmp_path / "two", teacher_server, **spec)
    two = run_ranks(replace(cfg, titan=cfg.titan | {"parallelism": {"tensor_parallel_degree": 2}}))
    for a, b in zip(one, two.steps, strict=True):
        for name in ("loss", "kl", "teacher_mass", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


def test_sequence_kd_takes_the_texts_of_the_server(teacher_server, talkers, tmp_path):
    cfg = distill(talkers, tmp_path / "run", teacher_server, objective="nll", on_policy=0.0)
    steps = run_here(cfg).steps
    assert all(s["on_policy"] == 0 and s["nll"] > 0 for s in steps)


def test_what_the_servers_cannot_answer_is_refused_before_anything_is_trained(
    teacher_server, policy_server, talkers, tmp_path
):
    for server, spec, says in (
        (teacher_server, {"top_k": 17}, "at most the top 16. Lower it, or start them with"),
        (policy_server, {}, f"teacher.servers: {policy_server.address} serves .* than .*teacher"),
    ):
        cfg = distill(talkers, tmp_path / says[:9].strip(), server, **(TOP_K | spec))
        with pytest.raises(ValueError, match=says):
            run_here(cfg)
