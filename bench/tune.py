"""Sweeps of what may be chosen: workspace, chunks and groups of fused ops; columns, warps, stages
of row kernels.

    python bench/gpu.py --tune --seconds 240

Rows as the bench writes them, with the setting in "case". Row kernels run on the blocks that the
fused ops give them: fp32 logits of one chunk, a bf16 gradient beside them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from reflux.kernels import _chunks, _logprob_tiles, _triton
from reflux.kernels._kl_rows import KLSpec, kl_rows
from reflux.kernels._logprob_rows import logprob_gradient_, logprob_rows
from reflux.kernels._logprob_tiles import HOPPER, Tiles
from reflux.kernels._plan import WORKSPACE_MB, Plan
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.linear_logprob import linear_logprob
from reflux.kernels.linear_nll import linear_nll

from .cases import BANDWIDTH, OPS, QWEN, TINY, Shape
from .clock import time_ms

WORKSPACES = (600, 1200, 2400, 4800)  # MiB
# rows of (chunk, group): alone as in the first version, as `plan_for` has it, and its neighbours
PLANS = {
    "linear_kl": ((768, 768), (640, 1280), (512, 2048), (384, 2304), (256, 2560), (1024, 4096)),
    "linear_nll": ((1280, 1280), (1024, 2048), (768, 2304), (512, 3072), (2048, 4096)),
}
# of head_tiles: its default and neighbours, in the shared memory and registers of sm_90
TILES = (
    HOPPER,
    HOPPER._replace(flatten=False),
    HOPPER._replace(stages=3),
    HOPPER._replace(group=8),
    HOPPER._replace(group=32),
    HOPPER._replace(depth=32, stages=6),
    HOPPER._replace(columns=128),
    HOPPER._replace(columns=128, warps=4),
    HOPPER._replace(columns=128, warps=4, stages=3, programs=2),
    HOPPER._replace(rows=64, warps=4),
    HOPPER._replace(rows=256, columns=128),
)
COLUMNS, WARPS, STAGES = (1024, 2048, 4096, 8192), (4, 8, 16), (1, 2, 3)
CHUNK = 768  # rows
Unit = tuple[str, int, Callable[[], object]]  # what, bytes that it must move or 0, one call


LOSSES: dict[str, tuple[str, Callable]] = {
    "linear_kl": ("forward", lambda *a, **o: linear_kl(*a, **o).total),
    "linear_nll": ("", lambda *a, **o: linear_nll(*a, **o).total),
}


def workspaces(shape: Shape, where: str) -> Iterator[Unit]:
    for op in LOSSES:
        call = fused(op, shape, where)
        for mb in WORKSPACES:
            yield f"{op} workspace {mb} MiB", 0, lambda call=call, mb=mb: call(mb)


def plans(shape: Shape, where: str) -> Iterator[Unit]:
    """Chunks and groups that `plan_for` did not choose; fp16, whose gradients are lifted."""
    half = replace(shape, dtype="float16")
    for op, tried in PLANS.items():
        call = fused(op, shape, where)
        for plan in tried:
            what = f"{op} chunk {plan[0]} group {plan[1]}"
            yield what, 0, with_plan(call, Plan(*plan))
        yield f"{op}_fp16", 0, fused(op, half, where)


def with_plan(call: Callable[[], object], plan: Plan) -> Callable[[], object]:
    def step():
        with patch.object(_chunks, "plan_for", lambda work, budget: plan):
            return call()

    return step


def fused(op: str, shape: Shape, where: str) -> Callable[..., object]:
    """Loss and gradients of a fused op, with a workspace in MiB."""
    variant, loss = LOSSES[op]
    case = OPS[op][variant](shape, where)
    leaves = [x for x in case.args if torch.is_tensor(x) and x.requires_grad]

    def step(mb: float = WORKSPACE_MB):
        return torch.autograd.grad(loss(*case.args, workspace_mb=mb), leaves)

    return step


def head_tiles(shape: Shape, where: str) -> Iterator[Unit]:
    """linear_logprob's forward through logits and by every setting of tiles, at both widths."""
    for D in (shape.D, shape.E):
        case = OPS["linear_logprob"]["forward only"](replace(shape, E=D), where)

        def step(fused: bool, tiles: Tiles | None = None, args=case.args):
            with (
                patch.object(_triton, "FUSED", fused),
                patch.object(_logprob_tiles, "TILES", tiles),
            ):
                return linear_logprob(*args).lse

        yield f"linear_logprob D={D} through logits", 0, lambda step=step: step(False)
        for tiles in TILES:
            setting = " ".join(f"{name} {value}" for name, value in tiles._asdict().items())
            what = f"linear_logprob D={D} fused {setting}"
            yield what, 0, lambda step=step, tiles=tiles: step(True, tiles)


