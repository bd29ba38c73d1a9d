"""Servers that the tests of engines/ share: an engine takes 15 s to start."""

import subprocess
import sys
import time

import pytest
from assets import free_port
from runs import environment

from reflux.trainer.rollouts.client import Server, ServerError


def start_server(model, *more: str):
    """(process, Server) of `python -m reflux.trainer.rollouts.serve MODEL`."""
    port = free_port()
    command = [sys.executable, "-m", "reflux.trainer.rollouts.serve", str(model)]
    command += ["--port", str(port), "--dtype", "float32", "--max-len", "128"]
    process = subprocess.Popen([*command, "--max-running", "32", *more], env=environment())
    server = Server(f"http://127.0.0.1:{port}", 120.0)
    for _ in range(600):
        time.sleep(0.5)
        try:
            server.info()
            return process, server
        except ServerError:
            assert process.poll() is None, "the server ended"
    process.kill()
    raise AssertionError("the server did not start in five minutes")


@pytest.fixture(scope="session")
def policy_server(talkers):
    """Serves `policy`; the runs of tests push their weights to it."""
    process, server = start_server(talkers / "policy")
    yield server
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture(scope="session")
def teacher_server(talkers):
    """Serves `teacher`, up to the top 16."""
    process, server = start_server(talkers / "teacher", "--max-logprobs", "16")
    yield server
    process.terminate()
    assert process.wait(60) == 0
