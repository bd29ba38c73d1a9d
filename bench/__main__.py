"""Test one op, then time it, then record the times.

    python -m bench linear_kl                # from the repository root
    python -m bench linear_kl --base HEAD~3  # the same cases with that revision's kernels, in turns

On a GPU a record goes to bench/records/<date>_<op>_<gpu>.json, unless the tests fail or the working tree is dirty. On a
CPU tiny shapes prove the harness and nothing is recorded.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _use_kernels_of(folder: str) -> None:
    """Make reflux.kernels mean folder/reflux/kernels in this process, ahead of an editable install."""
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
    sys.path.insert(0, folder)


def _time_cases(op: str) -> list[dict]:
    import torch

    from .cases import GEMMA, OPS, QWEN, TINY
    from .clock import peak_mib, time_ms

    on_gpu = torch.cuda.is_available()
    rows = []
    for shape in (QWEN, GEMMA) if on_gpu else (TINY,):
        torch.manual_seed(0)
        case = OPS[op](shape, "cuda" if on_gpu else "cpu")
        # Definitions hold several [T, V] tensors and torch.compile needs a compiler: both on a GPU only, if they fit.
        baselines = {k: f for k, f in case.baselines.items() if on_gpu or k == "torch"}
        timed, failed = {"ours": case.ours}, {}
        for name, fn in baselines.items():
            try:
                fn()
                timed[name] = fn
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
        ms = time_ms(timed, on_gpu, rounds=50 if on_gpu else 3)
        rows.append({**vars(shape), "dtype": "bf16", "bytes": case.bytes, "flop": case.flop, "floor_ms": case.floor_ms,
                     "ms_p20_p50_p80": ms.pop("ours"), "peak_mib": peak_mib(case.ours) if on_gpu else None,
                     "baseline_ms_p20_p50_p80": ms, "baseline_failed": failed})
        del case, timed, baselines
    return rows


def _pass_tests(op: str) -> str:
    test = f"tests/test_{op}.py"
    done = subprocess.run([sys.executable, "-m", "pytest", test], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{op}: its tests fail, so its speed means nothing. No times were taken.")
    return f"{test}: {done.stdout.strip().splitlines()[-1]}"


def _time_base(op: str, ref: str) -> list[dict]:
    """The same cases in a process whose reflux.kernels is revision `ref`: two copies cannot register one op."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), ref)
        try:
            Path(folder, "reflux").mkdir()
            Path(folder, "reflux/kernels").symlink_to(tree / "kernels")
            command = [sys.executable, "-m", "bench", op, "--kernels-of", folder]
            return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _environment() -> dict:
    import torch
    import triton

    from .clock import roofline_now

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
            "triton": triton.__version__, **roofline_now()}


def _print(op: str, title: str, rows: list[dict]) -> None:
    for row in rows:
        p20, p50, p80 = row["ms_p20_p50_p80"]
        others = "  ".join(f"{k} {v[1]:.2f}" for k, v in row["baseline_ms_p20_p50_p80"].items())
        print(f"{op} {title:<6} T {row['T']} V {row['V']}: {p50:.2f} ms ({p20:.2f} to {p80:.2f}), "
              f"floor {row['floor_ms']:.2f}  {others}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=sorted(p.stem for p in (ROOT / "kernels").glob("[!_]*.py")))
    parser.add_argument("--base", metavar="REF", help="also time this git revision's kernels")
    parser.add_argument("--kernels-of", help=argparse.SUPPRESS)  # how --base calls itself
    args = parser.parse_args()
    if args.kernels_of:
        _use_kernels_of(args.kernels_of)
        print(json.dumps(_time_cases(args.op)))
        return

    import torch

    gate = _pass_tests(args.op)
    rows = {"ours": _time_cases(args.op)}
    if args.base:
        rows["base"] = _time_base(args.op, args.base)
        rows["again"] = _time_cases(args.op)  # on both sides of the base, so that a drifting clock shows
    for title, found in rows.items():
        _print(args.op, title, found)
    dirty = bool(_git("status", "--porcelain"))
    if not torch.cuda.is_available() or dirty:
        print(f"{gate}. No record: {'the working tree is dirty' if torch.cuda.is_available() else 'no GPU here'}.")
        return
    environment = _environment()
    record = {"op": args.op, "commit": _git("rev-parse", "HEAD"), "dirty": False, "base": args.base, "gate": gate,
              "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
              "command": " ".join(["python -m bench", *sys.argv[1:]]), **environment, "cases": rows}
    gpu = environment["gpu"].lower().replace(" ", "-").replace(os.sep, "-")
    path = ROOT / "bench/records" / f"{record['date'][:10]}_{args.op}_{gpu}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{gate}. Recorded in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
