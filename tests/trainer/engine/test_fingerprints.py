"""What a run reads is known by hash; a resumed run on other inputs is refused, with their names."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import config
from shards import run_on_ranks

from reflux.trainer.engine import fingerprints as module
from reflux.trainer.engine.fingerprints import Input, RunInputs, changed_inputs, fingerprints


@pytest.fixture
def cfg(talkers, tmp_path, monkeypatch):
    """A distillation of copies, with a grader and a rewrite of its own."""
    for name in ("policy", "teacher"):
        shutil.copytree(talkers / name, tmp_path / name)
    (tmp_path / "my_grader.py").write_text("def grade(prompt, text):\n    return True\n")
    (tmp_path / "my_rewrite.py").write_text("def write(prompt, text):\n    return text\n")
    monkeypatch.syspath_prepend(tmp_path)
    return config(
        tmp_path,
        tmp_path / "run",
        "distill",
        task={"name": "my_grader:grade"},
        distill={"on_policy": 0.0, "rewrite": "my_rewrite:write"},
        eval={"source": str(shutil.copy(data_of(tmp_path), tmp_path / "held_out.jsonl"))},
    )


def data_of(folder: Path) -> Path:
    from runs import write_data

    return write_data(folder)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_input_is_hashed_by_name(cfg, tmp_path):
    inputs = fingerprints(cfg)
    assert set(inputs) == {"student", "teacher", "data", "eval", "task", "rewrite"}
    for role, folder in (("student", "policy"), ("teacher", "teacher")):
        assert inputs[role].path == str(tmp_path / folder)
        names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert names <= set(inputs[role].files)
        for name, digest in inputs[role].files.items():
            assert digest == sha256(tmp_path / folder / name)
    assert inputs["data"].files == {"data.jsonl": sha256(tmp_path / "data.jsonl")}
    assert inputs["eval"].files == {"held_out.jsonl": sha256(tmp_path / "held_out.jsonl")}
    assert inputs["task"].files == {"my_grader.py": sha256(tmp_path / "my_grader.py")}
    assert inputs["rewrite"].files == {"my_rewrite.py": sha256(tmp_path / "my_rewrite.py")}


@pytest.mark.parametrize(
    "file, words",
    [
        ("policy/model.safetensors", "student (*: model.safetensors has changed)"),
        ("policy/tokenizer.json", "student (*: tokenizer.json has changed)"),
        ("teacher/generation_config.json", "teacher (*: generation_config.json has changed)"),
        ("data.jsonl", "data (*: data.jsonl has changed)"),
        ("my_grader.py", "task (my_grader:grade: my_grader.py has changed)"),
        ("my_rewrite.py", "rewrite (my_rewrite:write: my_rewrite.py has changed)"),
    ],
)
def test_a_change_is_named_and_refused_or_accepted(cfg, tmp_path, file, words):
    first = RunInputs(cfg)
    first.check({})
    same = RunInputs(cfg)
    same.check_remembered()
    same.check(first.table)
    assert same.messages == ()
    with open(tmp_path / file, "ab") as changed:
        changed.write(b" ")
    other = RunInputs(cfg)
    begin, end = words.split("*") if "*" in words else (words, "")
    for check in (other.check_remembered, lambda: other.check(first.table)):
        with pytest.raises(ValueError, match="was trained on other inputs") as error:
            check()
        assert begin in str(error.value) and end in str(error.value)
        assert "on_changed_input = 'accept'" in str(error.value)
    accepted = RunInputs(replace(cfg, on_changed_input="accept"))
    accepted.check_remembered()
    accepted.check(first.table)
    assert len(accepted.messages) == 1 and begin in accepted.messages[0]
    RunInputs(cfg).check_remembered()  # the accepted ones are those of this folder now
    with pytest.raises(ValueError, match="other inputs"):
        RunInputs(cfg).check(first.table)  # and not of an earlier checkpoint


def test_what_is_gone_and_new_is_told_and_another_evaluation_is_a_choice():
    before = {
        "data": Input("d", {"a": "1", "b": "2"}),
        "eval": Input("e", {"x": "1"}),
        "proxy": Input("p", {}),
    }
    now = {"data": Input("d", {"b": "2", "c": "3"}), "eval": Input("f", {"y": "2"})}
    assert changed_inputs(before, now) == ["data (d: a is gone, c is new)"]
    now["eval"] = Input("e", {"x": "2"})
    assert changed_inputs(before, now)[1] == "eval (e: x has changed)"
    many = {"data": Input("d", {str(i): "1" for i in range(9)})}
    assert "and 6 more" in changed_inputs(many, {"data": Input("d", {})})[0]


def aged(monkeypatch) -> None:
    """As if no file had changed within the last seconds."""
    monkeypatch.setattr(module, "CLOCK_S", -1.0)


def counted(monkeypatch) -> list[str]:
    """The files that are hashed from now on."""
    read, real = [], module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda file: (read.append(file), real(file))[1])
    return read


def test_no_file_is_hashed_twice_unless_its_size_or_times_differ(cfg, tmp_path, monkeypatch):
    aged(monkeypatch)
    read = counted(monkeypatch)
    first = fingerprints(cfg)
    assert len(read) == len(set(read)) == sum(len(x.files) for x in first.values())
    read.clear()
    assert fingerprints(cfg) == first and read == []
    weights = tmp_path / "policy" / "model.safetensors"
    stat = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size, and as old
    assert fingerprints(cfg) != first and read == [str(weights)]


def test_a_file_that_has_just_changed_is_not_remembered(cfg, tmp_path, monkeypatch):
    read = counted(monkeypatch)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    fingerprints(cfg)
    remembered = json.loads((tmp_path / "run" / "inputs.json").read_text())["hashes"]
    assert str(tmp_path / "data.jsonl") not in remembered
    read.clear()
    fingerprints(cfg)
    assert str(tmp_path / "data.jsonl") in read


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"inputs": 3}', '{"inputs": {"data": 1}}'])
def test_a_torn_or_edited_memory_is_none(cfg, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inputs.json").write_text(text)
    inputs = RunInputs(cfg)
    inputs.check_remembered()
    inputs.check({})
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["inputs"] == inputs.table


def test_folders_of_data_are_hashed_file_by_file_without_caches(cfg, tmp_path):
    folder = tmp_path / "rows"
    for name in ("train/a.parquet", "cache-1.arrow", ".git/x", "tmpab", "b.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    data = replace(cfg.data, source=str(folder))
    assert set(fingerprints(replace(cfg, data=data))["data"].files) == {"train/a.parquet", "b.json"}


def test_generators_and_packaged_graders_are_told_by_their_version(cfg):
    data = replace(cfg.data, source="reasoning_gym:chain_sum?size=5&seed=1")
    inputs = fingerprints(replace(cfg, data=data, task=replace(cfg.task, name="math")))
    assert set(inputs["data"].files) == {"reasoning-gym"} and inputs["data"].path == data.source
    assert set(inputs["task"].files) == {"math-verify"}
    own = replace(cfg.data, source="my_grader:grade?n=3")
    assert set(fingerprints(replace(cfg, data=own))["data"].files) == {"my_grader.py"}
    builtin = replace(cfg.task, name="exact")
    assert fingerprints(replace(cfg, task=builtin))["task"].files == {}


def test_random_weights_are_no_input_and_a_copy_of_the_model_is_no_other(cfg, talkers, tmp_path):
    scratch = replace(cfg.model, from_scratch=True)
    files = fingerprints(replace(cfg, model=scratch))["student"].files
    assert "config.json" in files and "model.safetensors" not in files
    calibrate = config(talkers, tmp_path / "run", "calibrate", calibration={"mode": "distillable"})
    assert {"policy", "proxy", "data", "task"} == set(fingerprints(calibrate))


def hash_on_ranks(cfg) -> tuple[dict, int]:
    read = []
    real = module.file_sha256
    module.file_sha256 = lambda file: (read.append(file), real(file))[1]
    found = fingerprints(cfg)
    dist.barrier()
    return found, len(read)


def test_ranks_share_the_work_and_agree(cfg):
    (first, one), (second, other) = run_on_ranks(hash_on_ranks, cfg)
    assert first == second == fingerprints(cfg)
    assert one + other == sum(len(x.files) for x in first.values()) and abs(one - other) <= 1


def test_hashing_is_near_the_speed_of_reading(cfg, tmp_path):
    """A file that is hashed is read once, and nothing else of its size is made in memory."""
    with open(tmp_path / "data.jsonl", "ab") as file:
        file.truncate(1 << 28)
    start = time.perf_counter()
    fingerprints(cfg)
    assert time.perf_counter() - start < 5.0
