"""Test the ops, then time them against their floors and their peers, then record the times.

    python -m bench linear_kl                # one op
    python -m bench all --seconds 360        # every op; what does not fit into the time is named
    python -m bench linear_kl --tokens 1024 4096 16384 32768
    python -m bench trainer                  # this trainer against TRL (trainer.py)
    python -m bench linear_kl --base HEAD~3  # the same cases with that revision's kernels, in turns

A record with plots goes to bench/records (or --out FOLDER) when this is a GPU, the tests pass and
the tree is clean. On a CPU tiny shapes prove the harness and nothing is recorded.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .clock import peak_mib, time_ms
from .records import FOLDER, ROOT, commit, device, git, write


def _use_kernels_of(folder: str) -> None:
    """Import reflux.kernels from folder/reflux/kernels, ahead of an editable install."""
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
    sys.path.insert(0, folder)


if shim := os.environ.get("REFLUX_KERNELS_OF"):  # bench/gpu.py, where nothing is installed
    _use_kernels_of(shim)


def _pass_tests(ops: list[str], on_gpu: bool) -> str:
    tests = [f"tests/kernels/test_{op}.py" for op in ops]
    parallel = ["-n", "8"] if on_gpu and importlib.util.find_spec("xdist") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *parallel, *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"{done.stdout[-3000:]}\nIts tests fail, so its speed means nothing. No times were "
            "taken."
        )
    return done.stdout.strip().splitlines()[-1]


def _shapes(tokens: list[int], on_gpu: bool) -> list:
    from .cases import GEMMA, QWEN, TINY, at_tokens

    return [at_tokens(QWEN, T) for T in tokens] if tokens else [QWEN, GEMMA] if on_gpu else [TINY]


def measure(case, title: str, seconds: float, on_gpu: bool) -> dict:
    """One row of the record: times of ours and of every peer that fits, memory above the inputs."""
    import torch

    working, failed = [], {}
    for name in ("ours", *case.peers):
        try:
            case.step(name)()
            working.append(name)
        except Exception as error:
            # a peer that cannot do this is a result; our own failure is none
            if name == "ours":
                raise
            failed[name] = (
                "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)[:200]
            )
    ms = time_ms({name: case.step(name) for name in working}, on_gpu, seconds)
    mib = (
        {name: peak_mib(case.step(name)) - case.gradient_mib for name in working} if on_gpu else {}
    )
    return {
        "case": title,
        **vars(case.shape),
        "dtype": "bf16",
        "bytes": case.bytes,
        "flop": case.flop,
        "floor_ms": case.floor_ms,
        "goal_ms": case.goal_ms,
        "goal_mib": case.goal_mib,
        "ms_p20_p50_p80": ms,
        "extra_mib": mib,
        "failed": failed,
    }


def run_cases(ops: list[str], shapes: list, seconds: float | None, on_gpu: bool) -> Iterator[dict]:
    """Rows, in the order of ops and shapes, until the time is over; then rows that say so."""
    import torch

    from .cases import OPS

    todo = [(op, variant, shape) for shape in shapes for op in ops for variant in OPS[op]]
    start = time.monotonic()
    for done, (op, variant, shape) in enumerate(todo):
        left = None if seconds is None else seconds - (time.monotonic() - start)
        title = f"{op} {variant}".strip()
        if left is not None and left < 0:
            yield {"case": title, **vars(shape), "not_measured": "out of time"}
            continue
        torch.manual_seed(0)
        # compilation takes time, too
        case_s = 4.0 if left is None else max(0.5, 0.4 * left / (len(todo) - done))
        yield measure(OPS[op][variant](shape, "cuda" if on_gpu else "cpu"), title, case_s, on_gpu)
        torch.compiler.reset()


def show(row: dict) -> str:
    """One line for people: time, fraction of the floor, rate, best peer, memory, goal."""
    head = f"{row['case']:<30} {row.get('name', ''):<12}"
    if "not_measured" in row:
        return f"{head} not measured: {row['not_measured']}"
    times = {name: p50 for name, (_, p50, _) in row["ms_p20_p50_p80"].items()}
    p20, ms, p80 = row["ms_p20_p50_p80"]["ours"]
    rate = (
        f"{row['flop'] / ms / 1e9:.0f} TFLOP/s"
        if row["flop"]
        else f"{row['bytes'] / ms / 1e6:.0f} GB/s"
    )
    others = {name: t for name, t in times.items() if name != "ours"}
    best = min(others, key=others.get) if others else None
    parts = [
        f"{head} {ms:8.3f} ms ({p20:.3f} to {p80:.3f})",
        f"{100 * row['floor_ms'] / ms:.0f} % of floor",
        rate,
    ]
    if best:
        parts.append(f"{others[best] / ms:.2f}x {best}")
    if row["extra_mib"]:
        parts.append(
            f"{row['extra_mib']['ours']:.0f} MiB"
            + (f" (peer {row['extra_mib'][best]:.0f})" if best else "")
        )
    if row["goal_ms"] and row["name"] == "qwen":
        mib, goal_mib = row["extra_mib"].get("ours", 0), row["goal_mib"] or float("inf")
        reached = ms <= row["goal_ms"] and mib <= goal_mib
        parts.append(f"goal {row['goal_ms']} ms: {'reached' if reached else 'missed'}")
    return ", ".join(parts + [f"{name}: {why}" for name, why in row["failed"].items()])


def _rows_of_base(arguments: list[str], ref: str) -> list[dict]:
    """The same cases with revision `ref`, in another process: an op can be registered once only."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        git("worktree", "add", "--detach", str(tree), ref)
        try:
            Path(folder, "reflux").mkdir()
            Path(folder, "reflux/kernels").symlink_to(tree / "kernels")
            command = [sys.executable, "-m", "bench", *arguments, "--kernels-of", folder]
            return json.loads(
                subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            )
        finally:
            git("worktree", "remove", "--force", str(tree))


