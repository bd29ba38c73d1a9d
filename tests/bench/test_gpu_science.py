"""bench/gpu_science.py: packs arrive whole or not at all, a run that is cut off leaves its lines,
and the protocol of one seed runs on a CPU with tiny models.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from bench import gpu_science as science  # noqa: E402

WORKER = """
import json, pathlib, signal, sys, time
cell = pathlib.Path("runs/language/past/seed-321") / sys.argv[1]
def end(number, frame):
    pathlib.Path("stopped").write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
cell.mkdir(parents=True)
lines = [{"schema": 1}, {"step": 1, "loss": 2.0, "grad": 1.0}]
lines += [{"event": "eval", "step": 1, "eval/sampled": 0.5}]
(cell / "run.jsonl").write_text("".join(json.dumps(x) + chr(10) for x in lines) + '{"step": 2, "lo')
(cell / "summary.json").write_text(json.dumps({"wall_s": 3.0}))
pathlib.Path("begun").write_text("")
time.sleep(60)
"""


def options(tmp_path, **changes):
    defaults = {"out": tmp_path / "out", "work": tmp_path / "work", "commit": "c0ffee"}
    args = defaults | {"dry": True, "seed": 321, "seconds": 60.0, "parallel": 2} | changes
    for folder in (args["out"], args["work"]):
        folder.mkdir(parents=True, exist_ok=True)
    return argparse.Namespace(**args)


@pytest.fixture
def packs(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a-1.0-py3-none-any.whl").write_bytes(bytes(range(256)) * 40)
    (wheels / "b-1.0-py3-none-any.whl").write_bytes(b"b" * 5000)
    written = science.write_packs(wheels, tmp_path / "packs", size=4096)
    assert len(written) > 3 and all(p.stat().st_size <= 4096 for p in written)
    return tmp_path / "packs"


def test_packs_come_back_as_what_was_packed(packs, tmp_path):
    names = science.read_packs(packs, tmp_path / "again")
    assert names == ["a-1.0-py3-none-any.whl", "b-1.0-py3-none-any.whl"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "wheels" / name).read_bytes()


def test_a_pack_that_is_missing_or_torn_is_named(packs, tmp_path):
    torn = packs / "pack-01"
    content = torn.read_bytes()
    torn.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match="pack-01: is not what was packed"):
        science.read_packs(packs, tmp_path / "again")
    torn.unlink()
    with pytest.raises(ValueError, match=r"1 of \d+ packs are missing: pack-01"):
        science.read_packs(packs, tmp_path / "again")
    with pytest.raises(ValueError, match="no packs.json"):
        science.read_packs(tmp_path, tmp_path / "again")


def test_packs_fit_beside_the_repository():
    limit = 64 * 2**20
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    tree = sum((ROOT / name).stat().st_size for name in listed if name and (ROOT / name).exists())
    assert tree + science.PACK < limit, f"the tree has {tree / 2**20:.1f} MiB"


def test_out_of_time_the_runner_is_told_to_stop_and_its_lines_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(science, "LOOK_S", 0.05)
    args = options(tmp_path)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    process = subprocess.Popen([sys.executable, str(script), "teacher-original"], cwd=args.work)
    while not (args.work / "begun").exists():
        time.sleep(0.02)
    assert science.watch(process, args, until=time.monotonic()) == 130
    assert (args.work / "stopped").read_text() == "saved"
    (row,) = science.collect(args)
    assert row["case"] == "teacher-original@321" and row["wall_s"] == 3.0
    assert row["evals"] == [{"step": 1, "eval/sampled": 0.5}]
    assert row["curve"] == [{"step": 1, "loss": 2.0}]  # the torn line is left out
    assert science.collect(args) == [row], "a line that is there is not written again"


def test_a_runner_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(science, "LOOK_S", 0.05)
    monkeypatch.setattr(science, "STOP_S", 0.1)
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *a: None); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(0.5)  # until it does not listen
    code = science.watch(process, options(tmp_path), until=time.monotonic() - 1)
    assert code == -signal.SIGKILL


def test_sizes_of_a_gpu_are_those_of_the_protocol(tmp_path, monkeypatch):
    """64 x 8 rollouts and 60 steps in bf16, seed by seed; without Gemma its cells are left out."""
    monkeypatch.chdir(tmp_path)  # where no models are, whatever the checkout has
    cells = {c.name: c for c in science.cells_of(322, dry=False)}
    assert not [name for name in cells if "gemma" in name or "cross_tokenizer" in name]
    from reflux.trainer.config.loader import load

    words = list(cells["teacher-distillable@322"].arguments)
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    cfg = load(words[words.index("--config") + 1], sets)
    assert (cfg.rollout.prompts, cfg.rollout.group, cfg.steps) == (64, 8, 60)
    assert cfg.titan["training"]["mixed_precision_param"] == "bfloat16" and cfg.seed == 322
    assert (cfg.reference.dtype, cfg.proxy.dtype) == ("bfloat16", "bfloat16")
    waits = {name for c in cells.values() for name in c.after}
    assert waits <= cells.keys(), "a cell waits for one that was left out"


def test_with_gemma_there_are_four_attacks_on_four_teachers(tmp_path, monkeypatch):
    (tmp_path / "runs/real/models/gemma-3-270m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    labels = [c.labels for c in science.cells_of(321, dry=False)]
    students = {(x["teacher"], x["attack"]) for x in labels if x.get("role") == "student"}
    teachers = ("original", "task_only", "distillable", "undistillable")
    attacks = ("seq_kd", "kd_forward", "gkd_on_policy", "cross_tokenizer")
    assert students == {(t, a) for t in teachers for a in attacks}


def test_a_record_needs_a_clean_tree_or_a_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(science.records, "commit", lambda: ("abc", True))
    monkeypatch.setattr(science.records, "device", lambda: {"device": "none"})
    monkeypatch.delenv("REFLUX_COMMIT", raising=False)
    assert science.write_record([], options(tmp_path, commit=None, dry=False), 0) is None
    path = science.write_record([{"case": "x"}], options(tmp_path, dry=False), 0)
    record = json.loads(path.read_text())
    assert record["commit"] == "c0ffee" and record["rows"] == [{"case": "x"}]
    assert "one seed" in record["intervals"]


def test_what_cannot_be_read_ends_in_words(tmp_path, capsys):
    words = ["run", "--packs", str(tmp_path), "--work", str(tmp_path / "w")]
    assert science.main([*words, "--out", str(tmp_path / "o")]) == 2
    assert "no packs.json" in capsys.readouterr().err


@pytest.mark.matrices
def test_one_seed_runs_on_a_cpu_and_goes_on_where_it_was_stopped(tmp_path):
    words = [sys.executable, str(ROOT / "bench/gpu_science.py"), "run", "--dry"]
    words += ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--parallel", "2"]
    for _ in range(5):  # on a busy machine no cell ends in the first 25 seconds
        first = subprocess.run([*words, "--seconds", "25"], capture_output=True, text=True)
        assert first.returncode == science.INTERRUPTED, first.stdout + first.stderr
        if (tmp_path / "o" / "science.jsonl").exists():
            break
    before = (tmp_path / "o" / "science.jsonl").read_text().splitlines()
    done = subprocess.run([*words, "--seconds", "600"], capture_output=True, text=True)
    log = (tmp_path / "o" / "console.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    rows = [json.loads(x) for x in (tmp_path / "o" / "science.jsonl").read_text().splitlines()]
    assert [json.loads(x) for x in before] == rows[: len(before)], first.stdout
    names = {row["case"] for row in rows}
    assert {"teacher-undistillable@321", "student-distillable-seq_kd@321"} <= names
    calibrated = next(row for row in rows if row["case"] == "teacher-distillable@321")
    assert [step["step"] for step in calibrated["curve"]] == [1, 2]
    assert calibrated["evals"][-1]["eval/sampled"] >= 0
