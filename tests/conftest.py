"""Runs everywhere: on a GPU when there is one, else every kernel in Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must precede the first `import triton`
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
# sums over threads round otherwise, and some tests compare to the last digit
torch.set_num_threads(1)

from hypothesis import settings

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
# every drawn shape may compile a kernel
settings.register_profile("gpu", max_examples=6, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

if os.environ.get("REFLUX_SIMULATE_GPU") == "1":
    from gpu_simulation import simulate

    simulate()

if find_spec("torchtitan"):  # a machine that only tests kernels may do without
    from assets import assets, titan_process  # noqa: F401  fixtures for every test file
    from runs import talkers  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def byte_table_cache(tmp_path_factory):
    """Byte tables of the tests' tokenizers, also in processes that tests start."""
    os.environ["REFLUX_CACHE"] = str(tmp_path_factory.mktemp("byte_tables"))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that a test leaves behind would change the last digits of all that follow it."""
    yield
    torch.set_num_threads(1)
