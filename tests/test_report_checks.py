"""Defences and the checks of A5, from runs whose numbers are known."""
import json

import pytest
from test_report import write_matrix, write_run

from reflux.trainer.report import write_report
from reflux.trainer.report_checks import check_lines, defence_rows
from reflux.trainer.report_entries import cost, finished_entries


def add(folder, cells, head=None):
    """More runs into a matrix folder, both seeds of each."""
    matrix = json.loads((folder / "matrix.json").read_text())
    for labels, accuracy in cells:
        for seed in "01":
            name = "-".join(filter(None, labels.values())).replace(" ", "_")
            cell = write_run(folder / f"{name}-{seed}", labels, accuracy, accuracy, seed=seed)
            log = folder / cell["folder"] / "run.jsonl"
            log.write_text(log.read_text().replace('"config": {}', f'"config": {json.dumps(head or {})}')
                           .replace('"eval/greedy"', f'"eval/likelihood_sum": {accuracy}, "eval/greedy"'))
            matrix["cells"].append(cell)
    (folder / "matrix.json").write_text(json.dumps(matrix))


@pytest.fixture
def folder(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}, start=0.1)
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    for cell in matrix["cells"]:
        if cell["labels"].get("attack") == "kd":
            cell["labels"]["attack"] = "seq_kd"
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    return tmp_path


def test_defences_stand_beside_the_undefended_original(folder):
    add(folder, [({"role": "defence", "defence": "poe"}, 0.7), ({"role": "student", "teacher": "original", "attack": "seq_kd", "defence": "poe"}, 0.3),
                 ({"role": "student", "teacher": "original", "attack": "answers_only"}, 0.9)])
    rows = defence_rows(finished_entries(folder))
    assert list(rows) == ["none", "undistillable", "answers only, reasoning withheld", "poe"]
    assert rows["poe"]["served"]["mean"] == pytest.approx(0.7) and rows["poe"]["student"]["mean"] == pytest.approx(0.3)
    assert rows["poe"]["change"]["mean"] == pytest.approx(-0.4)
    assert rows["poe"]["score"]["mean"] == pytest.approx(0.5)  # (0.3 - 0.1) / (0.5 - 0.1)
    assert rows["none"]["served"]["mean"] == pytest.approx(0.9) and rows["none"]["student"]["mean"] == pytest.approx(0.5)
    assert rows["answers only, reasoning withheld"]["change"]["mean"] == pytest.approx(0.8)
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "| poe | 0.700 +- 0.000 | 0.300 +- 0.000 | -40% | 0.50 [" in report
    found = json.loads((folder / "report.json").read_text())
    assert found["students"]["seq_kd"]["original"]["sampled"]["mean"] == pytest.approx(0.5)  # the defended one is not among them


def test_without_another_defence_there_is_no_table(folder):
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "## Other defences" in report and "| undistillable | 0.890" in report and "product" not in report
    assert "## Attacks in detail" in report


@pytest.mark.parametrize("repaired, word", [(0.2, "survives"), (0.45, "does not survive")])
def test_a_drop_that_a_repair_brings_back_does_not_survive(folder, repaired, word):
    add(folder, [({"role": "repair", "teacher": "original"}, 0.5), ({"role": "repair", "teacher": "undistillable"}, repaired)],
        {"data": {"limit": 50}})
    (line,) = check_lines(finished_entries(folder))
    assert line.startswith("after 50 worked examples") and line.endswith(word) and f"{repaired:.3f}" in line


@pytest.mark.parametrize("other, word", [(0.3, "lower, too"), (0.6, "not lower")])
def test_likelihood_agrees_or_does_not(folder, other, word):
    add(folder, [({"role": "choices", "teacher": "original"}, 0.5), ({"role": "choices", "teacher": "undistillable"}, other)])
    (line,) = check_lines(finished_entries(folder))
    assert word in line and f"student of undistillable {other:.3f}" in line


@pytest.mark.parametrize("distill, written, read", [
    ({"objective": "nll", "source": "teacher", "on_policy": 0.0, "queries": 30}, 60, 0),
    ({"objective": "nll", "source": "teacher", "on_policy": 0.0, "queries": 0}, 80, 0),
    ({"objective": "kl", "source": "teacher", "on_policy": 0.25, "queries": 0}, 60, 80),
    ({"objective": "kl", "source": "dataset", "on_policy": 0.0, "queries": 0}, 0, 80),
    ({"objective": "span", "source": "teacher", "on_policy": 0.0, "queries": 0}, 80, 0)])
def test_what_an_attack_asks_of_its_teacher(folder, distill, written, read):
    add(folder, [({"role": "student", "teacher": "original", "attack": "x"}, 0.5)],
        {"steps": 10, "rollout": {"prompts": 4, "group": 2}, "distill": distill})
    (entry, _) = [e for e in finished_entries(folder) if e.labels.get("attack") == "x"]
    assert cost(entry) == {"written": written, "read": read, "seconds": 10.0}
