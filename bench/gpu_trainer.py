"""The whole trainer on one GPU in 3 minutes: does it run, is it right, how fast.

    python bench/gpu_trainer.py --commit SHA --out results    # a random 0.5B model, bf16
    python bench/gpu_trainer.py --dry --out runs/gpu         # on a CPU: a tiny one, the same steps

Runs of trainer/main.py under torchrun with one process (NCCL on a GPU): distillation from texts of
a data set in bf16, against the same run in fp32 on the CPU; again with torch.compile and activation
checkpointing; with flex attention; then calibration, with rollouts. Losses of bf16 may differ by
TOLERANCE from those of the CPU. Each run is a row in OUT/trainer.jsonl at once: steps, losses,
tokens/s, share of the GPU's arithmetic, memory. A run that fails says so and the next goes on.

Needs what the trainer needs (docs/dependencies.txt).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench import records  # noqa: E402
from bench.gpu import append_row, read_rows  # noqa: E402

TOLERANCE = 0.05  # relative, of a loss in bf16
PEAK = 989e12  # FLOP/s in bf16 that an H100 or H200 is sold with: what MFU is a fraction of
HALF_B = dict(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.02,
    tie_word_embeddings=True,
)
TINY = dict(vocab_size=640, tie_word_embeddings=True)  # a head of more rows than tokens
STEPS = 4


def make_models(folder: Path, dry: bool) -> int:
    """model/ and teacher/ in `folder`, data.jsonl beside them. Returns a model's parameters."""
    import torch
    from assets import save_model, save_tokenizer, sentences, train_tokenizer
    from safetensors import safe_open

    if not dry:  # a dry run is a test's, which counts on one thread
        torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = train_tokenizer(sentences(600), 512)
    for seed, name in enumerate(("model", "teacher")):
        save_model(folder / name, "qwen2", seed, **(TINY if dry else HALF_B))
        save_tokenizer(tokenizer, folder / name)
    rows = [
        {"prompt": f"What is {a}+{b}?", "answer": str(a + b), "response": f"{a}+{b} is => {a + b}"}
        for a in range(8)
        for b in range(8)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())


def settings(folder: Path, name: str, phase: str, dry: bool, **over) -> dict:
    """Dotted keys of one run. `over` has two underscores for a dot."""
    texts = 8 if dry else 32
    base = {
        "phase": phase,
        "folder": str(folder / name),
        "steps": STEPS,
        "on_existing_run": "fail",
        "model.path": str(folder / "model"),
        "data.source": str(folder / "data.jsonl"),
        "rollout.prompts": 2 if dry else 8,
        "rollout.group": 4,
        "rollout.max_tokens": 12 if dry else 64,
        "optim.lr": 1e-4,
        "training.seq_len": 96 if dry else 512,
        "training.mixed_precision_param": "bfloat16",
        "export.enable": False,
        "checkpoint.interval": 1000,
    }
    if phase == "distill":
        base |= {"teacher.path": str(folder / "teacher"), "distill.source": "dataset"}
        base |= {"distill.on_policy": 0.0, "rollout.prompts": texts, "rollout.group": 1}
    else:
        base |= {"proxy.path": str(folder / "teacher"), "guard.kl_budget": 0.0}
        base |= {"task.name": "small_tasks:reward_vowels", "calibration.max_unaligned": 1.0}
        base |= {"task.options.grade_truncated": True}
    return base | {key.replace("__", "."): value for key, value in over.items()}


RUNS = {  # name -> phase, what it changes; the first one is what the CPU repeats
    "distill": ("distill", {}),
    "distill compiled checkpointed": (
        "distill",
        {"compile__enable": True, "activation_checkpoint": "full"},
    ),
    "distill flex": ("distill", {"model__attention": "flex"}),
    "calibrate": ("calibrate", {}),
}


def start(keys: dict, gpu: bool, limit_s: float) -> tuple[str, list[dict]]:
    """("", lines of the steps) of one run, or (why it failed, what there is)."""
    file = Path(keys["folder"] + ".toml")
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(ROOT / "trainer/main.py"), "--config", str(file)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path()}
    env |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
        last = (done.stdout + done.stderr).strip().splitlines()[-12:]
        why = "" if done.returncode == 0 else f"exit {done.returncode}: " + " | ".join(last)[-900:]
    except subprocess.TimeoutExpired:
        why = f"not done after {limit_s:.0f} s"
    log = Path(keys["folder"]) / "run.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return why, [row for row in rows if "loss" in row and "event" not in row]


