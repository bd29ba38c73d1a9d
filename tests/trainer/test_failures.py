"""Every failure in words: exit code 2 and one paragraph that names the file, and says what to do.

Each is produced on purpose by a command line; most end before a model is built.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import Ended, ForkServer, Request
from runs import MAIN, environment, fork_server, table

from reflux.trainer.config.loader import deep_merge, fill, to_toml
from reflux.trainer.config.schema import Config

SMALL = {
    "model": {"path": "model"},
    "task": {"name": "small_tasks:reward_vowels"},
    "rollout": {"prompts": 2, "group": 2, "max_tokens": 4},
}
CALIBRATED = {
    "calibration": {
        "mode": "distillable",
        "max_unaligned": 1.0,
        "truncated": "score_prefix",
        "cal_gate": "none",
        "score_norm": "sum",  # groups of two
    },
    "proxy": {"path": "proxy"},
}
LOOP = "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def server():
    return fork_server()


@dataclass(frozen=True)
class Place:
    """A directory with a model, a proxy and data, in which a failure is prepared."""

    directory: Path

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def proxy(self) -> Path:
        return self.directory / "proxy"

    def rows(self, *lines: bytes) -> None:
        (self.directory / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def parquet(self, rows: int, cut: float = 1.0) -> dict:
        from pyarrow import array, string
        from pyarrow import table as arrow_table
        from pyarrow.parquet import write_table

        file = self.directory / "data.parquet"
        write_table(arrow_table({"prompt": array(["q"] * rows, string())}), str(file))
        whole = file.read_bytes()
        file.write_bytes(whole[: int(cut * len(whole))])
        return {"data": {"source": "data.parquet"}}

    def template(self, text: str) -> None:
        (self.model / "chat_template.jinja").write_text(text)

    def weights(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def place(assets, tmp_path) -> Place:
    shutil.copytree(assets / "qwen3_tied", tmp_path / "model")
    shutil.copytree(assets / "gemma3", tmp_path / "proxy")
    rows = [{"prompt": f"q {i}", "answer": "a"} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(lines)
    return Place(tmp_path)


def write_config(place: Place, over: dict[str, Any]) -> str:
    phase = over.pop("phase", "calibrate")
    (place.directory / "home").mkdir(exist_ok=True)
    base = table(place.directory, place.directory / "home" / "run", phase)
    base = deep_merge(base, {"folder": "run", "data": {"source": "data.jsonl"}})
    cfg = fill(Config, deep_merge(deep_merge(base, SMALL), over), "test")
    (place.directory / "run.toml").write_text(to_toml(cfg))
    return "run.toml"


def run(server: ForkServer, place: Place, over: dict[str, Any], *arguments: str) -> Ended:
    words = ("--config", write_config(place, over), *arguments)
    output = str(place.directory / "output.txt")
    return server.run(Request(words, str(place.directory), output))


def in_words(ended: Ended, says: str) -> None:
    """Exit code 2, one paragraph that matches, no traceback."""
    assert ended.code == 2, ended.output[-3000:]
    assert "Traceback" not in ended.output and '.py", line' not in ended.output, ended.output
    assert re.search(says, ended.output, re.S), ended.output
    error = ended.output[ended.output.index("error: ") :].strip().splitlines()
    assert error[-1] == "(REFLUX_TRACEBACK=1 shows where)" and len(error) <= 5, ended.output


# --- failures: prepare(place) -> tables of the configuration, and what the message says


def hub_model(place):
    return {"model": {"path": "Qwen/Qwen3-0.6B"}}


def hub_teacher(place):
    return {"phase": "distill", "teacher": {"path": "Qwen/Qwen3-0.6B"}}


def hub_data(place):
    return {"data": {"source": "openai/gsm8k"}}


def no_weights(place):
    (place.model / "model.safetensors").unlink()
    return {}


def bin_weights(place):
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    return {}


def cut_weights(place):
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9999])
    return {}


def other_shapes(place):
    file = place.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 32}))
    return {}


def nan_weights(place):
    def change(tensors):
        tensors["model.norm.weight"][3] = torch.nan

    place.weights(place.proxy, change)
    return CALIBRATED


def overflowing_proxy(place):
    def change(tensors):
        tensors["model.embed_tokens.weight"][20:60] = 3e38

    place.weights(place.proxy, change)
    return CALIBRATED


def diverging_run(place):
    """Texts are cut at 4 tokens: unless they are graded, all rewards are equal."""
    task = {"name": "small_tasks:reward_vowels", "options": {"grade_truncated": True}}
    return {"optim": {"lr": 1e30}, "steps": 5, "task": task}


def torn_tokenizer(place):
    file = place.model / "tokenizer.json"
    file.write_text(file.read_text()[:999])
    return {}


def wrong_template(place):
    place.template("one line\n{% for m in %}")
    return {}


def endless_template(place):
    place.template(LOOP)
    return {}


def constant_template(place):
    place.template("hello")
    return {}


def template_without_system(place):
    place.template(NO_SYSTEM)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    place.rows(*(json.dumps({"messages": talk[k:]}).encode() for k in (1, 1, 0)))
    return {}


def two_ranks_of_one(place):
    return {"parallelism": {"tensor_parallel_degree": 2}}


def deep_json(place):
    place.rows(b'{"prompt": "a"}', b'{"prompt": "b", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}")
    return {}


def long_line(place):
    place.rows(b'{"prompt": "a"}', b'{"prompt": "' + b"x" * 200_000_000 + b'"}')
    return {}


def empty_parquet(place):
    return place.parquet(0)


def cut_parquet(place):
    return place.parquet(999, cut=0.5)


def long_prompt(place):
    place.rows(*[b'{"prompt": "q"}'] * 5, json.dumps({"prompt": "long word " * 30}).encode())
    return {}


def no_answers(place):
    return {"task": {"name": "exact"}, "data": {"columns": {"answer": "response"}}}


def read_only_folder(place):
    return {"folder": "/sys/reflux-run"}


def folder_below_a_file(place):
    return {"folder": "data.jsonl/run"}


FAILURES = [
    (hub_model, r"model.path = 'Qwen/Qwen3-0.6B': no folder here, .* hf download Qwen"),
    (hub_teacher, r"teacher.path = 'Qwen/Qwen3-0.6B': no folder here, .* hf download Qwen"),
    (hub_data, r"openai/gsm8k: no such file or folder, .* of the hub .*hf download openai.gsm8k"),
    (no_weights, r"model: no model.safetensors .*; want a folder with weights"),
    (bin_weights, r"only pytorch_model.bin. Want .*convert the weights with save_pretrained"),
    (cut_weights, r"model/model.safetensors: truncated, .*9,999 bytes; copy or download it again"),
    (other_shapes, r"model/model.safetensors: tensor .* is \(512, 64\); .* wants \(512, 32\)"),
    (nan_weights, r"proxy/model.safetensors: .*'model.norm.weight'.*NaN"),
    (overflowing_proxy, r"error: proxy: .*(NaN|-inf)"),
    (diverging_run, r"step \d: loss .*gradient norm .*the weights are untouched.*Lower optim.lr"),
    (torn_tokenizer, r"model/tokenizer.json: no JSON .*torn .*again"),
    (wrong_template, r"model/chat_template.jinja: chat_template, line 2, fails .*Syntax.*Mend the"),
    (endless_template, r"chat_template, line 1, fails .*: no end within 10 s. Mend the template"),
    (constant_template, r"makes 'hello' of any message of the user: every prompt would be the s"),
    (template_without_system, r"data.jsonl, line 3: .*roles system, user: .*leave system messages"),
    (
        two_ranks_of_one,
        r"tensor_parallel_degree 2 want 2 processes, and 1 was started. Use --nproc",
    ),
    (deep_json, r"data.jsonl, line 2: .*recursion.*; want one JSON object a line"),
    (long_line, r"data.jsonl, line 2: more than 33,554,432 bytes; want one JSON object a line"),
    (empty_parquet, r"data.parquet: no rows"),
    (cut_parquet, r"data.parquet: no Parquet file, or a cut one .*; copy or download it again"),
    (long_prompt, r"data.jsonl, line 6: 1 of 6 prompts are too long for the policy.*data.too_long"),
    (no_answers, r"no column 'response'"),
    (read_only_folder, r"/sys/reflux-run: cannot write there: .*Set folder to another one"),
    (folder_below_a_file, r"data.jsonl/run: cannot write there: Not a directory"),
]


@pytest.mark.parametrize("prepare, says", FAILURES, ids=[f.__name__ for f, _ in FAILURES])
def test_a_failure_is_told_in_words(server, place, prepare, says):
    in_words(run(server, place, prepare(place)), says)
    saved = list(place.directory.glob("run/checkpoint/step-[1-9]*"))
    assert bool(saved) == (prepare is diverging_run)  # the only one that had finished a step


# --- failures of a run that is under way, or of its process


def wait_for_step(place: Place, step: int) -> None:
    log, end = place.directory / "run" / "run.jsonl", time.monotonic() + 60
    while time.monotonic() < end:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {(place.directory / 'output.txt').read_text()}")


def test_a_folder_that_is_deleted_during_a_run_ends_it_in_words(server, place):
    output = str(place.directory / "output.txt")
    words = ("--config", write_config(place, {"steps": 10_000}))
    start = time.monotonic()
    server.start(Request(words, str(place.directory), output))
    wait_for_step(place, 2)
    shutil.rmtree(place.directory / "run", ignore_errors=True)
    code = server.poll(60)
    assert code is not None
    ended = Ended(code, Path(output).read_text(), time.monotonic() - start)
    in_words(
        ended, r"run: this run does not own its folder any more: its lock was deleted|run.*gone"
    )


def test_a_checkpoint_without_its_log_goes_on_with_a_new_one(server, place):
    assert run(server, place, {"checkpoint": {"interval": 1}}).code == 0
    (place.directory / "run" / "run.jsonl").unlink()
    over = {"on_existing_run": "resume", "steps": 3, "checkpoint": {"interval": 1}}
    ended = run(server, place, over)
    lines = (place.directory / "run" / "run.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert ended.code == 0 and steps == [3] and "Traceback" not in ended.output, ended.output


def command(place: Place, *more: str) -> list[str]:
    return [sys.executable, str(MAIN), "--config", write_config(place, {}), *more]


def test_too_few_file_descriptors_are_told_before_anything_is_opened(place):
    def lower():
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))

    done = subprocess.run(
        command(place),
        cwd=place.directory,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lower,
        timeout=120,
    )
    in_words(Ended(done.returncode, done.stderr, 0.0), "may have 16 files open.*ulimit -n 4096")


def test_a_reader_that_leaves_is_no_failure(place):
    """`... --print-config | head -1`"""
    read, write = os.pipe()
    process = subprocess.Popen(
        command(place, "--print-config"),
        cwd=place.directory,
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode in (0, 141) and not errors.strip(), errors
