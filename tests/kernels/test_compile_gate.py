"""The interpreter runs code that does not compile: the compiler is a gate, and it can fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parents[1]
FAULTS = """
import sys

import triton
import triton.language as tl

sys.path.insert(0, sys.argv[1])
from compile_for_gpus import broken_rules, measure


@triton.jit
def narrow(logits, sums, V, BLOCK: tl.constexpr):  # 2 V + 1 is odd: no 16-byte load can be aligned
    t, v = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(logits + t * (2 * V + 1) + v, mask=v < V, other=0.0)
    tl.store(sums + t, tl.sum(x, 0))


@triton.jit
def double(logits, sums, V, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK)
    x = tl.load(logits + v, mask=v < V, other=0.0).to(tl.float64)
    tl.store(sums, tl.sum(x * x, 0))


@triton.jit
def spilling(logits, sums, V, BLOCK: tl.constexpr):  # every lane lives until the last line
    v = tl.arange(0, BLOCK)
    x = tl.load(logits + v, mask=v < V, other=0.0)
    tl.store(sums + v, x * tl.sum(x, 0) + tl.max(x, 0), mask=v < V)


for kernel, block in ((narrow, 2048), (double, 2048), (spilling, 131072)):
    row = measure(kernel, "seeded", "*fp32", dict(BLOCK=block), 90, sys.argv[2] == "quick")
    print(*broken_rules(row, True, 1, 16), sep="\\n")
"""


def run(*command: object) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )


def test_every_kernel_compiles_for_every_gpu_and_keeps_the_rules():
    done = run(HERE / "compile_for_gpus.py", "--quick")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    launched = {
        name
        for path in HERE.parent.glob("kernels/*.py")
        for name in re.findall(r"(\w+)\[\(", path.read_text())
    }
    compiled = set(re.findall(r"^sm_\d+ +(\w+)", done.stdout, re.MULTILINE))
    assert launched <= compiled, f"launched but not in CASES: {launched - compiled}"


@pytest.mark.parametrize("depth", ["quick", "full"])
def test_the_gate_sees_spills_fp64_narrow_loads_and_missing_barriers(tmp_path, depth):
    script = tmp_path / "faults.py"  # Triton reads a kernel's source from its file
    script.write_text(FAULTS)
    done = run(script, HERE, depth)
    assert done.returncode == 0, done.stderr[-2000:]
    for fault in (
        "narrow (seeded fp32, sm_90) reads its rows without 16-byte loads",
        "computes in fp64",
        "spilling (seeded fp32, sm_90) spills to memory",
        "uses more than 16 registers",
        "has 0 barriers, want 1",
    ):
        assert fault in done.stdout, f"the gate missed: {fault}\n{done.stdout}"
