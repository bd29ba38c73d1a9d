"""What a calibration would take on H100s, on paper: time, memory and H100-hours of a step from
counted FLOPs and bytes. Nothing in it was timed on a GPU; `python -m bench.scale` prints the tables
of docs/scale.md, `--write` puts them there.

    step     = sampling + scoring + training; the parts do not overlap
    sampling   prefill + decode steps x max(bytes of weights and KV cache / bandwidth, launches)
    scoring    one forward of the proxy, one of the reference with its whole head
    training   forward, backward, one recomputed forward (full activation checkpointing), the exact
               reference KL's heads; FSDP2's transfers hide behind compute as far as they fit
    optimizer  bytes of fp32 weights, gradients and two moments / bandwidth

The work of a calibration is fixed: 300 steps of 256 responses. More GPUs than responses in a step
make steps larger and fewer. Units: seconds, bytes, FLOP, tokens.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
REPORTED_HOURS = 141.5  # H100-hours: appendix E of arXiv:2604.18963 as others quote it
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A dense decoder, by its config.json."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    window: int = 0  # of sliding-window layers, five of six; 0: none

    @property
    def block(self) -> int:
        """Parameters of the layers."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head(self) -> int:
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        return self.block + self.head * (1 if self.tied else 2)

    def kv_bytes(self, length: float) -> float:
        """bf16 keys and values of one text."""
        return 4.0 * self.kv_heads * self.head_dim * self._positions(length)

    def forward_flop(self, tokens: float, length: float, *, head: bool = True) -> float:
        """Of `tokens` tokens in texts of `length`: GEMMs, and causal attention."""
        gemm = 2.0 * tokens * (self.block + (self.head if head else 0))
        # a position sees half of its text on average, or its window
        return gemm + 4.0 * tokens * self.heads * self.head_dim * self._positions(length / 2)

    def _positions(self, length: float) -> float:
        """Positions kept or seen, summed over layers."""
        if not self.window:
            return self.layers * length
        return self.layers * (length + 5 * min(length, self.window)) / 6


