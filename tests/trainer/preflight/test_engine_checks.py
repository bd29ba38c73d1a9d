"""--check of engines: what is installed, and who answers at an address."""

import importlib.metadata
from dataclasses import replace

import pytest
from assets import free_port
from runs import config

from reflux.trainer.preflight.engine_checks import engine_findings
from reflux.trainer.rollouts import vllm_engine


def test_a_run_without_engines_has_nothing_to_check(talkers, tmp_path):
    assert engine_findings(config(talkers, tmp_path / "x", "calibrate")) == []


def test_a_missing_engine_and_a_silent_server_are_errors(talkers, tmp_path, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    vllm_engine.check_installed.cache_clear()
    cfg = config(talkers, tmp_path / "x", "calibrate", rollout={"engine": "vllm"})
    (finding,) = engine_findings(cfg)
    assert finding.level == "error" and "needs vLLM, which is not installed" in finding.what
    address = f"http://127.0.0.1:{free_port()}"
    rollout = replace(cfg.rollout, engine="server", servers=(address,))
    (finding,) = engine_findings(replace(cfg, rollout=rollout))
    assert finding.level == "error" and f"{address} does not answer" in finding.what


@pytest.fixture(autouse=True)
def installed_as_before():
    yield
    vllm_engine.check_installed.cache_clear()
