"""The row kernels ahead of time: machine code and C launchers, for programs without Python.

    python -m reflux.kernels._aot --out build/aot                    # sm_80, sm_90, sm_100
    python -m reflux.kernels._aot --out build/aot --arch 90 --only kl_stats

writes reflux_kernels.c and reflux_kernels.h; CMake does it with -DREFLUX_AOT=ON (CMakeLists.txt).
No GPU and no CUDA toolkit is needed to build: the launchers find the driver, libcuda.so.1, when
they run. Every variant is compiled twice: with pointers, strides and V divisible by 16, which loads
16 bytes at once, and without; the launcher looks at its arguments.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._divergence import DIVERGENCES
from ._kl_rows import kl_gradient, kl_losses, kl_stats
from ._logprob_rows import logprob_gradient, logprob_stats
from ._triton import BLOCK_V, LAUNCH, tl
from .span_sum import SPANS, STEP, _sum

ARCHITECTURES = (80, 90, 100)
FLOATS = {"f32": "*fp32", "bf16": "*bf16"}  # of logits and their gradient
C_TYPES = {"fp32": "float", "i32": "int32_t", "i64": "int64_t"}
TILE = {"R": BLOCK_V // 8, "WIDE": tl.float32}
LOGITS = {"logits", "dlogits", "z", "u", "dz"}
INTEGERS = {"V": "i32", "C": "i32", "S": "i32"}
SCALARS = {"mul_z", "mul_u", "inv_temp", "inv_cap", "beta"}
LONG_POINTERS = {"target", "order", "offset"}
HIDDEN = 2  # arguments that Triton may append: pointers to scratch memory
WIDE_ONLY = {"V", "stride_z", "stride_u", "stride_t", "stride_d"}  # and pointers: 16-byte loads


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants fixed; `name` is that of the C function."""

    name: str
    kernel: Any
    logits: str  # Triton's type of the logits
    constants: dict[str, Any]

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of every argument."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in LOGITS:
            return self.logits
        if name.startswith("stride"):
            return "i64"
        if name in SCALARS:
            return "fp32"
        return INTEGERS.get(name, "*i64" if name in LONG_POINTERS else "*fp32")

    @property
    def arguments(self) -> dict[str, str]:
        """C's type of those that a caller passes."""
        return {
            name: "void*" if kind.startswith("*") else C_TYPES[kind]
            for name, kind in self.signature.items()
            if kind != "constexpr"
        }


def variants(only: str = "") -> Iterator[Variant]:
    """Those whose names contain `only`."""
    for short, logits in FLOATS.items():
        for i, divergence in enumerate(DIVERGENCES):
            fixed = {"DIVERGENCE": i, "chosen": None, **TILE}
            yield from _named(f"kl_stats_{divergence}_{short}", kl_stats, logits, fixed, only)
            if i > 1:  # forward and reverse have their loss after the statistics
                name = f"kl_losses_{divergence}_{short}"
                yield from _named(name, kl_losses, logits, fixed, only)
            name = f"kl_gradient_{divergence}_{short}"
            yield from _named(name, kl_gradient, logits, fixed | {"CAPPED": False}, only)
        fixed = {"ENTROPY": True, "K": 1, "KB": 1, **TILE}
        yield from _named(f"logprob_stats_{short}", logprob_stats, logits, fixed, only)
        fixed |= {"CAPPED": False}
        yield from _named(f"logprob_gradient_{short}", logprob_gradient, logits, fixed, only)
    fixed = {"SPANS": SPANS, "STEP": STEP, "WIDE": tl.float32}
    yield from _named("span_sum_f32", _sum, "*fp32", fixed, only)


def _named(name: str, kernel: Any, logits: str, constants: dict, only: str) -> Iterator[Variant]:
    if only in name:
        yield Variant(name, kernel, logits, constants)


def compile_variant(variant: Variant, capability: int, aligned: bool) -> Any:
    """Triton's result for one GPU: asm["cubin"], metadata."""
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(variant.signature.items())
        if aligned and (kind.startswith("*") or name in WIDE_ONLY)
    }
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)


def declaration(variant: Variant) -> str:
    own = ", ".join(f"{kind} {name}" for name, kind in variant.arguments.items())
    return f"int reflux_{variant.name}({own}, uint32_t programs, void* stream)"


def header(found: list[Variant]) -> str:
    lines = [f"{declaration(v)};" for v in found]
    text = Path(__file__).with_name("_aot_head.h").read_text()
    return text.replace("@DECLARATIONS@", "\n".join(lines))


def source(found: list[Variant], architectures: list[int]) -> str:
    """The C file: machine code as arrays, a table of them for each function, the functions."""
    parts = [Path(__file__).with_name("_aot_launch.c").read_text()]
    for variant in found:
        rows = []
        for capability in architectures:
            for aligned in (True, False):
                built = compile_variant(variant, capability, aligned)
                array = f"{variant.name}_{capability}_{'aligned' if aligned else 'any'}"
                values = ",".join(str(byte) for byte in built.asm["cubin"])
                parts.append(f"static const unsigned char {array}[] = {{{values}}};")
                rows.append(_row(built, array, capability, aligned, len(variant.arguments)))
        table = f"static Code {variant.name}_codes[] = {{\n" + "\n".join(rows) + "\n};"
        parts += [table, _function(variant)]
    return "\n".join(parts) + "\n"


def _row(built: Any, array: str, capability: int, aligned: bool, own: int) -> str:
    """Triton appends pointers to scratch memory that these kernels do not use: passed as null."""
    meta = built.metadata
    if meta.global_scratch_size or getattr(meta, "profile_scratch_size", 0):
        raise ValueError(f"{array} wants scratch memory, which its launcher does not have")
    entry = built.asm["ptx"].partition(".entry")[2].partition(")")[0]
    if not own <= entry.count(".param ") <= own + HIDDEN:
        raise ValueError(f"{array} takes {entry.count('.param ')} arguments; want {own}, {own + 2}")
    threads = 32 * meta.num_warps
    return (
        f'    {{{capability}, {int(aligned)}, {array}, "{meta.name}", {threads}, {meta.shared}, '
        "{0}, {0}},"
    )


def _function(variant: Variant) -> str:
    wide = [
        f"(uintptr_t){name}"
        for name, kind in variant.arguments.items()
        if kind == "void*" or name in WIDE_ONLY
    ]
    own = ", ".join(f"&{name}" for name in variant.arguments)
    return (
        f"{declaration(variant)} {{\n"
        f"    uintptr_t bits = {' | '.join(wide)};\n"
        f"    void* nothing = 0;\n"
        f"    void* arguments[] = {{{own}, &nothing, &nothing}};\n"
        f"    return launch({variant.name}_codes, "
        f"sizeof({variant.name}_codes) / sizeof(Code), bits % 16 == 0, arguments, "
        f"programs, stream);\n}}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="80")
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    options = parser.parse_args()
    found = list(variants(options.only))
    if not found:
        raise SystemExit(f"--only {options.only}: no such kernel; e.g. kl_stats_forward_bf16")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reflux_kernels.h").write_text(header(found))
    (options.out / "reflux_kernels.c").write_text(source(found, options.arch))
    print(f"{len(found)} functions for sm_{', sm_'.join(map(str, options.arch))} in {options.out}")


if __name__ == "__main__":
    main()
