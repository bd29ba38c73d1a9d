"""Times functions against each other: interleaved rounds, cold L2, quantiles, peak memory."""

import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 * 2**20  # five times an H200's L2
Step = Callable[[], object]


def _one_ms(fn: Step, flush: torch.Tensor | None) -> float:
    if flush is None:  # a CPU's cores are shared: the time of this process
        start = time.process_time()
        fn()
        return (time.process_time() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_ms(
    functions: dict[str, Step], on_gpu: bool, seconds: float = 4.0
) -> dict[str, list[float]]:
    """{name: [p20, p50, p80]} in ms; on a CPU those of the process, over all its threads.

    Every round runs all functions, in forward and backward order by turns. 3 to 50 rounds, as many
    as fit into `seconds` after a warm-up round that is not counted.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if on_gpu else None
    for _ in range(2 if on_gpu else 1):  # the first call compiles, the second is what a round costs
        start = time.perf_counter()
        for fn in functions.values():
            fn()
        if on_gpu:
            torch.cuda.synchronize()
        round_s = time.perf_counter() - start
    seen: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(max(3, min(50, int(seconds / round_s)))):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            seen[name].append(_one_ms(functions[name], flush))
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: torch.tensor(ms, dtype=torch.float64).quantile(at).tolist()
        for name, ms in seen.items()
    }


def peak_mib(fn: Step) -> float:
    """Peak GPU memory in MiB above what was allocated: workspace, temporaries and gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def roofline_now() -> dict[str, float]:
    """What this GPU gives in this run: bf16 matmul TFLOP/s at 8192 cubed, copy GB/s of 2 GiB."""
    # zeros would run faster
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**31, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    ms = time_ms({"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)}, on_gpu=True)
    return {
        "matmul_tflops": 2 * 8192**3 / ms["matmul"][1] / 1e9,
        "copy_gbps": 2 * x.numel() / ms["copy"][1] / 1e6,
    }


def gemm_gflops() -> float:
    """fp32, on the threads that torch has, at the width of the CPU's cases."""
    a, b = torch.randn(256, 128), torch.randn(128, 4096)
    ms = time_ms({"gemm": lambda: a @ b}, on_gpu=False, seconds=0.5)["gemm"][1]
    return 2 * 256 * 128 * 4096 / ms / 1e6


def ceilings(dry: bool) -> dict[str, dict[str, float]]:
    """TFLOP/s of the GEMMs of one chunk, by rows: fp32 logits out, dhidden, fp32 dhead added to.

    At V = 151,936 and D = 2048: which chunk a fused op wants. On a CPU, or dry, nothing.
    """
    if dry or not torch.cuda.is_available():
        return {}
    V, D, rates = 151_936, 2048, {}
    head = torch.randn(V, D, device="cuda", dtype=torch.bfloat16)
    total = torch.zeros(V, D, device="cuda")
    for rows in (512, 768, 1024, 2048):
        hidden = torch.randn(rows, D, device="cuda", dtype=torch.bfloat16)
        logits = torch.empty(rows, V, device="cuda")
        d = torch.randn(rows, V, device="cuda", dtype=torch.bfloat16)
        calls: dict[str, Step] = {
            "logits": lambda h=hidden, z=logits: torch.mm(
                h, head.t(), out_dtype=torch.float32, out=z
            ),
            "dhidden": lambda d=d: d @ head,
            "dhead": lambda d=d, h=hidden: torch.addmm(
                total, d.t(), h, out_dtype=torch.float32, out=total
            ),
        }
        ms = time_ms(calls, on_gpu=True, seconds=0.5)
        rates[f"chunk_{rows}_tflops"] = {
            name: 2 * rows * V * D / p50 / 1e9 for name, (_, p50, _) in ms.items()
        }
    return rates
