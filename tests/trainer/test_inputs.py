"""A run knows what it was made of: hashes in the log and in every checkpoint, and a resume on other
inputs is refused before anything is changed.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import config, run_here, write_data

pytestmark = pytest.mark.usefixtures("titan_process")
SFT = {"objective": "nll", "source": "dataset", "on_policy": 0.0}


@pytest.fixture
def run(talkers, tmp_path):
    """A fine-tuning of two steps, with a checkpoint of each."""
    shutil.copytree(talkers / "policy", tmp_path / "policy")
    cfg = config(tmp_path, tmp_path / "run", "distill", distill=SFT, checkpoint={"interval": 1})
    run_here(cfg)
    return replace(cfg, steps=3, on_existing_run="resume")


def refused(cfg, words: str) -> None:
    before = {p: p.read_bytes() for p in sorted(Path(cfg.folder).rglob("*")) if p.is_file()}
    try:
        with pytest.raises(ValueError, match=words):
            run_here(cfg)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    after = {p: p.read_bytes() for p in sorted(Path(cfg.folder).rglob("*")) if p.is_file()}
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {"inputs.json"}, "a refusal changes nothing but the memory of hashes"


def reorder(file: Path) -> None:
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[::-1]))


def test_the_head_of_the_log_has_the_hash_of_every_file(run, tmp_path):
    head = json.loads((tmp_path / "run" / "run.jsonl").read_text().splitlines()[0])
    data = tmp_path / "data.jsonl"
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert head["inputs"]["data"] == {"path": str(data), "files": {"data.jsonl": digest}}
    assert "model.safetensors" in head["inputs"]["student"]["files"]


def test_a_resume_on_other_data_is_refused_and_on_the_same_goes_on(run, tmp_path):
    reorder(tmp_path / "data.jsonl")
    refused(run, r"run was trained on other inputs: data \(.*data.jsonl has changed\)")
    (tmp_path / "run" / "inputs.json").unlink()  # the checkpoint remembers as well
    refused(run, "trained on other inputs: data")
    write_data(tmp_path)
    assert [line["step"] for line in run_here(run).steps] == [1, 2, 3]


def test_a_resume_on_another_model_is_refused_although_no_weight_is_read(run, tmp_path):
    tokenizer = tmp_path / "policy" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    refused(run, r"student \(.*policy: tokenizer_config.json has changed\)")


def test_accepted_inputs_are_those_of_the_checkpoints_that_follow(run, tmp_path):
    reorder(tmp_path / "data.jsonl")
    done = run_here(replace(run, on_changed_input="accept"))
    told = [e["message"] for e in done.events if "other inputs" in e.get("message", "")]
    assert len(told) == 1 and "on_changed_input = 'accept'" in told[0]
    head = next(e for e in done.events if e["event"] == "resume")["head"]
    digest = hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()
    assert head["inputs"]["data"]["files"] == {"data.jsonl": digest}
    assert [line["step"] for line in run_here(replace(run, steps=4)).steps] == [1, 2, 3, 4]