def _arguments() -> argparse.Namespace:
    ops = sorted(p.stem for p in (ROOT / "kernels").glob("[!_]*.py"))
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", default="all", choices=["all", *ops])
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[],
        metavar="T",
        help="Qwen's shape with these numbers of tokens",
    )
    parser.add_argument(
        "--seconds", type=float, help="stop after this time; what is missing is named"
    )
    parser.add_argument("--base", metavar="REF", help="also time this git revision's kernels")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="FOLDER", help="where the record goes"
    )
    parser.add_argument("--kernels-of", help=argparse.SUPPRESS)  # how --base calls itself
    args = parser.parse_args()
    args.ops = ops if args.op == "all" else [args.op]
    return args


def main() -> None:
    if sys.argv[1:2] == ["trainer"]:
        from .trainer import main as against_trl

        return against_trl(sys.argv[2:])
    args = _arguments()
    if args.kernels_of:
        _use_kernels_of(args.kernels_of)
    import torch

    on_gpu = torch.cuda.is_available()
    shapes = _shapes(args.tokens, on_gpu)
    if args.kernels_of:
        print(json.dumps(list(run_cases(args.ops, shapes, args.seconds, on_gpu))))
        return
    gate = _pass_tests(args.ops, on_gpu)
    print(f"gate: {gate}", flush=True)
    rows = {"ours": []}
    for row in run_cases(args.ops, shapes, args.seconds, on_gpu):
        print(show(row), flush=True)
        rows["ours"].append(row)
    if args.base:
        plain = [args.op, *(["--tokens", *map(str, args.tokens)] if args.tokens else [])]
        rows["base"] = _rows_of_base(plain, args.base)
        # on both sides of it: a drifting clock shows
        rows["again"] = list(run_cases(args.ops, shapes, args.seconds, on_gpu))
        print(
            *(f"{title} {show(row)}" for title in ("base", "again") for row in rows[title]),
            sep="\n",
        )
    if not on_gpu or commit()[1]:
        print(f"No record: {'the working tree is dirty' if on_gpu else 'no GPU here'}.")
        return
    path = write(
        f"{args.op}_{torch.cuda.get_device_name().lower().replace(' ', '-')}",
        {**device(), "base": args.base, "gate": gate, "rows": rows},
        args.out,
    )
    from .plots import draw

    print("Recorded in", path, *draw(path))


if __name__ == "__main__":
    main()
