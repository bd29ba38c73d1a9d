"""One command for a machine that has a GPU and nothing of this project installed: make bench-gpu

    python bench/gpu.py --commit SHA --out results            # every op, 540 s in all
    python bench/gpu.py linear_kl linear_nll --seconds 120    # these, in this order
    python bench/gpu.py --tune --seconds 240                  # workspace, columns, warps, stages
    python bench/gpu.py --dry --out runs/gpu                    # the whole control flow on a CPU

Needs torch and triton and no network. bench/README.md has commands to paste, and what to carry.

What is worth most comes first. Per op: a gate of a few seconds on the device (values and gradients
against float64 on the CPU, the same bits twice, no synchronisation) in the configurations that are
timed then; the clock against floor and peers; a row that is in OUT/rows.jsonl at once. An op that
fails, hangs or kills its process is a row that says so, and the next one goes on in a new process.
The ceilings, a copy and a bf16 GEMM, are of the same run. At the end the rows become a record with
plots, unless the tree has changes and no --commit says what it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import records  # noqa: E402

# what most of a distillation step is, first
ORDER = (
    "linear_kl linear_topk_kl linear_logprob linear_nll linear_dense_kl token_kl token_logprob "
    "renormalised_topk_kl topk_tail_kl bucket_kl class_logprob teacher_topk teacher_sample "
    "span_sum align_spans"
).split()
PEERS = ("liger-kernel", "trl", "orda-kernel", "quack-kernels")
WORKER = [sys.executable, "-m", "bench.gpu_worker"]
START_S = 90  # what a process may take to import torch and to measure the ceilings
GRACE_S = 45  # beyond its own limit, before an op is ended


def read_rows(path: Path) -> list[dict]:
    """The rows so far. A process that was ended may have left half a line."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(path: Path, row: dict) -> None:
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def install_peers(wheels: Path, target: Path) -> list[str]:
    """Which of PEERS could be installed from a folder of wheels; what could not is said."""
    found = []
    for name in PEERS:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--find-links", str(wheels), "--target", str(target), name]
        done = subprocess.run(command, capture_output=True, text=True)
        found += [name] if done.returncode == 0 else []
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"peer {name}: not installed: {last}", flush=True)
    return found


def environment_for(shim: Path, peers: Path, args: argparse.Namespace) -> dict[str, str]:
    for floor in ("kernels", "tokenalign", "trainer"):
        target = shim / "reflux" / floor
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(ROOT / floor)
    (shim / "reflux/__init__.py").touch()  # else an installed reflux comes first
    extra = {
        "PYTHONPATH": os.pathsep.join([str(shim), str(ROOT), str(peers)]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        "REFLUX_KERNELS_OF": str(shim),
    }
    if args.commit:
        extra["REFLUX_COMMIT"] = args.commit
    if args.dry:
        extra |= {"TRITON_INTERPRET": "1", "REFLUX_KERNELS_INTERPRET": "1"}
    return os.environ | extra


def last_event(rows: list[dict]) -> dict:
    return next((row for row in reversed(rows) if "event" in row), {})


def watch(process: subprocess.Popen, rows_file: Path, until: float) -> str:
    """Wait for a worker. Ends it when an op is over its limit. Returns why it ended, "" if well."""
    started = time.time()
    while process.poll() is None:
        time.sleep(0.2)
        event = last_event(read_rows(rows_file))
        fresh = event.get("time", 0) >= started
        limit = event["time"] + event["limit_s"] + GRACE_S if fresh else started + START_S
        if time.time() > min(limit, until + GRACE_S):
            process.kill()
            process.wait()
            return "out of time: its process was ended"
    return "" if process.returncode == 0 else f"its process ended with code {process.returncode}"


def run_ops(ops: list[str], rows_file: Path, args: argparse.Namespace, env: dict) -> None:
    """All ops, in as many processes as it takes."""
    until = time.time() + args.seconds
    left = list(ops)
    while left and time.time() < until:
        before = len(read_rows(rows_file))
        command = [*WORKER, *left, "--rows", str(rows_file)]
        command += ["--until", str(until), *(["--dry"] if args.dry else [])]
        command += ["--tune"] if args.tune else []
        command += ["--tokens", *map(str, args.tokens)] if args.tokens else []
        process = subprocess.Popen(command, env=env, cwd=ROOT)
        why = watch(process, rows_file, until)
        if not why:
            return
        event = last_event(read_rows(rows_file)[before:])
        op = event.get("op") or left[0]
        row = {"case": op, "op": op, "name": "-", "not_measured": why}
        append_row(rows_file, row)
        print(f"{op}: {why}; the next one goes on", flush=True)
        left = left[left.index(op) + 1 :]
    for op in left:
        append_row(rows_file, {"case": op, "op": op, "name": "-", "not_measured": "out of time"})
        print(f"{op}: out of time", flush=True)


def write_record(rows_file: Path, args: argparse.Namespace) -> Path | None:
    """The rows as a record, or None where they may not be one."""
    rows = read_rows(rows_file)
    heads = [row for row in rows if row.get("event") == "device"]
    timed = [row for row in rows if "case" in row]
    if args.commit:
        os.environ["REFLUX_COMMIT"] = args.commit
    revision, dirty = (args.commit, False) if args.commit else records.commit()
    if dirty and not args.dry:
        print(f"No record: changes in the tree, or no --commit. The rows are in {rows_file}")
        return None
    head = {k: v for k, v in (heads[-1] if heads else {}).items() if k != "event"}
    content = {**head, "dry": args.dry, "rows": {"ours": timed}}
    content |= {"commit": revision, "dirty": dirty}
    what = "tune" if args.tune else "all" if not args.ops else "_".join(args.ops)
    device = str(head.get("device", "unknown")).lower().replace(" ", "-")
    return records.write(f"{what}_{device}", content, args.out, "python bench/gpu.py")


def draw(path: Path, env: dict) -> None:
    command = [sys.executable, "-m", "bench.plots", str(path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    print(done.stdout.strip() if done.returncode == 0 else f"no plots: {last}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", choices=[[], *ORDER], metavar="OP", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=540, help="in all")
    parser.add_argument("--commit", help="of this copy, which has no .git")
    parser.add_argument("--tokens", nargs="+", type=int, default=[], metavar="T")
    parser.add_argument("--tune", action="store_true", help="sweep launch options, not ops")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of peers")
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    rows_file = args.out / "rows.jsonl"
    if rows_file.exists():  # of an earlier call: kept
        rows_file.rename(args.out / f"rows-{rows_file.stat().st_mtime_ns}.jsonl")
    with tempfile.TemporaryDirectory(prefix="shim") as shim:
        peers = args.out / "peers"
        env = environment_for(Path(shim), peers, args)
        if args.wheels:
            print("peers:", *install_peers(args.wheels, peers), flush=True)
        run_ops(args.ops or ORDER, rows_file, args, env)
        path = write_record(rows_file, args)
        if path:
            print("Recorded in", path)
            draw(path, env)
    reached = [row for row in read_rows(rows_file) if row.get("gate", "passed") != "not reached"]
    failed = [row["case"] for row in reached if row.get("gate", "passed") != "passed"]
    if failed:
        print("The gate failed for", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