QWEN3_8B = Model("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, False)
QWEN3_06B = Model("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151936, True)
QWEN3_32B = Model("Qwen3-32B", 64, 5120, 64, 8, 128, 25600, 151936, False)
GEMMA3_12B = Model("Gemma-3-12B", 48, 3840, 16, 8, 256, 15360, 262208, True, window=1024)
GEMMA3_1B = Model("Gemma-3-1B", 26, 1152, 4, 1, 256, 6912, 262144, True, window=512)
PAIRS = ((QWEN3_8B, QWEN3_06B), (GEMMA3_12B, GEMMA3_1B), (QWEN3_32B, QWEN3_06B))


@dataclass(frozen=True)
class Machine:
    """An H100 SXM by its data sheet, and what is assumed to be reached of it."""

    peak_flop: float = 989e12  # bf16, dense
    memory: float = 80e9
    bandwidth: float = 3.35e12
    inside: float = 450e9  # NVLink, one direction
    between: float = 50e9  # 400 Gbit/s a GPU
    node: int = 8
    gemm_reached: float = 0.55  # of peak, whole steps of large models
    memory_reached: float = 0.7
    link_reached: float = 0.7
    launch: float = 10e-6  # host time of an eager op, which a decode step waits for
    ops_per_layer: int = 53  # eager ops of a layer and decode step, counted in our decoder


@dataclass(frozen=True)
class Work:
    """A calibration as configs/paper sets it."""

    steps: int = 300
    responses: int = 256
    prompt: int = 200  # tokens
    response: int = 1024  # the longest; lengths below are the mean
    mean: int = 500
    rows: int = 16384  # tokens of a micro-batch


@dataclass(frozen=True)
class Plan:
    """One row of a table."""

    gpus: int
    responses: int
    sample_s: float
    score_s: float
    train_s: float
    memory_gib: float
    hours: float  # H100-hours of the whole calibration
    tokens_per_s: float  # response tokens, all GPUs

    @property
    def step_s(self) -> float:
        return self.sample_s + self.score_s + self.train_s


def plan(policy: Model, proxy: Model, gpus: int, *, engine: bool, m: Machine, w: Work) -> Plan:
    """A calibration on `gpus` GPUs. engine: texts by an inference engine with captured decode steps
    and its own tensor parallelism; else the embedded sampler, eager, a whole copy on every rank.
    """
    responses = max(w.responses, gpus)
    mine = responses / gpus
    shards = gpus if gpus <= 32 else 32  # HSDP beyond: replicas of 32
    tensor = _tensor_degree(policy, m) if engine else 1
    sample = _sampling(policy, mine * tensor, tensor, engine, m, w)
    text = w.prompt + w.mean
    tokens = mine * text
    compute = m.peak_flop * m.gemm_reached
    score = (proxy.forward_flop(tokens, text) + 2.0 * tokens * policy.block) / compute
    train = _training(policy, tokens, text, shards, m, w)
    steps = w.steps * w.responses / responses
    total_s = steps * (sample + score + train)
    return Plan(
        gpus,
        responses,
        sample,
        score,
        train,
        _memory(policy, proxy, mine * tensor, tensor, shards, w) / GIB,
        total_s * gpus / 3600,
        responses * w.mean / (sample + score + train),
    )


def _tensor_degree(model: Model, m: Machine) -> int:
    """The smallest whose part of the bf16 weights leaves half of the memory."""
    return next(t for t in (1, 2, 4, 8) if 2 * model.parameters / t <= m.memory / 2)


def _sampling(model: Model, rows: float, tensor: int, engine: bool, m: Machine, w: Work) -> float:
    """Seconds for the texts of one engine of `tensor` GPUs, or of one rank."""
    prefill = model.forward_flop(rows * w.prompt, w.prompt, head=False)
    prefill_s = prefill / (tensor * m.peak_flop * m.gemm_reached)
    read = 2.0 * (model.block + model.head) + rows * model.kv_bytes(w.prompt + w.mean / 2)
    read_s = read / (tensor * m.bandwidth * m.memory_reached)
    # rows leave when they end: the weights are read for the longest text, the rest for the mean
    launches = 0.0 if engine else model.layers * m.ops_per_layer * m.launch
    return prefill_s + w.response * max(read_s, launches)


def _training(model: Model, tokens: float, text: float, shards: int, m: Machine, w: Work) -> float:
    compute = m.peak_flop * m.gemm_reached
    layers = 4 * model.forward_flop(tokens, text, head=False)  # forward, backward 2, recomputed
    response = tokens * w.mean / text
    heads = 2.0 * response * model.head * (3 + 1 + 1)  # policy's three, reference, old log-probs
    batches = max(1, math.ceil(tokens / w.rows))
    link = m.inside if shards <= m.node else m.between
    # gathered for forward, backward and the reference, gradients scattered in fp32
    moved = batches * (3 * 2.0 + 4.0) * model.parameters * (shards - 1) / shards
    optimizer = 32.0 * model.parameters / shards / (m.bandwidth * m.memory_reached)
    return max((layers + heads) / compute, moved / (link * m.link_reached)) + optimizer


def _memory(policy: Model, proxy: Model, rows: float, tensor: int, shards: int, w: Work) -> float:
    """The largest of sampling and training on one GPU."""
    state = 16.0 * policy.parameters / shards
    frozen = 2.0 * (policy.parameters + proxy.parameters) / shards
    cache = rows * policy.kv_bytes(w.prompt + w.response) / tensor
    sampling = 2.0 * policy.parameters / tensor + cache
    layer = 2.0 * policy.block / policy.layers
    activations = w.rows * policy.width * 2.0 * (policy.layers + 20) + 2 * layer
    heads = 2.0 * policy.head * 2 + 1.5 * GIB  # gathered, policy and reference; workspace
    return state + frozen + max(sampling, activations + heads)


def table(policy: Model, proxy: Model, m: Machine, w: Work) -> str:
    lines = [
        f"### {policy.name} ({policy.parameters / 1e9:.1f} B), proxy {proxy.name} "
        f"({proxy.parameters / 1e9:.2f} B)",
        "| GPUs | responses a step | engine: step s | tokens/s | GiB | H100-h | embedded: step s | "
        "sampling | GiB | H100-h |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for gpus in GPUS:
        a, b = (plan(policy, proxy, gpus, engine=e, m=m, w=w) for e in (True, False))
        lines.append(
            f"| {gpus} | {a.responses} | {a.step_s:.1f} | {a.tokens_per_s:,.0f} | {_fits(a, m)} | "
            f"{a.hours:.0f} | {b.step_s:.1f} | {b.sample_s / b.step_s:.0%} | {_fits(b, m)} | "
            f"{b.hours:.0f} |"
        )
    return "\n".join(lines)


def _fits(p: Plan, m: Machine) -> str:
    return f"{p.memory_gib:.0f}" if p.memory_gib * GIB <= m.memory else f"**{p.memory_gib:.0f}**"


def page_part() -> str:
    """The part of docs/scale.md between its two marks."""
    m, w = Machine(), Work()
    short, long = plan(*PAIRS[0], 8, engine=True, m=m, w=w), Work(response=8192, mean=4000)
    parts = [table(*pair, m, w) for pair in PAIRS]
    rows = [
        f"| {name} | {a.hours:.0f} | {b.hours:.0f} |"
        for name, work in (("1,024 (mean 500)", w), ("8,192 (mean 4,000)", long))
        for a, b in [[plan(*PAIRS[0], 8, engine=e, m=m, w=work) for e in (True, False)]]
    ]
    parts.append(
        "### Longer texts, Qwen3-8B on 8 GPUs\n"
        "| longest response | H100-h, engine | H100-h, embedded |\n|---|--:|--:|\n"
        + "\n".join(rows)
    )
    parts.append(
        f"The paper's calibration is said to have taken {REPORTED_HOURS} H100-hours (appendix E, "
        "as others quote it; we did not see it, and do not know pair and lengths). Qwen3-8B on 8 "
        f"GPUs is {short.hours:.0f} here."
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if not parser.parse_args().write:
        print(page_part())
        return
    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?s)(<!-- model -->\n).*(\n<!-- end -->)", _filled, text))


def _filled(match: re.Match) -> str:
    return match[1] + page_part() + match[2]


if __name__ == "__main__":
    main()
