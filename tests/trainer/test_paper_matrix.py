"""configs/paper.toml with tiny stand-ins for every model and every file of data: all cells load,
and what each of their configurations plans and checks is sound; only weights are missing.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from assets import free_port
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from reflux.trainer.config.loader import load
from reflux.trainer.config.schema import Config
from reflux.trainer.matrix import read_matrix
from reflux.trainer.preflight.check import check
from reflux.trainer.preflight.dry_run import dry_run

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
# published folder -> the stand-in of its family: qwen3 by a BPE, gemma3 by another one
STAND_INS = {
    "Qwen3-8B": "policy",
    "Qwen3-0.6B": "reader",
    "Qwen3-1.7B": "student",
    "gemma-3-12b-it-text": "gemma3",
    "gemma-3-4b-it-text": "gemma3",
    "gemma-3-1b-it": "gemma3",
}
CHOICES = {"question": "2 + 2?", "options": ["3", "4"], "answer": "B"}
MATH = {"prompt": "2 + 2?", "answer": "4", "response": "\\boxed{4}"}
ROWS = {
    "csqa": CHOICES,
    "mmlu_pro": CHOICES,
    "supergpqa": CHOICES,
    "ifeval": {
        "prompt": "Write in lower case.",
        "instruction_id_list": ["change_case:english_lowercase"],
        "kwargs": [{}],
    },
}


@cache
def cells() -> list:
    return read_matrix(ROOT / "configs/paper.toml", {"seeds": [0]}).cells


def config_of(cell, *more: str) -> Config:
    sets = tuple(x for x in cell.arguments[2:] if x != "--set")
    return load(ROOT / cell.arguments[1], (*sets, *more))


def test_every_cell_loads_and_waits_for_what_it_reads():
    names = {c.name: c for c in cells()}
    assert len(names) == 46
    for cell in cells():
        cfg = config_of(cell)
        read = [cfg.model.path, cfg.teacher.path]
        made = [p for p in read if p.startswith("runs/paper")]
        for path in made:  # another cell's export, and it is done before
            assert f"{Path(path).parent.name}@0" in cell.after, (cell.name, path)
        assert set(cell.after) <= names.keys()
    modes = [config_of(c).calibration.mode for c in cells() if c.labels.get("role") == "teacher"]
    assert sorted(modes) == sorted(["distillable", "undistillable", "off"] * 3)
    students = [c.labels["teacher"] for c in cells() if c.labels.get("role") == "student"]
    want = ["original", "task_only", "distillable", "undistillable"] * 3
    assert sorted(students) == sorted(want)


@pytest.fixture(scope="module")
def stand_ins(talkers, tmp_path_factory) -> Path:
    """The current directory of a run: models/ and data/ as the configurations name them."""
    place = tmp_path_factory.mktemp("paper")
    for name in ("policy", "reader", "student"):
        shutil.copytree(talkers / ("teacher" if name == "student" else "policy"), place / name)
    shutil.copytree(talkers / "proxy", place / "gemma3")
    for file in (place / "gemma3").glob("*.safetensors"):
        file.unlink()
    old = json.loads((place / "gemma3" / "config.json").read_text())
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=old["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
    )
    Gemma3ForCausalLM(config).save_pretrained(place / "gemma3")
    (place / "models").mkdir()
    for published, name in STAND_INS.items():
        os.symlink(place / name, place / "models" / published)
    return place


def on_stand_ins(place: Path, cell) -> Config:
    """The cell on one CPU: tiny models and files, everything else as it is."""
    cfg = config_of(cell)
    small = {
        "parallelism.data_parallel_shard_degree": -1,
        "training.mixed_precision_param": "float32",
        "training.seq_len": 256,
        "rollout.max_tokens": 8,
        "rollout.prompts": 2,
        "folder": str(place / "runs" / cell.name),
    }
    for role in ("model", "teacher", "proxy"):
        if path := getattr(cfg, role).path:
            small[f"{role}.path"] = str(_model(place, path))
    for table in ("data", "eval"):
        section = getattr(cfg, table)
        for part, questions in (section.parts or {"": section}).items():
            if questions.source:
                key = f"{table}.parts.{part}.source" if part else f"{table}.source"
                small[key] = str(_rows(place, part or "math"))
    return config_of(cell, *(f"{key}={json.dumps(value)}" for key, value in small.items()))


def _model(place: Path, path: str) -> Path:
    """Of a published folder, or of what a cell exports: of the family of the cell's config."""
    if path.startswith("models/"):
        return place / path
    family = Path(path).parent.name
    student = "student" in family or "sft" in family
    if family.startswith("gemma3") or (family.startswith("cross") and student):
        return place / "gemma3"
    return place / ("student" if student else "policy")


def _rows(place: Path, name: str) -> Path:
    file = place / "data" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text((json.dumps(ROWS.get(name, MATH)) + "\n") * 4)
    return file


def first_of_each_config() -> list:
    seen = {(c.arguments[1], c.labels.get("attack", "")): c for c in reversed(cells())}
    return sorted(seen.values(), key=lambda c: c.name)


@pytest.mark.parametrize("cell", first_of_each_config(), ids=lambda c: c.name)
def test_every_configuration_plans_a_run(stand_ins, cell, capsys):
    code = dry_run(on_stand_ins(stand_ins, cell))
    said = capsys.readouterr().out
    assert code == 0, said


@pytest.mark.parametrize("name", ["cross-distillable@0", "cross-student-original@0"])
def test_the_pair_across_families_passes_every_check(stand_ins, name, capsys):
    """Models are loaded and run, texts are sampled, aligned, graded."""
    cell = next(c for c in cells() if c.name == name)
    os.environ["MASTER_PORT"] = str(free_port())
    code = check(on_stand_ins(stand_ins, cell))
    said = capsys.readouterr().out
    assert code == 0, said
