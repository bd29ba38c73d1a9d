"""configs/paper.toml with tiny stand-ins for every model and every file of data: all cells load,
and what each of their configurations plans and checks is sound; only weights are missing.
"""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from assets import free_port

from reflux.trainer.config.loader import load
from reflux.trainer.config.schema import Config
from reflux.trainer.matrix_file import read_matrix
from reflux.trainer.preflight.check import check
from reflux.trainer.preflight.dry_run import dry_run

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
# published folder -> the talker of its family; gemma3 has another tokenizer
STAND_INS = {
    "Qwen3-8B": "policy",
    "Qwen3-0.6B": "policy",
    "Qwen3-1.7B": "teacher",
    "gemma-3-12b-it-text": "proxy",
    "gemma-3-4b-it-text": "proxy",
    "gemma-3-1b-it": "proxy",
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
    (place / "models").mkdir()
    for published, name in STAND_INS.items():
        os.symlink(talkers / name, place / "models" / published)
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
    if cfg.phase == "calibrate":  # barely trained models also sample bytes that are no text
        small["calibration.max_unaligned"] = 1.0
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
        return place / "models" / "gemma-3-4b-it-text"
    return place / "models" / ("Qwen3-1.7B" if student else "Qwen3-8B")


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


@pytest.mark.parametrize("name", ["cross-distillable@0", "qwen3-student-original@0"])
def test_models_are_loaded_and_pass_every_check(stand_ins, name, capsys):
    """One pair across families; texts are sampled, aligned, graded."""
    cell = next(c for c in cells() if c.name == name)
    os.environ["MASTER_PORT"] = str(free_port())
    code = check(on_stand_ins(stand_ins, cell))
    said = capsys.readouterr().out
    assert code == 0, said
