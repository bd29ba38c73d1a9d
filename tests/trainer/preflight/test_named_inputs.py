"""Folders and files that are not there are named by the option that wants them."""

from dataclasses import replace
from pathlib import Path

import pytest

from reflux.trainer.config import loader
from reflux.trainer.preflight.named_inputs import check_named_inputs

ROOT = Path(__file__).parents[3]
PATHS = ("model.path=student", "teacher.path=teacher")
SOURCES = ("task.name=exact", "data.source=rows.jsonl", "eval.source=questions.csv")
SERVED = ("teacher.source=server", 'teacher.servers=["http://h:1"]', "distill.tail=bucket")


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("rows.jsonl", "questions.csv"):
        (tmp_path / name).touch()


def load(*words):
    return loader.load(ROOT / "configs/debug_cpu_distill.toml", (*PATHS, *SOURCES, *words))


@pytest.mark.parametrize(
    "source",
    [
        "rows.jsonl",
        "*.jsonl",
        ("rows.jsonl",),
        "a/b",
        "reasoning_gym:x?size=1",
        "a.b:json",
        "d.csv",
    ],
)
def test_what_is_there_or_cannot_be_known_passes(source, tmp_path):
    (tmp_path / "d.csv").mkdir()
    cfg = load()
    check_named_inputs(replace(cfg, data=replace(cfg.data, source=source)))


@pytest.mark.parametrize(
    "word, says",
    [
        ("model.path=studnet", "model.path = 'studnet': no config.json there"),
        ("teacher.path=studnet", "teacher.path = 'studnet': no config.json there"),
        ("data.source=row.jsonl", "'row.jsonl': .*no such file, did you mean rows.jsonl"),
        ("data.source=org/rows.parquet", "org/rows.parquet: no such file. Want .jsonl"),
        ("data.source=nothing-*.jsonl", "data.source = .*: no file matches this pattern"),
        ('data.source=["rows.jsonl", "b"]', "data.source = .*: b: no such file; a list"),
        ("eval.source=questions.tsv", "eval.source = .*, did you mean questions.csv"),
        ("eval.parts.sums.source=x.json", "eval.parts.sums.source = 'x.json': x.json: no such"),
    ],
)
def test_what_is_not_there_is_named_by_its_option(word, says):
    words = ("eval.source=", word) if ".parts." in word else (word,)
    with pytest.raises(ValueError, match=says):
        check_named_inputs(load(*words))


def test_no_folder_is_looked_for_where_the_model_is_elsewhere():
    check_named_inputs(load(*SERVED, "distill.top_k=4", "teacher.path=gone"))


def test_a_phase_that_reads_no_data_does_not_want_it():
    cfg = loader.load(ROOT / "configs/debug_cpu_evaluate.toml", (PATHS[0], *SOURCES[1:]))
    check_named_inputs(replace(cfg, data=replace(cfg.data, source="gone.jsonl")))