def python_path() -> str:
    shim = ROOT / "build" / "shim"  # where nothing of this is installed
    for floor in ("kernels", "tokenalign", "trainer"):
        link = shim / "reflux" / floor
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(ROOT / floor)
    try:
        import reflux.trainer  # noqa: F401
    except ImportError:
        return os.pathsep.join([str(shim), str(ROOT / "tests")])
    return str(ROOT / "tests")


def summary(name: str, parameters: int, why: str, steps: list[dict], wall_s: float) -> dict:
    """One row. Rates are of the last step, when everything is compiled."""
    row: dict = {"case": name, "parameters": parameters, "wall_s": wall_s, "failed": why}
    row |= {"steps": len(steps), "losses": [step["loss"] for step in steps]}
    if steps:
        rate = steps[-1].get("tokens_per_s", 0.0)
        row |= {"tokens_per_s": rate, "mfu": 6 * parameters * rate / PEAK}
        row["memory_gib"] = steps[-1].get("memory_gib")
    bad = [loss for loss in row["losses"] if not math.isfinite(loss)]
    if not why and (bad or len(steps) != STEPS):
        row["failed"] = f"{len(steps)} of {STEPS} steps, losses {row['losses']}"
    return row


def compare(got: list[float], truth: list[float]) -> str:
    """ "", or where two runs differ by more than TOLERANCE."""
    for step, (a, b) in enumerate(zip(got, truth), start=1):
        if abs(a - b) > TOLERANCE * abs(b) + 1e-3:
            return f"step {step}: loss {a:.4f}, the CPU's {b:.4f}"
    return "" if len(got) == len(truth) else f"{len(got)} steps, the CPU's {len(truth)}"


def show(row: dict) -> str:
    if row["failed"]:
        return f"{row['case']:<32} FAILED: {row['failed']}"
    losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
    memory = f"{row['memory_gib']:.1f} GiB" if row["memory_gib"] else "memory unknown"
    rate = f"{row['tokens_per_s']:.0f} tokens/s, MFU {row['mfu']:.1%}, {memory}"
    return f"{row['case']:<32} losses {losses}, {rate}, {row['wall_s']:.0f} s"


def run_all(folder: Path, rows_file: Path, args: argparse.Namespace) -> None:
    import torch

    gpu, until = torch.cuda.is_available(), time.time() + args.seconds
    parameters = make_models(folder, args.dry)
    jobs = [(name, phase, over, gpu) for name, (phase, over) in RUNS.items()]
    exact = {"training__mixed_precision_param": "float32", "teacher__dtype": "float32"}
    jobs.insert(1, ("distill on the CPU in fp32", "distill", exact, False))
    losses: dict[str, list[float]] = {}
    for name, phase, over, on_gpu in jobs:
        if args.only and name not in args.only:
            continue
        begin, left = time.time(), until - time.time()
        keys = settings(folder, name.replace(" ", "_"), phase, args.dry, **over)
        why, steps = start(keys, on_gpu, left) if left > 5 else ("out of time", [])
        row = summary(name, parameters, why, steps, time.time() - begin)
        losses[name] = row["losses"]
        if phase == "distill" and "CPU" not in name and not row["failed"]:
            truth = losses.get("distill on the CPU in fp32")
            row["failed"] = compare(row["losses"], truth) if truth else ""
        append_row(rows_file, row)
        print(show(row), flush=True)
    if "distill on the CPU in fp32" in losses and losses.get("distill"):
        wrong = compare(losses["distill"], losses["distill on the CPU in fp32"])
        append_row(rows_file, {"case": "distill against the CPU", "failed": wrong})
        print("distill against the CPU:", wrong or f"within {TOLERANCE:.0%} in every step")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--commit", help="of this copy, which has no .git")
    parser.add_argument("--only", nargs="+", default=[], help="names of runs")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows_file = args.out.resolve() / "trainer.jsonl"
    rows_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_all(Path(folder), rows_file, args)
    if args.commit:
        os.environ["REFLUX_COMMIT"] = args.commit
    rows = read_rows(rows_file)
    content = {**records.device(), "dry": args.dry, "rows": rows}
    content |= {"commit": args.commit, "dirty": False} if args.commit else {}
    print("Recorded in", records.write("trainer_gpu", content, args.out, "bench/gpu_trainer.py"))
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
