"""The process of bench/gpu.py that has torch: gates ops, times them, appends rows.

python -m bench.gpu_worker linear_kl --rows FILE --until UNIX_TIME [--dry] [--tune]
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from .__main__ import measure, show  # first: it puts the checkout's kernels on the path

import torch  # isort: skip
from torch import Tensor  # isort: skip

from . import tune  # isort: skip
from .cases import GEMMA, OPS, QWEN, TINY, Case, Shape, at_tokens  # isort: skip
from .clock import ceilings  # isort: skip
from .gpu import append_row  # isort: skip
from .records import device, versions  # isort: skip

# V a multiple of 16 and K of the timed shapes: the kernels that are timed, compiled once
GATE = Shape("gate", T=160, V=16 * 301, D=128, E=192, K=64)
ODD = Shape("gate odd", T=33, V=4099, D=64, E=96, K=64)
SHARE = {"linear_kl": 6, "linear_topk_kl": 3, "linear_logprob": 3, "linear_nll": 3}
LOSS, GRADIENT = 1e-3, 1e-2  # relative errors of bf16 inputs against float64


def check(case: Case) -> None:
    """AssertionError where ours is not its definition in float64, or not the same twice."""
    on_gpu = torch.cuda.is_available()
    step = case.step("ours")
    first = step()  # compiles
    grads = gradients(case)
    torch.cuda.set_sync_debug_mode("error") if on_gpu else None
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default") if on_gpu else None
    if not case.compare:
        return
    assert torch.equal(first, again), f"two runs differ: {first.item()} and {again.item()}"
    for a, b in zip(grads, gradients(case), strict=True):
        assert torch.equal(a, b), "gradients of two runs differ"
    if "torch" not in case.peers:
        return
    exact = replace(case, args=tuple(widened(x) for x in case.args))
    want = exact.step("torch")()
    close(first, want, LOSS, "loss")
    for got, truth in zip(grads, gradients(exact), strict=True):
        close(got, truth, GRADIENT, "gradient")


def widened(x):
    """In float64 on the CPU; class maps move as they are."""
    if isinstance(x, Tensor):
        wide = x.detach().cpu()
        wide = wide.double() if wide.is_floating_point() else wide
        return wide.requires_grad_(x.requires_grad)
    return x.to("cpu") if hasattr(x, "to") else x


def gradients(case: Case) -> list[Tensor]:
    if not case.backward:
        return []
    return [x.grad.clone() for x in case.args if isinstance(x, Tensor) and x.grad is not None]


def close(got: Tensor, truth: Tensor, relative: float, what: str) -> None:
    got = got.double().cpu()
    error, size = (got - truth).norm().item(), truth.double().norm().item()
    assert error <= relative * size + 1e-6, f"{what}: error {error:.1e} of {size:.1e}"


def gate(op: str, variant: str, dry: bool) -> str:
    """ "passed", or what is wrong."""
    target = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for shape in (TINY,) if dry else (GATE, ODD):
            torch.manual_seed(0)
            check(OPS[op][variant](shape, target))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
    return "passed"


def run_case(op: str, variant: str, shape: Shape, seconds: float) -> dict:
    title, on_gpu = f"{op} {variant}".strip(), torch.cuda.is_available()
    torch.manual_seed(0)
    try:
        case = OPS[op][variant](shape, "cuda" if on_gpu else "cpu")
        if shape is TINY:  # compiling takes longer than all else
            peers = {name: fn for name, fn in case.peers.items() if name != "torch.compile"}
            case = replace(case, peers=peers)
        return measure(case, title, seconds, on_gpu)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:300]}"
        return {"case": title, **vars(shape), "not_measured": why}
    finally:
        torch.compiler.reset()
        if on_gpu:
            torch.cuda.empty_cache()


def shapes(args: argparse.Namespace) -> list[Shape]:
    if args.dry:
        return [TINY]
    return [at_tokens(QWEN, T) for T in args.tokens] if args.tokens else [QWEN]


def run(args: argparse.Namespace) -> None:
    units = [(op, shape) for shape in shapes(args) for op in args.ops]
    if not (args.dry or args.tokens):  # the larger vocabulary if there is time
        units += [(op, GEMMA) for op in args.ops if op.startswith("linear")]
    weight = [SHARE.get(op, 1) * len(OPS[op]) for op, _ in units]
    gates: dict[tuple[str, str], str] = {}
    for i, (op, shape) in enumerate(units):
        left = args.until - time.time()
        share_s = left * weight[i] / sum(weight[i:])
        now = {"event": "op", "op": op, "time": time.time(), "limit_s": 2 * share_s}
        append_row(args.rows, now)
        for variant in OPS[op]:
            key = op, variant
            if key not in gates and time.time() < args.until:
                gates[key] = gate(op, variant, args.dry)
            seconds = 0.35 * share_s / len(OPS[op])
            row = row_of(key, shape, gates.get(key, "not reached"), seconds, args)
            append_row(args.rows, {"op": op, **row})
            print(show(row), flush=True)


def row_of(
    key: tuple[str, str], shape: Shape, passed: str, seconds: float, args: argparse.Namespace
) -> dict:
    """One case, timed if its gate passed and there is time."""
    row = {"case": " ".join(key).strip(), **vars(shape)}
    if time.time() > args.until - (0 if args.dry else 5):
        row["not_measured"] = "out of time"
    elif passed != "passed":
        row["not_measured"] = f"gate: {passed}"
    else:
        row = run_case(*key, shape, seconds)
    return row | {"gate": passed}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=[])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--tune", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    head = {"event": "device", **device(), "versions": versions(), **ceilings(args.dry)}
    append_row(args.rows, head)
    print({k: v for k, v in head.items() if k != "versions"}, flush=True)
    if args.tune:
        tune.run(args.rows, args.until, args.dry)
    else:
        run(args)


if __name__ == "__main__":
    main()
