"""bench/gpu.py where nothing is installed: scarce minutes yield rows, whatever fails on the way."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from bench import gpu, gpu_trainer, gpu_worker, tune  # noqa: E402
from bench.cases import OPS, TINY  # noqa: E402

WORKER = """
import json, sys, time
ops = sys.argv[1 : sys.argv.index("--rows")]
out = open(sys.argv[sys.argv.index("--rows") + 1], "a")
def write(row):
    out.write(json.dumps(row) + chr(10)), out.flush()
write({"event": "device", "device": "none"})
for op in ops:
    write({"event": "op", "op": op, "time": time.time(), "limit_s": 0.2})
    if op == "linear_nll":
        out.write('{"half a li'), out.flush()
        sys.exit(7)  # an illegal address on a GPU ends the process
    if op == "token_kl":
        time.sleep(60)
    write({"op": op, "case": op, "name": "tiny", "gate": "passed"})
"""


def options(tmp_path, **changes):
    defaults = dict(seconds=60.0, dry=True, tune=False, tokens=[], commit=None, ops=[])
    return argparse.Namespace(out=tmp_path, **(defaults | changes))


def test_an_op_that_dies_or_hangs_is_a_row_and_the_next_goes_on(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu, "START_S", 10)
    ops, rows_file = ["linear_kl", "linear_nll", "token_kl", "span_sum"], tmp_path / "rows.jsonl"
    gpu.run_ops(ops, rows_file, options(tmp_path), {})
    rows = [row for row in gpu.read_rows(rows_file) if "case" in row]
    got = {row["case"]: row.get("not_measured") for row in rows}
    assert got["linear_kl"] is None and got["span_sum"] is None
    assert "code 7" in got["linear_nll"] and "ended" in got["token_kl"]


def test_what_there_was_no_time_for_is_named(tmp_path):
    gpu.run_ops(["linear_kl"], tmp_path / "rows.jsonl", options(tmp_path, seconds=-1.0), {})
    (row,) = gpu.read_rows(tmp_path / "rows.jsonl")
    assert row["not_measured"] == "out of time"


def test_a_record_needs_a_clean_tree_or_a_commit(tmp_path, monkeypatch):
    rows_file = tmp_path / "rows.jsonl"
    gpu.append_row(rows_file, {"event": "device", "device": "X 1", "copy_gbps": 1.0})
    gpu.append_row(rows_file, {"op": "span_sum", "case": "span_sum", "name": "qwen"})
    monkeypatch.setattr(gpu.records, "commit", lambda: ("abc", True))
    assert gpu.write_record(rows_file, options(tmp_path, dry=False)) is None
    path = gpu.write_record(rows_file, options(tmp_path, dry=False, commit="c0ffee"))
    record = json.loads(path.read_text())
    assert record["commit"] == "c0ffee" and not record["dirty"] and record["copy_gbps"] == 1.0
    assert [row["case"] for row in record["rows"]["ours"]] == ["span_sum"]


def test_peers_that_were_not_carried_are_said(tmp_path, capsys):
    assert gpu.install_peers(tmp_path, tmp_path / "peers") == []
    said = capsys.readouterr().out
    assert all(f"peer {name}: not installed" in said for name in gpu.PEERS)


@pytest.mark.parametrize(
    "wrong, what",
    [(lambda loss: loss * 1.01, "loss"), (lambda loss: loss.detach() * 1.01 - loss * 0.01, "grad")],
)
def test_the_gate_sees_one_percent(monkeypatch, wrong, what):
    make = OPS["linear_nll"][""]

    def broken(shape, device):
        case = make(shape, device)
        return replace(case, ours=lambda *args: wrong(case.ours(*args)))

    assert gpu_worker.gate("linear_nll", "", dry=True) == "passed"
    monkeypatch.setitem(OPS["linear_nll"], "", broken)
    assert what in gpu_worker.gate("linear_nll", "", dry=True)


def test_the_gate_sees_what_is_not_the_same_twice(monkeypatch):
    make, calls = OPS["span_sum"][""], []

    def restless(shape, device):
        case = make(shape, device)
        return replace(case, ours=lambda *args: case.ours(*args) + len(calls + [calls.append(0)]))

    monkeypatch.setitem(OPS["span_sum"], "", restless)
    assert "two runs differ" in gpu_worker.gate("span_sum", "", dry=True)


def test_a_setting_that_does_not_fit_is_a_row():
    def refused():
        raise RuntimeError("out of resources: shared memory")

    row = tune.measure(("rows 8192 columns", 10, refused), TINY, False, 0.01)
    assert "shared memory" in row["not_measured"]
    row = tune.measure(("rows 1024 columns", 10, lambda: torch.zeros(1)), TINY, False, 0.01)
    assert row["ms_p20_p50_p80"]["ours"][1] > 0
    assert len(list(tune.row_kernels(TINY, "cpu"))) == 3 * (4 * 3 + 2 * 3)


def test_the_whole_command_without_a_gpu_and_without_an_installation(tmp_path, monkeypatch, capfd):
    arguments = ["gpu.py", "span_sum", "--dry", "--out", str(tmp_path), "--seconds", "12"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == 0
    said = capfd.readouterr().out
    assert "span_sum" in said and "Recorded in" in said
    (record,) = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
    assert record["dry"] and record["rows"]["ours"][0]["gate"] == "passed"


def test_the_trainers_smoke_names_what_is_wrong():
    good = [{"loss": 2.0, "tokens_per_s": 100.0, "memory_gib": 1.0}] * gpu_trainer.STEPS
    row = gpu_trainer.summary("distill", 10**9, "", good, 3.0)
    assert not row["failed"] and row["mfu"] == pytest.approx(6e11 / gpu_trainer.PEAK)
    nan = [*good[:-1], {"loss": float("nan")}]
    assert "nan" in gpu_trainer.summary("distill", 1, "", nan, 3.0)["failed"]
    assert "3 of 4" in gpu_trainer.summary("distill", 1, "", good[:3], 3.0)["failed"]
    assert gpu_trainer.compare([2.0, 2.0], [2.01, 1.99]) == ""
    assert gpu_trainer.compare([2.0, 3.0], [2.0, 2.0]).startswith("step 2: loss 3.0000")
    assert "FAILED: x" in gpu_trainer.show({"case": "distill", "failed": "x"})


def test_a_run_of_the_trainers_smoke(tmp_path, monkeypatch, capsys):
    arguments = ["gpu_trainer.py", "--dry", "--out", str(tmp_path), "--only", "distill"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_trainer.main() == 0
    assert capsys.readouterr().out.startswith("distill ")
    (row,) = gpu.read_rows(tmp_path / "trainer.jsonl")
    assert len(row["losses"]) == gpu_trainer.STEPS and row["tokens_per_s"] > 0


def test_a_machine_without_nvidia_smi_still_has_numbers(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X 1")
    monkeypatch.setattr(gpu.records.subprocess, "run", missing)
    monkeypatch.setattr("bench.clock.roofline_now", lambda: {"copy_gbps": 1.0})
    assert gpu.records.device() == {"device": "X 1", "driver": "unknown", "copy_gbps": 1.0}
