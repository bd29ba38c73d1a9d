"""Compile every kernel to a cubin for the GPUs we support, without one, and read the machine code.

    python tests/compile_for_gpus.py            # every configuration for sm_80, sm_90, sm_100
    python tests/compile_for_gpus.py --quick    # every configuration for sm_90, one of each kernel
                                                # for the others; reads PTX where it shows the same
    python tests/compile_for_gpus.py --only kl  # kernels with kl in their names
    python tests/compile_for_gpus.py --record   # and write a record, named by date and triton

Catches what the interpreter forgives: type errors, branches that do not compile, spills, fp64
slipping in, 4-byte loads where 16-byte ones were meant, a barrier that went missing. Registers may
not grow by more than SLACK over the newest record of the same Triton version: if a growth is
intended, record it. A new configuration may use MAX_REGISTERS.

Another Triton beside the installed one; the kernels' tests run under it in the same way, without
any GPU:

    # its interpreter wants the older numpy
    pip install --no-deps --target build/triton36 triton==3.6.0 'numpy<2.4'
    PYTHONPATH=build/triton36 python tests/compile_for_gpus.py --record
    PYTHONPATH=build/triton36 python -m pytest tests/kernels/test_token_kl.py
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reflux.kernels._class_rows import CLASSES, LONG, class_backward, class_sums, long_class_sums
from reflux.kernels._class_rows import STEP as CLASS_STEP
from reflux.kernels._kl_rows import kl_gradient, kl_losses, kl_stats
from reflux.kernels._logprob_rows import logprob_gradient, logprob_stats
from reflux.kernels._logprob_tiles import (
    AMPERE,
    HOPPER,
    MERGE_ROWS,
    MERGE_TILES,
    Tiles,
    head_tiles,
    merge_tiles,
)
from reflux.kernels._topk_rows import topk_gradient, topk_lift, topk_terms
from reflux.kernels._triton import BLOCK_V, LAUNCH
from reflux.kernels.renormalised_topk_kl import ROWS, gather_dot, gather_rows, sum_pairs
from reflux.kernels.span_sum import SPANS, STEP, _sum

TILE = dict(R=BLOCK_V // 8, WIDE=tl.float32)
GATHER = dict(DB=BLOCK_V // 8, WIDE=tl.float32)
SCALARS = dict(
    V="i32",
    N="i32",
    grad_scale="fp32",
    C="i32",
    mul_z="fp32",
    mul_u="fp32",
    chosen="*i1",
    K="i32",
    S="i32",
    D="i32",
    inv_temp="fp32",
    inv_cap="fp32",
    into_cap="fp32",
    cap="fp32",
    T="i32",
    beta="fp32",
)


def product(tiles: Tiles, **constants) -> dict:
    """Constants of `head_tiles`, and its launch options: by descriptors but on AMPERE."""
    blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_D": tiles.depth}
    launched = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    tma = tiles is HOPPER
    strides = {} if tma else {"stride_d": 1, "stride_w": 1}
    return (
        blocks
        | launched
        | strides
        | {"GROUP": tiles.group, "FLATTEN": tiles.flatten, "TMA": tma, "UPCAST": False, **constants}
    )


LOGITS = {"logits", "dlogits", "z", "u", "dz", "x", "w", "dx", "dhead"}
# kernel, what the name adds, dtype of the logits (or of them / of their gradient), constants,
# barriers
CASES = [
    (_sum, "", "*fp32", dict(SPANS=SPANS, STEP=STEP, WIDE=tl.float32), 0),
    (logprob_stats, "entropy", "*bf16", dict(ENTROPY=True, KB=1, **TILE), 0),
    (logprob_stats, "", "*fp32", dict(ENTROPY=False, KB=1, **TILE), 0),
    (logprob_stats, "K 64", "*fp32", dict(ENTROPY=True, KB=64, **TILE), 0),
    (logprob_gradient, "entropy", "*bf16", dict(ENTROPY=True, CAPPED=False, KB=1, **TILE), 2),
    (logprob_gradient, "", "*fp32", dict(ENTROPY=False, CAPPED=False, KB=1, **TILE), 2),
    (logprob_gradient, "", "*fp32/*fp16", dict(ENTROPY=False, CAPPED=False, KB=1, **TILE), 2),
    (
        logprob_gradient,
        "K 64 entropy capped",
        "*fp32",
        dict(ENTROPY=True, CAPPED=True, KB=64, **TILE),
        2,
    ),
    *(
        (kl_stats, divergence, "*fp32", dict(DIVERGENCE=i, chosen=None, **TILE), 0)
        for i, divergence in enumerate(("forward", "reverse", "jsd"))
    ),
    (kl_stats, "forward rows", "*bf16", dict(DIVERGENCE=0, **TILE), 0),
    *(
        (kl_losses, divergence, "*fp32", dict(DIVERGENCE=i, chosen=None, **TILE), 0)
        for i, divergence in ((2, "jsd"), (3, "skew_forward"), (4, "skew_reverse"))
    ),
    *(
        (
            kl_gradient,
            divergence,
            "*fp32",
            dict(DIVERGENCE=i, chosen=None, CAPPED=i == 1, **TILE),
            0,
        )
        for i, divergence in enumerate(
            ("forward", "reverse capped", "jsd", "skew_forward", "skew_reverse")
        )
    ),
    (kl_gradient, "forward rows", "*bf16", dict(DIVERGENCE=0, CAPPED=False, **TILE), 0),
    (kl_gradient, "jsd", "*fp32/*bf16", dict(DIVERGENCE=2, chosen=None, CAPPED=False, **TILE), 0),
    (kl_gradient, "fwd", "*fp32/*fp16", dict(DIVERGENCE=0, chosen=None, CAPPED=False, **TILE), 0),
    (topk_lift, "K 64", "*fp32", dict(KB=64, **TILE), 2),
    (topk_lift, "K 1024", "*bf16", dict(KB=1024, **TILE), 2),
    *(
        (
            topk_terms,
            f"K 64 {divergence} {tail}",
            "*fp32",
            dict(DIVERGENCE=i, TAIL=j, CAPPED=j == 1, KB=64, WIDE=tl.float32),
            0,
        )
        for i, divergence, j, tail in (
            (0, "forward", 0, "bucket"),
            (1, "reverse", 0, "bucket"),
            (2, "jsd", 1, "renorm"),
            (3, "skew_forward", 0, "bucket"),
            (4, "skew_reverse", 1, "renorm"),
            (0, "forward", 3, "sampled"),
        )
    ),
    (
        topk_terms,
        "K 1024 jsd bucket",
        "*fp32",
        dict(DIVERGENCE=2, TAIL=0, CAPPED=True, KB=1024, WIDE=tl.float32),
        0,
    ),
    (topk_gradient, "K 64", "*fp32/*bf16", dict(CAPPED=False, KB=64, **TILE), 1),
    (topk_gradient, "K 64", "*fp32/*fp16", dict(CAPPED=False, KB=64, **TILE), 1),
    (topk_gradient, "K 1024 capped", "*fp32", dict(CAPPED=True, KB=1024, **TILE), 1),
    *(
        (kernel, "", "*bf16", dict(stride_w=1, KB=ROWS, **GATHER), 0)
        for kernel in (gather_dot, gather_rows)
    ),
    *(
        (kernel, "", "*fp32", dict(stride_w=1, KB=ROWS, **GATHER), 0)
        for kernel in (gather_dot, gather_rows)
    ),
    *((sum_pairs, "", dtype, dict(NB=ROWS, **GATHER), 0) for dtype in ("*bf16", "*fp32")),
    (
        class_sums,
        "",
        "*fp32",
        dict(CLASSES=CLASSES, STEP=CLASS_STEP, LONG=LONG, WIDE=tl.float32),
        0,
    ),
    (long_class_sums, "", "*fp32", TILE, 0),
    (class_backward, "", "*fp32", dict(CAPPED=False, **TILE), 0),
    (class_backward, "capped", "*fp32/*bf16", dict(CAPPED=True, **TILE), 0),
    (
        head_tiles,
        "descriptors",
        "*bf16",
        product(HOPPER, ENTROPY=False, CAPPED=False, K=1, bias=None),
        0,
    ),
    (head_tiles, "K entropy capped", "*fp16", product(HOPPER, ENTROPY=True, CAPPED=True), 0),
    (head_tiles, "pointers", "*bf16", product(AMPERE, ENTROPY=True, CAPPED=False, bias=None), 0),
    (merge_tiles, "", "*fp32", dict(ENTROPY=True, ROWS=MERGE_ROWS, STEP=MERGE_TILES), 0),
]


def signature_of(kernel, logits: str, constants: dict) -> dict[str, str]:
    """The types the launcher would find, by the argument's name."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in LOGITS:
            return logits.split("/")[-1 if name.startswith("d") else 0]
        if name in ("hidden", "head") and constants["TMA"]:
            side = constants["BLOCK_M" if name == "hidden" else "BLOCK_N"]
            return f"tensordesc<{logits[1:]}[{side}, {constants['BLOCK_D']}]>"
        if name in ("hidden", "head", "bias"):
            return logits
        if name in ("target", "order", "offset", "first", "long"):
            return "*i64"
        if name in ("ids", "column_class"):
            return "*i32"
        return "i64" if name.startswith("stride") else SCALARS.get(name, "*fp32")

    return {name: type_of(name) for name in kernel.arg_names}


ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench/records"
ARCHITECTURES = (90, 80, 100)  # the first one is compiled in full even with --quick
FIRST_WITH_TMA = 90
# of a thread of a row kernel: 65,536 on a multiprocessor still hold two programs of 8 warps
MAX_REGISTERS = 128
GEMM_REGISTERS = 255  # of 8 warps that have a multiprocessor to themselves
SLACK = 8  # registers are handed out in eights
MAX_SHARED = 227 * 1024  # bytes one program may own on sm_90; a row kernel uses a few hundred
# in SASS, in PTX
WIDE = r"\bLDG(?:STS)?\.E[.\w]*\.(?:128|256)\b|\bld\.global[.:\w]*\.(?:v[48]\.b32|v[24]\.b64)\b"
DOUBLE = r"\b(?:D(?:ADD|FMA|MUL|SETP|MNMX)|\w+(?:\.\w+)*\.F64)\b|\.f64\b"
TENSOR_CORES = {  # a GEMM without them, or with those of an older GPU, is slow
    80: r"\bHMMA\b|\bmma\.sync\b",
    90: r"\bHGMMA\b|\bwgmma\.mma_async\b",
    100: r"\bUTC\w*MMA\b|\btcgen05\.mma\b",
}
BULK_COPY = r"\bUTMALDG\b|\bcp\.async\.bulk\.tensor\b"  # by a tensor descriptor
SPILL = r"\b(?:STL|LDL)\b"


