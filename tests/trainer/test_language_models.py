"""The matrices of bench/PROTOCOL.md: their cells as they are, and run with tiny models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from assets import save_model, save_tokenizer, sentences, train_tokenizer
from fake_wordnet import write_wordnet

from reflux.trainer.cells import Cell, run_matrix
from reflux.trainer.config.loader import load
from reflux.trainer.matrix import only, read_matrix, write_reports

ROOT = Path(__file__).parents[2]
MATRICES = ("language_c_models", "language_c_report")  # task c
TASK_B = ("language_b_models", "language_b", "language_b_taught")
TASK_A = "language_a_models"
# of the attackers of one seed each runs against one teacher, which is enough to see that it runs
RUN = ("teacher-*", "student-*-seq_kd", "student-*-kd_*", "student-*-gkd_*", "student-*-cross_*")
RUN += ("student-undistillable-*", "diagnose-*", "side-by-side")
RUN_OF = {
    "language_c_report": RUN,
    "language_b": (
        "*-undistillable*",
        "teacher-original",
        "teacher-task_only",
        "knowledge-original",
    ),
    "language_b_taught": ("teacher-*", "student-undistillable-*"),
}
# smaller, in float32, and nothing that an untrained model would fail on
TINY = (
    "rollout.prompts=2",
    "rollout.max_tokens=4",
    "training.seq_len=192",  # a tiny tokenizer has more tokens
    "eval.limit=3",
    "eval.every=0",
    "training.mixed_precision_param='float32'",
    "log.quiet=true",
)
BY_PHASE = {
    "calibrate": ("steps=2", "rollout.group=4", "eval.samples=2", "calibration.max_unaligned=1.0"),
    "distill": ("steps=2", "eval.samples=1"),
    "evaluate": ("eval.samples=2",),
    "diagnose": ("data.limit=2", "diagnose.student_texts=2"),
}


def cells_of(name: str) -> list[Cell]:
    return read_matrix(ROOT / "configs" / f"{name}.toml", {}).cells


def config_of(cell: Cell):
    words = list(cell.arguments)
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return load(words[words.index("--config") + 1], sets)


@pytest.mark.parametrize("name", (*MATRICES, *TASK_B, TASK_A))
def test_every_cell_is_a_configuration_and_reads_only_what_a_cell_before_it_wrote(name):
    cells = cells_of(name)
    made = [f"{c.folder}/" for n in (*MATRICES, *TASK_B, TASK_A) for c in cells_of(n)]
    for cell in (c for c in cells if not c.module):
        cfg = config_of(cell)
        paths = [cfg.model.path, cfg.teacher.path, cfg.proxy.path, cfg.data.source, cfg.eval.source]
        paths += cfg.distill.more_teachers
        before = {c.folder for c in cells if c.name in cell.after}
        for path in (f"{p}/" for p in paths if p):
            assert any(path.startswith(folder) for folder in made), f"{cell.name}: {path}"
            own = next((c for c in cells if path.startswith(f"{c.folder}/")), None)
            reached = own is None or own.folder in before or _reaches(cells, cell, own)
            assert reached, f"{cell.name} reads {path} and does not wait for {own.name}"


def _reaches(cells: list[Cell], cell: Cell, wanted: Cell) -> bool:
    names = {c.name: c for c in cells}
    return any(n == wanted.name or _reaches(cells, names[n], wanted) for n in cell.after)


@pytest.mark.parametrize("name", ("language_c_report", "language_b", "language_b_taught"))
def test_every_attack_has_the_original_teacher_and_the_control(name):
    cells = cells_of(name)
    labels = [c.labels for c in cells if c.labels.get("role") == "student"]
    teachers = {"original", "task_only", "distillable", "undistillable"}
    for attack in {x["attack"] for x in labels}:
        assert {x["teacher"] for x in labels if x["attack"] == attack} == teachers


def tiny(cell: Cell) -> Cell:
    if "proxy_gate" in cell.module:  # shut for untrained models
        return replace(cell, arguments=(*cell.arguments, "--least", "-99"))
    if cell.module:
        return cell
    sets = (*TINY, *BY_PHASE[config_of(cell).phase])
    if cell.labels.get("role") == "student" and "gkd" not in cell.name:
        sets = (*sets, "distill.query_budget=4")
    if "verified" in cell.name:  # untrained models are never right
        sets = (*sets, "distill.correct_only=false")
    return replace(cell, arguments=(*cell.arguments, *(x for s in sets for x in ("--set", s))))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The two models of `make real` with 30 and 2 tiny layers, and the configurations beside."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    texts = sentences(200)
    for name, kind, size, layers in (
        ("smollm2-135m-instruct", "llama", 512, 30),
        ("gemma-3-270m", "gemma3_text", 384, 2),
    ):
        folder = tmp_path / "runs" / "real" / "models" / name
        types = {"layer_types": ["full_attention"] * layers} if kind == "gemma3_text" else {}
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        more = {"vocab_size": size, "tie_word_embeddings": True, **types}
        save_model(folder, kind, **sizes, **heads, **more)
        save_tokenizer(train_tokenizer(texts, size), folder)
    write_wordnet(tmp_path / "runs" / "real" / "wordnet", sentences=5000, nouns=400)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.matrices
def test_the_whole_matrix_runs_and_reports(stand_ins):
    report = run_and_report(stand_ins, MATRICES)
    assert set(report["teachers"]) == {"original", "task_only", "distillable", "undistillable"}
    assert len(report["students"]) == 12
    past = stand_ins / "runs" / "language" / "past"
    texts = json.loads((past / "seed-321" / "side-by-side" / "texts.json").read_text())
    assert len(texts["runs"]) == 4
    assert (past / "diagnoses.md").exists()


@pytest.mark.matrices
def test_task_b_runs_and_reports(stand_ins):
    report = run_and_report(stand_ins, TASK_B[:2], seeds=[331])
    assert set(report["teachers"]) == {"original", "undistillable", "task_only"}
    assert len(report["students"]) == 3
    knowledge = stand_ins / "runs" / "language" / "words" / "seed-331" / "knowledge-undistillable"
    assert "likelihood_sum" in (knowledge / "evaluation.json").read_text()
    taught = run_and_report(stand_ins, TASK_B[2:])  # from the teacher at eta = 0, merged
    assert set(taught["teachers"]) == {"original", "task_only", "distillable", "undistillable"}
    assert list(taught["students"]) == ["seq_kd"]


def run_and_report(folder: Path, names: tuple[str, ...], **overrides) -> dict:
    """Every cell of the first matrix and those of RUN of the last, which reports."""
    for name in names:
        more = overrides if name == names[-1] else {}
        matrix = read_matrix(folder / "configs" / f"{name}.toml", more)
        chosen = only(matrix.cells, RUN_OF.get(name, ("*",)))
        cells = [tiny(c) for c in chosen]
        if run_matrix(cells, parallel=2):  # the second time only what failed: a port that was taken
            print("again")
        failed = run_matrix(cells, parallel=2)
        logs = {n: _console(cells, n) for n in failed}
        assert not failed, "\n".join(f"{n}: {log}" for n, log in logs.items())
    from reflux.trainer.matrix import _write_cells

    _write_cells(matrix)
    write_reports(matrix)
    return json.loads((matrix.folder / "report.json").read_text())


def _console(cells: list[Cell], name: str) -> str:
    folder = next(c.folder for c in cells if c.name == name)
    log = folder / "console.log"
    return log.read_text()[-1500:] if log.exists() else "not started"
