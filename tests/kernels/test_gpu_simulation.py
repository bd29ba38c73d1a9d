"""A first run on a GPU, tried without one: one test of each row kernel with what a GPU does
differently (all of them: `make test-gpu-sim`), the host code on an imaginary GPU, launches.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from close import DEVICE
from fake_gpu import AVAILABLE

from reflux.kernels import _triton
from reflux.kernels.span_sum import _sum

ROOT = Path(__file__).parents[2]
FLOAT64 = "test_values_and_gradients_match_float64[kernel]"
TESTS = [
    f"test_linear_kl.py::{FLOAT64}",  # _kl_rows, _chunks
    f"test_linear_topk_kl.py::{FLOAT64}",  # _topk_rows
    f"test_linear_logprob.py::{FLOAT64}",  # _logprob_rows
    "test_logprob_tiles.py::test_the_kernels_statistics_match_float64",
    f"test_bucket_kl.py::{FLOAT64}",  # _class_rows
    "test_linear_kl.py::test_nothing_waits_for_the_gpu",  # fake tensors reach no launch
    "test_linear_kl.py::test_autocast_is_what_a_linear_layer_would_do",
    "test_linear_nll.py::test_the_full_logits_never_exist",
]


@pytest.mark.skipif(
    DEVICE != "cpu" or not _triton.HAS_TRITON or "REFLUX_SIMULATE_GPU" in os.environ,
    reason="a real GPU, no triton, or simulated already",
)
def test_kernels_hold_on_a_simulated_gpu():
    passed = run_tests(*TESTS, REFLUX_SIMULATE_GPU="1", HYPOTHESIS_PROFILE="gpu")
    assert f"{len(TESTS)} passed" in passed


@pytest.mark.skipif(DEVICE != "cpu" or not AVAILABLE, reason="a real GPU, or torch < 2.12")
def test_host_code_holds_on_an_imaginary_gpu():
    assert "24 passed" in run_tests("fake_gpu_tests.py")


def run_tests(*names: str, **environment: str) -> str:
    tests = [f"tests/kernels/{name}" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_a_kernel_never_gets_tensors_of_two_devices():
    with pytest.raises(ValueError, match="_sum: tensors on cpu and meta; want all on one device"):
        _triton.launch(_sum, (1,), torch.zeros(1), torch.zeros(1, device="meta"))


def test_a_launch_makes_the_tensors_device_current(monkeypatch):
    seen = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *_):
            seen.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(_triton, "on_gpu", lambda x: True)
    x = torch.zeros(3)
    kernel = {(2,): lambda *args, **constants: seen.append(args)}
    _triton.launch(kernel, (2,), x, 0.5, WIDE=_triton.tl.float32)
    assert seen[0] == x.device and seen[1][1] == 0.5 and seen[2] is None
    _triton.launch(kernel, (2,), x, 0.1, WIDE=_triton.tl.float64)
    number = seen[4][1]
    assert number.dtype == torch.float64 and number.item() == 0.1, "fp32 would round it"
    _triton.launch(kernel, (0,), x)  # an empty grid is no launch
    assert len(seen) == 6
