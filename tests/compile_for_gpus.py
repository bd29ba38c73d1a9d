"""Compile every kernel to a cubin for the GPUs we support, on a machine that has none.

    python tests/compile_for_gpus.py

Catches what the interpreter forgives: type errors, branches that do not compile, spills. Prints registers and stack. A
stack above 0 is a spill and fails, as does a missing barrier where a kernel reads what other threads wrote.
"""
import os
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reflux.kernels._kl_rows import kl_sweeps
from reflux.kernels._logprob_rows import logprob_backward, logprob_forward
from reflux.kernels._topk_rows import topk_sweeps
from reflux.kernels._triton import BLOCK_V, LAUNCH
from reflux.kernels.span_sum import SPANS, STEP, _sum

TILE = dict(R=BLOCK_V // 8, WIDE=tl.float32)
SCALARS = dict(V="i32", K="i32", S="i32", inv_temp="fp32", inv_cap="fp32", beta="fp32")
LOGITS = {"logits", "dlogits", "z", "u", "dz"}
CASES = [  # kernel, what the name adds, dtype of the logits, constants, barriers
    (_sum, "", "*fp32", dict(SPANS=SPANS, STEP=STEP, WIDE=tl.float32), 0),
    (logprob_forward, "K 1", "*bf16", dict(ENTROPY=True, KB=1, **TILE), 0),
    (logprob_forward, "K 64", "*fp32", dict(ENTROPY=False, KB=64, **TILE), 0),
    (logprob_backward, "K 1", "*bf16", dict(ENTROPY=True, CAPPED=False, KB=1, **TILE), 2),
    (logprob_backward, "K 64 capped", "*fp32", dict(ENTROPY=True, CAPPED=True, KB=64, **TILE), 2),
    *((kl_sweeps, mode, "*fp32", dict(MODE=i, GRADIENT=True, CAPPED=i == 1, **TILE), 0)
      for i, mode in enumerate(("forward", "reverse", "jsd", "skew_forward", "skew_reverse"))),
    (kl_sweeps, "forward bf16", "*bf16", dict(MODE=0, GRADIENT=True, CAPPED=False, **TILE), 0),
    *((topk_sweeps, tail, "*fp32", dict(MODE=2 * (i < 2), TAIL=i, GRADIENT=True, CAPPED=i == 0, KB=64, **TILE), 3)
      for i, tail in enumerate(("ghost", "renorm", "drop", "sampled"))),
]


def signature_of(kernel, logits: str, constants: dict) -> dict[str, str]:
    """The types the launcher would find, by the argument's name."""
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in LOGITS:
            return logits
        if name in ("target", "order", "offset"):
            return "*i64"
        return "*i32" if name == "ids" else "i64" if name.startswith("stride") else SCALARS.get(name, "*fp32")

    return {name: type_of(name) for name in kernel.arg_names}


def resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        out = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True)
    return next(line.strip() for line in out.stdout.splitlines() if "REG:" in line)


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET: interpreted kernels do not compile"
    for kernel, what, logits, constants, barriers in CASES:
        signature = signature_of(kernel, logits, constants)
        aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values())
                   if type_.startswith(("*", "i"))}
        for capability in (80, 90, 100):
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
            used = resources(built.asm["cubin"])
            print(f"sm_{capability:<3} {kernel.__name__:<16} {what:<14} {used.split('SHARED')[0]}", flush=True)
            assert "STACK:0 " in used, "spills to memory: use a smaller block or more warps"
            found = built.asm["ptx"].count("bar.sync") + built.asm["ptx"].count("barrier.sync")
            assert found >= barriers, f"{found} barriers, want {barriers}: other threads' stores would be read early"


if __name__ == "__main__":
    main()
