"""Test the ops, then time them against their floors and their peers, then record the times.

    python -m bench linear_kl                # one op
    python -m bench all --seconds 360        # every op; what does not fit into the time is named
    python -m bench linear_kl --tokens 1024 4096 16384 32768
    python -m bench trainer                  # this trainer against TRL (trainer.py)
    python -m bench linear_kl --base HEAD~3  # the same cases with that revision's kernels, in turns
    python -m bench linear_kl --tokens 512 2048 8192 --vocab 5000 32000   # also on a CPU

A record with plots goes to bench/records (or --out FOLDER) when the tests pass and the tree is
clean. On a CPU, tiny shapes prove the harness and nothing is recorded unless --tokens says which
to time: narrow fp32 ones, one thread, its CPU time, floor = the GEMMs alone, memory = what tensors
hold.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
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


def _shapes(tokens: list[int], on_gpu: bool, vocab: Sequence[int] = ()) -> list:
    from .cases import CPU, GEMMA, QWEN, TINY, at_tokens

    if tokens:
        shapes = [at_tokens(QWEN if on_gpu else CPU, T) for T in tokens]
        wide = [replace(s, V=V, name=f"{s.name} V={V}") for V in vocab for s in shapes]
        return wide or shapes
    return [QWEN, GEMMA] if on_gpu else [TINY]


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
    mib = {name: memory_mib(case, name, on_gpu) - case.gradient_mib for name in working}
    return {
        "case": title,
        **vars(case.shape),
        "bytes": case.bytes,
        "flop": case.flop,
        "floor_ms": case.floor_ms,
        "goal_ms": case.goal_ms,
        "goal_mib": case.goal_mib,
        "ms_p20_p50_p80": ms,
        "extra_mib": mib,
        "failed": failed,
    }


def memory_mib(case, name: str, on_gpu: bool) -> float:
    """Peak above the inputs; on a CPU of what tensors hold."""
    if on_gpu:
        return peak_mib(case.step(name))
    from . import memory

    given = [x for x in case.peer_args.get(name, case.args) if hasattr(x, "untyped_storage")]
    return memory.peak_mib(case.step(name), given)


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
        case = OPS[op][variant](shape, "cuda" if on_gpu else "cpu")
        if not on_gpu:  # takes longer than all else
            case = replace(case, peers={k: f for k, f in case.peers.items() if "compile" not in k})
        yield measure(case, title, case_s, on_gpu)
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
            Path(folder, "reflux/__init__.py").touch()  # else an installed reflux comes first
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
        "--vocab", type=int, nargs="+", default=[], metavar="V", help="with these vocabularies"
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
    if not on_gpu:
        torch.set_num_threads(1)
    shapes = _shapes(args.tokens, on_gpu, args.vocab)
    if args.kernels_of:
        print(json.dumps(list(run_cases(args.ops, shapes, args.seconds, on_gpu))))
        return
    gate = _pass_tests(args.ops, on_gpu)
    print(f"gate: {gate}", flush=True)
    rows = {"ours": []}
    where = device()
    for row in run_cases(args.ops, shapes, args.seconds, on_gpu):
        if not on_gpu and "flop" in row:  # chunks stay in the cache: what is left is the GEMMs
            row["floor_ms"] = row["flop"] / where["gemm_gflops"] / 1e6
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
    if commit()[1] or not (on_gpu or args.tokens):
        print(f"No record: {'changes in the tree' if commit()[1] else 'tiny shapes on a CPU'}.")
        return
    path = write(
        f"{args.op}_{where['device'].lower().replace(' ', '-') if on_gpu else 'cpu'}",
        {**where, "base": args.base, "gate": gate, "rows": rows},
        args.out,
    )
    from .plots import draw

    print("Recorded in", path, *draw(path))


if __name__ == "__main__":
    main()