def compile_for(kernel, logits: str, constants: dict, capability: int):
    """What the launcher would build: pointers, strides and sizes divisible by 16, as if padded."""
    options = LAUNCH | {k: v for k, v in constants.items() if k.startswith("num_")}
    constants = {k: v for k, v in constants.items() if k not in options}
    signature = signature_of(kernel, logits, constants)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, type_ in enumerate(signature.values())
        if type_.startswith(("*", "i"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read_cubin(cubin: bytes, *what: str) -> tuple[dict[str, int], str]:
    """Resource usage by name (REG, STACK, ...), and the machine code if what is "-sass"."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run(
            [tool, "-res-usage", *what, f.name], capture_output=True, text=True, check=True
        ).stdout
    usage = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(number) for name, number in re.findall(r"(\w+)(?:\[0\])?:(\d+)", usage)}, text


def measure(
    kernel, what: str, logits: str, constants: dict, capability: int, quick: bool = False
) -> dict:
    """One line of the table."""
    built = compile_for(kernel, logits, constants, capability)
    usage, code = read_cubin(built.asm["cubin"], *([] if quick else ["-sass"]))
    code = built.asm["ptx"] if quick else code
    return {
        "kernel": kernel.__name__,
        "configuration": f"{what} {logits[1:]}".strip(),
        "arch": f"sm_{capability}",
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage.get("LOCAL", 0),
        "shared": built.metadata.shared,
        "wide_loads": len(re.findall(WIDE, code)),
        "spills": len(re.findall(SPILL, code)),
        "double": len(re.findall(DOUBLE, code)),
        "barriers": built.asm["ttir"].count("barrier"),
        "tensor_cores": len(re.findall(TENSOR_CORES[capability], code)),
        "bulk_copies": len(re.findall(BULK_COPY, code)),
    }


def broken_rules(
    row: dict, streams_rows: bool, barriers: int, bound: int, tma: bool | None = None
) -> list[str]:
    """What is wrong with it, in words. barriers: those of the source, before the compiler's own.

    tma: of a GEMM, whether its operands come by tensor descriptors; None for what is none.
    """
    rules = []
    if row["stack"] or row["spills"]:
        rules.append("spills to memory: use a smaller block or more warps")
    if row["double"]:
        rules.append("computes in fp64: a Python float or a constant was promoted")
    if streams_rows and not row["wide_loads"]:
        rules.append("reads its rows without 16-byte loads: a mask or stride not divisible by 16?")
    if row["shared"] > MAX_SHARED:
        rules.append(f"wants more shared memory than {MAX_SHARED} bytes")
    if row["registers"] > bound:
        rules.append(f"uses more than {bound} registers: if that is intended, run with --record")
    if tma is not None and not row["tensor_cores"]:
        rules.append(
            "multiplies without this GPU's tensor cores: a layout or dtype they do not take?"
        )
    if tma and not row["bulk_copies"]:
        rules.append("does not copy by its tensor descriptors")
    if row["barriers"] < barriers:
        rules.append(
            f"has {row['barriers']} barriers, want {barriers}: other threads' stores would be read "
            "early"
        )
    return [f"{row['kernel']} ({row['configuration']}, {row['arch']}) {rule}" for rule in rules]


def recorded_bounds() -> dict[tuple[str, str, str], int]:
    """Registers of (kernel, configuration, arch) in this Triton's newest record, with slack."""
    records = sorted(RECORDS.glob(f"*_compile_gate_triton{triton.__version__}.json"))
    rows = json.loads(records[-1].read_text())["rows"] if records else []
    return {(r["kernel"], r["configuration"], r["arch"]): r["registers"] + SLACK for r in rows}


def write_record(rows: list[dict]) -> None:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    if git("status", "--porcelain", "--", "kernels", "tests/compile_for_gpus.py"):
        sys.exit(
            "kernels/ has uncommitted changes; commit first, then --record: a record names the "
            "commit that it measured"
        )
    path = RECORDS / f"{datetime.date.today()}_compile_gate_triton{triton.__version__}.json"
    head = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "command": "python tests/compile_for_gpus.py --record",
        "triton": triton.__version__,
        "launch": LAUNCH,
        "gate": "no spill, no fp64, 16-byte loads in row kernels, barriers as in the source",
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}]}}\n')
    print(f"wrote {path.relative_to(ROOT)}")


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", (
        "unset TRITON_INTERPRET: interpreted kernels do not compile"
    )
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    bounds = {} if options.record else recorded_bounds()
    rows, broken, seen = [], [], set()
    for kernel, what, logits, constants, barriers in CASES:
        if options.only not in kernel.__name__:
            continue
        tma = constants.get("TMA")
        for capability in ARCHITECTURES:
            if tma and capability < FIRST_WITH_TMA:
                continue
            if options.quick and capability != ARCHITECTURES[0] and (kernel, capability) in seen:
                continue
            seen.add((kernel, capability))
            row = measure(kernel, what, logits, constants, capability, options.quick)
            most = MAX_REGISTERS if tma is None else GEMM_REGISTERS
            bound = bounds.get((row["kernel"], row["configuration"], row["arch"]), most)
            broken += broken_rules(row, bool(LOGITS & set(kernel.arg_names)), barriers, bound, tma)
            rows.append(row)
            gemm = () if tma is None else ("tensor_cores", "bulk_copies")
            print(
                " ".join(
                    f"{row[k]:<{n}}"
                    for k, n in (("arch", 6), ("kernel", 22), ("configuration", 22))
                ),
                " ".join(
                    f"{k} {row[k]:<4}"
                    for k in ("registers", "stack", "shared", "wide_loads", "barriers", *gemm)
                ),
                flush=True,
            )
    if broken:
        sys.exit("\n".join(broken))
    if options.record:
        write_record(rows)


if __name__ == "__main__":
    main()
