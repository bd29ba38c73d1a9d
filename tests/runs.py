"""Whole runs of the trainer for tests: tiny data, tiny models, in this process or under torchrun,
read back from the log.
"""

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from assets import free_port
from fork_server import Background, ForkServer, Request
from small_tasks import (
    is_answer_of_prompt_0,
    is_easy,
    is_even,
    raise_sometimes,
    reward_vowels,
)

from reflux.trainer.config.loader import deep_merge, fill, to_toml
from reflux.trainer.config.schema import Config
from reflux.trainer.runs.logger import Run, load_run

__all__ = ["is_answer_of_prompt_0", "is_easy", "is_even", "raise_sometimes", "reward_vowels"]
MAIN = Path(__file__).parents[1] / "trainer" / "main.py"
# durations, and the process's memory
NOT_REPEATABLE = ("wall_s", "tokens_per_s", "sample_s", "score_s", "step_s", "memory_gib")
# random models get some reward for it; they hardly ever answer a question correctly
REWARD_VOWELS = "small_tasks:reward_vowels"


def write_data(folder: Path, count: int = 24) -> Path:
    """Questions with answers and responses, of several lengths."""
    path = folder / "data.jsonl"
    rows = [
        {
            "prompt": f"What is {a}+{b}?" + " Think." * (a % 3),
            "answer": str(a + b),
            "response": f"{a}+{b} is => {a + b}",
        }
        for a, b in ((i // 5, i % 5) for i in range(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_talker(source: Path, out: Path, data: Path, steps: int = 60) -> None:
    """The checkpoint `source` after a few steps of fine-tuning on the data's responses: it answers
    with texts that end.
    """
    from transformers import AutoModelForCausalLM

    from reflux.trainer.data.chat import Chat
    from reflux.trainer.data.prompts import load_prompts

    shutil.copytree(source, out)
    chat, model = Chat(str(source)), AutoModelForCausalLM.from_pretrained(source)
    rows = []
    for prompt in load_prompts(str(data)):
        before = chat.prompt_ids(prompt.messages)
        response = (*chat.encode(prompt.response), chat.stop_id)
        rows.append((before + response, (-100,) * len(before) + response))
    width = max(len(ids) for ids, _ in rows)
    ids_NL = torch.tensor([ids + (0,) * (width - len(ids)) for ids, _ in rows])
    labels_NL = torch.tensor([labels + (-100,) * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(ids_NL, labels=labels_NL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def with_other_stop(source: Path, out: Path) -> Path:
    """The same model and ids, but it ends a turn with <|pad|>."""
    shutil.copytree(source, out)
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        if (out / file).exists():
            (out / file).write_text((out / file).read_text().replace("<|eos|>", "<|pad|>"))
    stops_at(out, 0)
    return out


def stops_at(folder: Path, *ids: int) -> Path:
    """Names them in its generation_config.json."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(ids)}))
    return folder


@pytest.fixture(scope="session")
def talkers(assets, tmp_path_factory) -> Path:
    """A folder of models that answer: `policy` (tied qwen3), `teacher` (untied), `proxy` (gemma3,
    another tokenizer).
    """
    folder = tmp_path_factory.mktemp("talkers")
    models = (("policy", "qwen3_tied", 32), ("teacher", "qwen3", 50), ("proxy", "gemma3", 40))
    for name, source, steps in models:
        make_talker(assets / source, folder / name, write_data(folder), steps)
    return folder


def table(talkers: Path, folder: Path, phase: str, **over) -> dict:
    """The tables of a small run; `over` holds more of them, laid on top."""
    teacher = {"path": str(talkers / "teacher"), "dtype": "float32"}
    roles = {
        "calibrate": {
            "proxy": {"path": str(talkers / "proxy"), "dtype": "float32"},
            "reference": {"dtype": "float32"},
            # barely trained models also sample bytes that are no text
            "calibration": {"max_unaligned": 1.0},
        },
        "distill": {"teacher": teacher},
        "diagnose": {"teacher": teacher},
        "evaluate": {},
        "cache": {},
    }[phase]
    base = {
        "phase": phase,
        "folder": str(folder),
        "steps": 2,
        "on_existing_run": "fail",
        "model": {"path": str(talkers / "policy")},
        "task": {"name": REWARD_VOWELS},
        "rollout": {"prompts": 2, "group": 4, "max_tokens": 12},
        "optim": {"lr": 1e-3},
        "log": {"quiet": True},
        "export": {"enable": False},
        "training": {"seq_len": 96, "mixed_precision_param": "float32"},
        "checkpoint": {"interval": 1000},
        "guard": {"kl_budget": 0.0},
    }
    if phase != "evaluate":
        base["data"] = {"source": str(write_data(folder.parent))}
    return deep_merge(deep_merge(base, roles), over)


def config(talkers: Path, folder: Path, phase: str, **over) -> Config:
    return fill(Config, table(talkers, folder, phase, **over), "test")


def run_here(cfg: Config, expect: int = 0) -> Run:
    """The log of the run, made in this process (fixture titan_process)."""
    from reflux.trainer import loop

    os.environ["MASTER_PORT"] = str(free_port())
    assert loop.train(cfg) == expect
    return load_run(cfg.folder)


def numbers(step: Mapping) -> dict:
    """A line of the log without durations and memory."""
    return {k: v for k, v in step.items() if k not in NOT_REPEATABLE}


def environment() -> dict:
    keep = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return keep | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "HF_HUB_OFFLINE": "1",
    }


def command(cfg: Config, file: Path, ranks: int = 0) -> list[str]:
    """The command line of a run: plain python, or torchrun with that many processes."""
    file.write_text(to_toml(cfg))
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        start += ["--master-port", str(free_port())]
    return [*start, str(MAIN), "--config", str(file)]


@functools.cache
def fork_server() -> ForkServer:
    """One for all tests of this process; it ends with it."""
    server = ForkServer(environment())
    atexit.register(server.close)
    return server


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="forked-")


def run_forked(arguments: Sequence[str], cwd: Path, ranks: int = 0) -> Background:
    """Starts `main.py arguments` in the folder cwd, a second instead of six, as plain python or as
    ranks. Processes of their own, as under torchrun, but without torchrun.
    """
    notes = Path(tempfile.mkdtemp(dir=_scratch().name))
    request = Request(
        tuple(arguments),
        str(cwd),
        str(notes / "output.txt"),
        cache=os.environ["REFLUX_CACHE"],
        status=str(notes / "status"),
        ranks=ranks,
        port=free_port() if ranks else 0,
    )
    return fork_server().start_in_background(request)


def run_ranks(cfg: Config, ranks: int = 2) -> Run:
    """The log of the run, made by that many processes."""
    file = Path(cfg.folder + ".toml")
    file.write_text(to_toml(cfg))
    run = run_forked(["--config", str(file)], file.parent, ranks)
    assert run.wait(300) == 0, run.output[-12000:]
    return load_run(cfg.folder)
