"""What LoRA saves and costs: seconds and peak memory of a step with a reference KL, against
training every weight, on a small random llama on this machine's CPU.

    python -m bench.lora FOLDER        # makes the model in FOLDER, writes a record to bench/records

Each arm is a process of its own; arms take turns, and the first step of each is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .records import device, write

ARMS = {"full": 0, "lora": 16}  # rank
SHAPE = dict(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
ROWS, LENGTH, STEPS, TURNS = 4, 128, 4, 2


def make_model(folder: Path) -> None:
    """Random weights, and a tokenizer of three words that nothing is read with."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", dtype="float32", **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    Tokenizer(models.WordLevel(words, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def config_of(folder: Path, rank: int) -> Any:
    from reflux.trainer.config.loader import fill
    from reflux.trainer.config.schema import Config

    table = {
        "phase": "calibrate",
        "folder": str(folder / f"run-{rank}"),
        "steps": STEPS,
        "model": {"path": str(folder / "model")},
        "lora": {"rank": rank},
        "optim": {"lr": 1e-6},
        "reference": {"dtype": "float32"},
        "data": {"source": "none"},
        "task": {"name": "exact"},
        "training": {"seq_len": LENGTH, "mixed_precision_param": "float32"},
        "checkpoint": {"enable": False},
    }
    return fill(Config, table, "bench")


def run_arm(folder: Path, rank: int) -> dict:
    """Seconds of each step but the first, and this process' peak resident memory."""
    import resource

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29871")
    from reflux.trainer.config.phases import roles
    from reflux.trainer.engine.engine import Engine
    from reflux.trainer.losses import exact_reference_kl, token_logprob_of

    cfg = config_of(folder, rank)
    engine = Engine(cfg, hashes_inputs=False)
    reference = engine.base() if rank else engine.frozen(roles(cfg)[1].model, longest=LENGTH)

    def loss(out, batch):
        with engine.forward_no_grad(reference, batch, out.vocab_size) as other:
            kl, _ = exact_reference_kl(out, other, temperature=1.0)
        return 0.04 * kl - token_logprob_of(out, batch.target_T).logp.sum(), {}

    seconds = []
    for step in engine.steps():
        start = time.perf_counter()
        engine.step([[rows(step)]], loss)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    engine.close()
    return {"seconds": seconds[1:], "peak_bytes": peak, "trained": trained}


def rows(step: int) -> list:
    """One micro-batch of random texts, half prompt and half response."""
    import numpy as np

    from reflux.trainer.data.batch import Prompt, Rollout, Sample, pack

    rng, half = np.random.default_rng(step), LENGTH // 2
    ids = rng.integers(3, SHAPE["vocab_size"], (ROWS, 2, half)).tolist()
    samples = [
        Sample(Rollout(Prompt(i, ()), tuple(a), tuple(b), (0.0,) * half, 0.0, "", True))
        for i, (a, b) in enumerate(ids)
    ]
    return pack(samples, tokens=ROWS * LENGTH, seq_len=LENGTH)


def _child(folder: Path, arm: str) -> dict:
    command = [sys.executable, "-m", "bench.lora", str(folder), "--arm", arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lora", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(run_arm(given.folder, ARMS[given.arm])))
        return
    make_model(given.folder / "model")
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(TURNS):
        for arm in ARMS:
            found[arm].append(_child(given.folder, arm))
    table = {
        arm: {
            "rank": ARMS[arm],
            "trained_values": runs[0]["trained"],
            "step_s_median": statistics.median(s for run in runs for s in run["seconds"]),
            "step_s": [run["seconds"] for run in runs],
            "peak_gib": [run["peak_bytes"] / 2**30 for run in runs],
        }
        for arm, runs in found.items()
    }
    content = {**device(), "model": SHAPE, "rows": ROWS, "length": LENGTH, "seed": 0, "arms": table}
    print(write("lora_cpu", content, command="python -m bench.lora"))
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
