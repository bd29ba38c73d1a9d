"""Who writes texts how fast: the embedded sampler, transformers' generate and vLLM on the same
random llama, prompts and lengths, in turns.

    python -m bench.engines FOLDER             # tokens a CPU second and a second of each, ratios
    python -m bench.engines FOLDER --record    # and a record in bench/records/

The model and the prompts are those of `python -m bench trainer` (trainer_jobs.py): 4 prompts, 4
texts of each. Twice: every text is as long as the limit, and texts end where TEXT_LENGTHS says.
Each arm is a process of its own on one thread; the first step of each is not counted, starting an
engine neither. vLLM runs where `make test-engines` has built its environment (build/engines/.venv),
else its row says that it is missing.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import trainer_jobs as jobs
from .records import ROOT, device, write

ENGINES = ROOT / "build" / "engines" / ".venv" / "bin" / "python"
ARMS = ("embedded", "transformers", "vllm")
LENGTHS = {"full": (1.0,) * jobs.GROUP, "mixed": jobs.TEXT_LENGTHS}
STEPS, TURNS = 4, 2
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


def run_arm(folder: Path, arm: str, lengths: str) -> dict[str, Any]:
    """Tokens, wall and CPU seconds of each step after the first; in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parent))
    import trainer_jobs  # as the workers import it

    trainer_jobs.TEXT_LENGTHS = jobs.TEXT_LENGTHS = LENGTHS[lengths]
    step = {"embedded": _embedded, "transformers": _transformers, "vllm": _vllm}[arm](folder)
    rows = []
    for _ in range(STEPS + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = step()["tokens"]
        rows.append((tokens, time.perf_counter() - wall, time.process_time() - cpu))
    tokens, wall_s, cpu_s = map(list, zip(*rows[1:]))
    return {"tokens": tokens, "wall_s": wall_s, "cpu_s": cpu_s}


def _embedded(folder: Path):
    import socket

    from trainer_ours import sampling_step

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    return sampling_step(folder, Path(tempfile.mkdtemp(dir=folder)))


def _transformers(folder: Path):
    from trainer_trl import sampling_step

    return sampling_step(folder)


def _vllm(folder: Path):
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder / "student"), dtype="float32", enforce_eager=True, max_model_len=256)
    tokenizer, count = AutoTokenizer.from_pretrained(folder / "student"), itertools.count(0)
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    limits = [max(1, round(x * jobs.NEW_TOKENS)) for x in jobs.TEXT_LENGTHS]

    def step() -> dict[str, int]:
        first = next(count) * jobs.PROMPTS % len(rows)
        asked, params = [], []
        for row in rows[first : first + jobs.PROMPTS]:
            turn = [{"role": "user", "content": row["prompt"]}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for k, limit in enumerate(limits):
                asked.append({"prompt_token_ids": ids})
                params.append(
                    SamplingParams(max_tokens=limit, seed=k, ignore_eos=True, detokenize=False)
                )
        out = engine.generate(asked, params, use_tqdm=False)
        return {"tokens": sum(len(o.outputs[0].token_ids) for o in out)}

    return step


def _child(folder: Path, arm: str, lengths: str) -> dict[str, Any]:
    """What the arm measured, or {"missing": why}."""
    python = str(ENGINES) if arm == "vllm" else sys.executable
    if arm == "vllm" and not ENGINES.exists():
        return {"missing": "no build/engines/.venv; make test-engines builds it"}
    command = [python, "-m", "bench.engines", str(folder), "--arm", arm, "--lengths", lengths]
    environment = os.environ | VLLM | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summarize(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Tokens a second by the median step of each arm, and its ratio to transformers."""
    table: dict[str, Any] = {}
    for arm, runs in found.items():
        if missing := next((r["missing"] for r in runs if "missing" in r), None):
            table[arm] = {"missing": missing}
            continue
        steps = [x for r in runs for x in zip(r["tokens"], r["wall_s"], r["cpu_s"])]
        table[arm] = {
            "tokens_per_cpu_s": statistics.median(n / cpu for n, _, cpu in steps),
            "tokens_per_s": statistics.median(n / wall for n, wall, _ in steps),
            "runs": runs,
        }
    base = table.get("transformers", {}).get("tokens_per_cpu_s")
    for row in table.values():
        if base and "tokens_per_cpu_s" in row:
            row["cpu_ratio_to_transformers"] = row["tokens_per_cpu_s"] / base
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true", help="write a record")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", choices=LENGTHS, default="full", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    folder: Path = given.folder.resolve()
    if given.arm:
        print(json.dumps(run_arm(folder, given.arm, given.lengths)))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.jsonl").exists():
        jobs.make_assets(folder)
    tables = {}
    for lengths in LENGTHS:
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(TURNS):
            for arm in ARMS:
                found[arm].append(_child(folder, arm, lengths))
        tables[lengths] = summarize(found)
        print(lengths, json.dumps(tables[lengths], indent=1))
    if given.record:
        shape = {"vocabulary": jobs.VOCAB, "hidden": jobs.WIDTH, "layers": jobs.LAYERS}
        shape |= {"prompts": jobs.PROMPTS, "group": jobs.GROUP, "new_tokens": jobs.NEW_TOKENS}
        content = {**device(), "model": shape, "seed": jobs.SEED, "lengths": tables}
        print(write("engines_cpu", content, command="python -m bench.engines FOLDER --record"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