def row_kernels(shape: Shape, where: str) -> Iterator[Unit]:
    """Every setting of every row kernel of a chunk."""
    rows, V = min(CHUNK, shape.T), shape.V
    z, u = (torch.randn(rows, V, device=where) for _ in range(2))
    dz = torch.empty(rows, V, device=where, dtype=torch.bfloat16)
    one, target = torch.ones(rows, device=where), torch.randint(V, (rows, 1), device=where)

    def divergence(name: str):
        return lambda: kl_rows(z, u, one, KLSpec(name, 0.5, (1.0, 1.0), 0.0, ""), dz)

    def likelihood():
        _, _, empty, *saved = logprob_rows(z, target, 1.0, False)
        return logprob_gradient_(
            z, target, (*saved, empty), (one[:, None], -one, empty), 1.0, 0.0, dz
        )

    calls = {
        "kl rows forward": (18, divergence("forward")),
        "kl rows jsd": (26, divergence("jsd")),
        "nll rows": (10, likelihood),
    }
    for name, (per_logit, call) in calls.items():
        for columns in COLUMNS:
            for warps in WARPS:
                for stages in STAGES if columns == 2048 else (3,):
                    setting = f"{columns} columns {warps} warps {stages} stages"
                    step = with_setting(call, columns, warps, stages)
                    yield f"{name} {setting}", per_logit * rows * V, step


def with_setting(call: Callable, columns: int, warps: int, stages: int) -> Callable[[], object]:
    launch = {"num_warps": warps, "num_stages": stages}

    def step():
        with patch.object(_triton, "BLOCK_V", columns), patch.dict(_triton.LAUNCH, launch):
            return call()

    return step


def measure(unit: Unit, shape: Shape, on_gpu: bool, seconds: float) -> dict:
    what, moved, step = unit
    row = {"op": "tune", "case": what, **vars(shape)}
    try:
        p20, p50, p80 = time_ms({"ours": step}, on_gpu, seconds)["ours"]
    except Exception as error:  # a setting that does not fit is a result
        return row | {"not_measured": f"{type(error).__name__}: {str(error)[:200]}"}
    floor = moved / BANDWIDTH * 1e3
    return row | {
        "ms_p20_p50_p80": {"ours": [p20, p50, p80]},
        "bytes": moved,
        "flop": 0,
        "floor_ms": floor,
        "of_floor": floor / p50,
    }


def run(rows_file: Path, until: float, dry: bool) -> None:
    from .gpu import append_row

    on_gpu, shape = torch.cuda.is_available(), TINY if dry else QWEN
    where = "cuda" if on_gpu else "cpu"
    units = [
        *workspaces(shape, where),
        *plans(shape, where),
        *head_tiles(shape, where),
        *row_kernels(shape, where),
    ]
    units = units[:: len(units) // 8] if dry else units
    best: dict[str, tuple[float, str]] = {}
    for i, unit in enumerate(units):
        left = until - time.time()
        limit = max(left, 0.0)
        append_row(rows_file, {"event": "op", "op": "tune", "time": time.time(), "limit_s": limit})
        if left < (0 if dry else 5):
            append_row(rows_file, {"op": "tune", "case": unit[0], "not_measured": "out of time"})
            continue
        row = measure(unit, shape, on_gpu, min(1.0, 0.5 * left / (len(units) - i)))
        append_row(rows_file, row)
        if "not_measured" in row:
            print(f"{row['case']}: {row['not_measured']}", flush=True)
            continue
        ms, what = row["ms_p20_p50_p80"]["ours"][1], unit[0]
        print(f"{what:<52} {ms:8.3f} ms  {100 * row['of_floor']:.0f} % of floor", flush=True)
        group = " ".join(what.split()[:3]) if "rows" in what or "D=" in what else what.split()[0]
        best[group] = min(best.get(group, (ms, what)), (ms, what))
    for group, (ms, what) in best.items():
        print(f"best of {group}: {what}, {ms:.3f} ms", flush=True)
