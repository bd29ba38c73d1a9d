"""This trainer as a worker of `python -m bench trainer`:  trainer_ours.py JOB ASSETS RUNS

`calibrate` is `grpo` with a proxy of half the layers: what a calibration adds to a step.
"""

import contextlib
import itertools
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import trainer_jobs as jobs

GIVEN = {"source": "dataset", "on_policy": 0.0}
DISTILL = {
    "sft": GIVEN | {"objective": "nll"},
    "kd_reverse": GIVEN | {"divergence": "reverse"},
    "kd_jsd": GIVEN | {"divergence": "jsd"},
    "on_policy": {"divergence": "reverse", "on_policy": 1.0},
}
EXACT = {"name": "exact", "options": {"pattern": "([aeiou])", "grade_truncated": True}}


def config(job: str, assets: Path, folder: Path):
    """The configuration of a job."""
    from reflux.trainer.config.loader import fill
    from reflux.trainer.config.schema import Config

    samples = job in ("on_policy", "grpo", "calibrate", "sampling")
    table = {
        "phase": "distill" if job in DISTILL else "calibrate",
        "folder": str(folder),
        "model": {"path": str(assets / "student")},
        "data": {"source": str(assets / "data.jsonl")},
        "rollout": {
            "prompts": jobs.PROMPTS if samples else jobs.PROMPTS * jobs.GROUP,
            "group": jobs.GROUP,
            "max_tokens": jobs.NEW_TOKENS,
        },
        "optim": {"lr": jobs.LR},
        "log": {"quiet": True},
        "training": {"seq_len": 256, "mixed_precision_param": "float32"},
        "checkpoint": {"interval": 10**6},
        "guard": {"kl_budget": 0.0},
    }
    if job in DISTILL:
        table["distill"] = DISTILL[job]
        table["teacher"] = {"path": str(assets / "teacher"), "dtype": "float32"}
    else:
        table |= {"task": EXACT, "reference": {"beta": 0.0}}
    if job == "calibrate":
        table["proxy"] = {"path": str(assets / "proxy"), "dtype": "float32"}
        table["calibration"] = {"mode": "distillable", "truncated": "score_prefix"}
        table["calibration"] |= {"cal_gate": "none", "max_unaligned": 1.0}
    return fill(Config, table, "bench")


def training_step(job: str, assets: Path, folder: Path):
    """A function that trains one step and returns its parts in CPU seconds."""
    from reflux.trainer.config.phases import spec_of
    from reflux.trainer.data.batch import pack
    from reflux.trainer.engine.engine import Engine

    cfg = config(job, assets, folder)
    engine = Engine(cfg)
    phase = spec_of(cfg.phase).load()(cfg, engine)
    count = itertools.count(1)

    def step() -> dict:
        number, start = next(count), time.process_time()
        texts_PG = phase.sample(number)
        sampled = time.process_time()
        samples_N = phase.score(texts_PG)
        batches = pack(samples_N, tokens=cfg.batch.tokens, seq_len=engine.seq_len)
        stats = engine.step([[batches]], phase.loss)
        return {
            "sample_cpu_s": sampled - start,
            "train_cpu_s": time.process_time() - sampled,
            "tokens": stats["tokens"],
        }

    return step


def sampling_step(assets: Path, folder: Path):
    """A function that samples one step's texts, which end at TEXT_LENGTHS."""
    from reflux.trainer.data.chat import Chat
    from reflux.trainer.data.prompts import load_prompts
    from reflux.trainer.engine.engine import Engine
    from reflux.trainer.phase import Sampling
    from reflux.trainer.rollouts.generate import generate

    engine = Engine(config("sampling", assets, folder))
    chat, count = Chat(str(assets / "student")), itertools.count(0)
    prompts = load_prompts(str(assets / "data.jsonl"))

    def step() -> dict:
        number = next(count)
        chosen = prompts.batch(number, jobs.PROMPTS, seed=jobs.SEED)
        sampling = Sampling(jobs.NEW_TOKENS, jobs.SEED, number)
        with engine.gathered_weights() as decode:
            groups = generate(ending(decode, chat.stop_id), chat, chosen, jobs.GROUP, sampling)
        return {"tokens": sum(len(r.ids) for group in groups for r in group)}

    return step


def ending(decode, stop_id: int):
    """The decoder with a certain stop at the end that a text has by TEXT_LENGTHS."""

    @contextlib.contextmanager
    def decoder(rows: int, max_length: int):
        with decode(rows, max_length) as (step, device):
            fraction_B = torch.tensor(jobs.TEXT_LENGTHS).repeat(rows // jobs.GROUP)
            end_B, fed = (fraction_B * jobs.NEW_TOKENS).round().long(), 0

            def ended(ids_NL, positions_NL, real_NL, first, rows_N=None):
                nonlocal end_B, fed
                logits_NV = step(ids_NL, positions_NL, real_NL, first, rows_N)
                fed += 1
                if rows_N is not None and fed > 2:  # the first ones are those of the prompts
                    end_B = end_B[rows_N]
                if not first:
                    logits_NV[end_B <= fed, stop_id] = 1e4
                return logits_NV

            yield ended, device

    return decoder


def main() -> None:
    job, assets, runs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(jobs.SEED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    folder = Path(tempfile.mkdtemp(dir=runs))
    step = (
        sampling_step(assets, folder) if job == "sampling" else training_step(job, assets, folder)
    )
    jobs.answer_steps(step)


if __name__ == "__main__":
    main()
