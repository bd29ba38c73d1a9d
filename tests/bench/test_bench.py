"""The bench is right before it is fast: peers compute what we compute, a failing op is not timed,
time runs out aloud.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from close import DEVICE

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from bench import clock, peers, plots  # noqa: E402
from bench.__main__ import measure, memory_mib, run_cases, show  # noqa: E402
from bench.cases import CPU, OPS, QWEN, TINY  # noqa: E402

CASES = [(op, variant) for op, variants in OPS.items() for variant in variants]


@pytest.mark.parametrize("op, variant", CASES)
def test_peers_compute_what_we_compute(op, variant):
    torch.manual_seed(0)
    case = OPS[op][variant](TINY, DEVICE)
    ours = case.step("ours")()
    gradient = None if not case.backward else case.args[0].grad.clone()
    for name in case.peers:
        if not case.compare or "compile" in name:  # what is compiled is what "torch" computes
            continue
        theirs = case.step(name)()
        torch.testing.assert_close(
            theirs.float(), ours.float(), rtol=0.03, atol=0.03, msg=lambda m, n=name: f"{n}: {m}"
        )
        if gradient is not None and case.peer_args.get(name) is None:
            error = (case.args[0].grad.float() - gradient.float()).norm()
            assert error <= 0.05 * gradient.float().norm() + 1e-3, name


def test_every_op_has_a_case():
    ops = {p.stem for p in (ROOT / "kernels").glob("[!_]*.py")}
    assert set(OPS) == ops


def test_floors_are_the_hardware_model():
    """kernels at Qwen's shape: 3 student GEMMs and 1 teacher GEMM are 32.3 ms at 790 TFLOP/s, row
    sweeps add 10 bytes.
    """
    T, V, D, E = QWEN.T, QWEN.V, QWEN.D, QWEN.E
    tiny = OPS["linear_kl"]["forward"](TINY, DEVICE)
    assert tiny.flop == 2 * TINY.T * TINY.V * (3 * TINY.D + TINY.E)
    assert 2 * T * V * (3 * D + E) / 790e12 * 1e3 == pytest.approx(32.3, abs=0.1)
    assert tiny.floor_ms == pytest.approx((tiny.bytes / 4.3e12 + tiny.flop / 790e12) * 1e3)


def test_a_row_names_what_failed_and_what_there_was_no_time_for():
    case = OPS["token_kl"]["forward"](TINY, DEVICE)

    def too_large(*_):
        raise torch.OutOfMemoryError

    def chunked(z, u):
        return peers.F.kl_div(z.log_softmax(-1), u.softmax(-1), reduction="sum")

    case = replace(case, peers={"hungry": too_large, "chunked": chunked})
    row = measure(case, "token_kl forward", 0.01, on_gpu=False)
    assert row["failed"] == {"hungry": "out of memory"} and set(row["ms_p20_p50_p80"]) == {
        "ours",
        "chunked",
    }
    assert "hungry: out of memory" in show(row) and "x chunked" in show(row)
    skipped = list(run_cases(["token_kl"], [TINY], -1.0, on_gpu=False))
    assert "out of time" in show(skipped[0])


def test_a_cpu_counts_what_tensors_hold_inside_our_ops_too():
    """Naive logits, log-softmax and gradients of [T, V]; ours a chunk of them."""
    shape = replace(CPU, T=700, V=900)
    case = OPS["linear_nll"][""](shape, "cpu")
    row = measure(case_without_compile(case), "linear_nll", 0.01, on_gpu=False)
    block = 700 * 900 * 4 / 2**20
    assert row["dtype"] == "float32"
    assert row["extra_mib"]["torch"] > 2 * block
    # 4 MiB blocks at most, or 128 rows
    many = OPS["linear_nll"][""](replace(shape, T=7000), "cpu")
    ours = [memory_mib(c, "ours", False) - c.gradient_mib for c in (case, many)]
    assert ours[1] < ours[0] + 6300 * (4 * shape.D + 64) / 2**20 + 4 * 4.1


def case_without_compile(case):
    return replace(case, peers={k: f for k, f in case.peers.items() if "compile" not in k})


def test_our_own_failure_is_never_a_row():
    case = replace(OPS["token_kl"]["forward"](TINY, DEVICE), ours=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(case, "token_kl forward", 0.01, on_gpu=False)


def test_rounds_are_interleaved_and_counted():
    seen = []
    ms = clock.time_ms(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, on_gpu=False, seconds=10
    )
    assert seen[:6] == ["a", "b", "b", "a", "a", "b"] and len(seen) == 2 * 51
    assert all(p20 <= p50 <= p80 for p20, p50, p80 in ms.values())


def test_plots_come_from_a_record(tmp_path):
    row = {
        "case": "linear_kl forward",
        "name": "qwen",
        "T": 1,
        "V": 2,
        "flop": 1e12,
        "bytes": 1e9,
        "floor_ms": 1.0,
        "ms_p20_p50_p80": {"ours": [1, 2, 3], "torch": [4, 5, 6]},
        "extra_mib": {"ours": 1.0, "torch": 2.0},
    }
    record = {
        "rows": {
            "ours": [row | {"T": T} for T in (1, 2, 4)]
            + [{"case": "x", "name": "y", "not_measured": "out of time"}]
        }
    }
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record))
    made = plots.draw(path)
    assert [p.name for p in made] == [
        "r_bars.png",
        "r_tokens_linear_kl_forward.png",
        "r_roofline.png",
    ]
    assert all(p.stat().st_size > 5000 for p in made)


def test_a_failing_op_is_not_timed(tmp_path):
    """The gate is the op's own test file: here pytest is told to collect nothing of it, which
    fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench", "span_sum"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTEST_ADDOPTS": "-k no_such_test", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert (
        done.returncode != 0 and "No times were taken" in done.stderr and " ms (" not in done.stdout
    )
