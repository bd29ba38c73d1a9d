import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_matrix import write_toy

from reflux.trainer.cli import main as reflux
from reflux.trainer.matrix import REPORTS, main, run_matrix, write_reports
from reflux.trainer.matrix_file import read_matrix
from reflux.trainer.runs.run_folder import CHECKPOINTS_REMOVED

ROOT = Path(__file__).parents[2]
TOY = """
import json, pathlib, sys
def main(arguments):
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    word = arguments[0]
    with open(out.parent / "order.txt", "a") as f:
        f.write(word + "\\n")
    if word == "stopped":  # as a run that a guard ends
        summary = {"exit_code": 4, "stopped": "KL above 0.1"}
        (out / "summary.json").write_text(json.dumps(summary))
    (out / "checkpoint/step-1").mkdir(parents=True, exist_ok=True)
    if word != "bare":
        (out / "export").mkdir(exist_ok=True)
    return {"bad": 3, "stopped": 4}.get(word, 0)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_cell.py").write_text(TOY)
    monkeypatch.setattr("reflux.trainer.cells.PRELOAD", [])  # a toy needs no torch
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    write_toy(tmp_path)
    return tmp_path


def test_only_some_cells_and_what_they_wait_for(toy, capsys):
    file = str(toy / "m.toml")
    assert main([file, "--only", "b-2", "--dry-run"]) == 0
    assert capsys.readouterr().out.count(" -m toy_cell") == 4  # a and b-2 of two seeds
    with pytest.raises(SystemExit):
        main([file, "--only", "c*"])
    assert "--only 'c*' matches no cell" in capsys.readouterr().err
    assert main([file, "--only", "b-2", "--only", "a", "--set", "seeds=[1]"]) == 0
    assert "2 of 2 cells done" in capsys.readouterr().out
    done = {p.parent.name for p in (toy / "runs").rglob("summary.json")}
    assert done == {"a", "b-2"}
    assert len(json.loads((toy / "runs" / "matrix.json").read_text())["cells"]) == 3


def test_a_matrix_says_what_it_is_for_unless_all_is_done(toy, capsys):
    path = toy / "m.toml"
    path.write_text('says = "what this is for"\n' + path.read_text())
    for expect in (True, False):
        assert main([str(path), "--set", "seeds=[0]"]) == 0
        assert ("what this is for" in capsys.readouterr().out) is expect


def test_prerequisites_run_first_and_done_cells_are_skipped(toy):
    cells = read_matrix(toy / "m.toml", {"seeds": [0]}).cells
    assert run_matrix(cells, 2) == []
    order = (toy / "runs/seed-0/order.txt").read_text().split()
    assert order[0] == "a" and sorted(order[1:]) == ["b1", "b2"]
    (cells[1].folder / "summary.json").unlink()
    assert run_matrix(cells, 2) == []
    # only what was missing ran again
    assert (toy / "runs/seed-0/order.txt").read_text().split()[3:] == ["b1"]


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_of_done_cells_are_kept_or_not(toy, keep):
    """A failed cell and one that a guard ended keep theirs."""
    path = toy / "m.toml"
    text = path.read_text().replace('arguments = ["a"]', 'arguments = ["stopped"]')
    path.write_text(text + '[[cell]]\nname = "c"\nmodule = "toy_cell"\narguments = ["bad"]\n')
    overrides = {"seeds": [0]} | ({} if keep else {"keep_checkpoints": False})
    cells = read_matrix(path, overrides).cells
    assert run_matrix(cells, 2) == ["c@0"]
    left = [c.name for c in cells if (c.folder / "checkpoint").exists()]
    assert left == (["a@0", "b-1@0", "b-2@0", "c@0"] if keep else ["a@0", "c@0"])
    with pytest.raises(ValueError, match="keep_checkpoints = 'no'; want true or false"):
        read_matrix(path, {"keep_checkpoints": "no"})


def test_checkpoints_that_are_needed_stay_whatever_the_matrix_says(toy):
    """Those of a cell without an export, and those that another cell names."""
    path = toy / "m.toml"
    text = path.read_text().replace('arguments = ["a"]', 'arguments = ["bare"]')
    reader = 'arguments = ["c", "{folder}/b-1/checkpoint/step-1"]'
    path.write_text(text + f'[[cell]]\nname = "c"\nmodule = "toy_cell"\n{reader}\n')
    cells = read_matrix(path, {"seeds": [0], "keep_checkpoints": False}).cells
    assert run_matrix(cells, 2) == []
    left = [c.name for c in cells if (c.folder / "checkpoint/step-1").exists()]
    assert left == ["a@0", "b-1@0"]
    assert "no export" in (cells[0].folder / "console.log").read_text()
    marked = [c.name for c in cells if (c.folder / CHECKPOINTS_REMOVED).exists()]
    assert marked == ["b-2@0", "c@0"]


def test_checkpoints_of_a_cell_that_was_killed_before_it_removed_them(toy, capfd):
    cells = read_matrix(toy / "m.toml", {"seeds": [0]}).cells
    assert run_matrix(cells, 2) == []
    for file in cells[0].folder.joinpath("export").iterdir():
        file.unlink()
    cells[0].folder.joinpath("export").rmdir()
    capfd.readouterr()
    again = read_matrix(toy / "m.toml", {"seeds": [0], "keep_checkpoints": False}).cells
    assert run_matrix(again, 2) == [] and "stays" not in capfd.readouterr().out
    left = [c.name for c in again if (c.folder / "checkpoint").exists()]
    assert left == ["a@0"], "without an export"
    assert (toy / "runs/seed-0/order.txt").read_text().split()[3:] == [], "nothing ran again"


def test_a_failure_stops_only_the_cells_behind_it(toy):
    path = toy / "m.toml"
    path.write_text(
        path.read_text().replace('arguments = ["a"]', 'arguments = ["bad"]')
        + '[[cell]]\nname = "c"\nmodule = "toy_cell"\narguments = ["c"]\n'
    )
    cells = read_matrix(path, {"seeds": [5]}).cells
    assert sorted(run_matrix(cells, 2)) == ["a@5", "b-1@5", "b-2@5"]
    assert sorted((toy / "runs/seed-5/order.txt").read_text().split()) == ["bad", "c"]


def test_what_a_guard_ended_has_not_failed_and_the_cells_behind_it_say_so(toy, capsys):
    path = toy / "m.toml"
    path.write_text(path.read_text().replace('arguments = ["a"]', 'arguments = ["stopped"]'))
    assert main([str(path), "--set", "seeds=[0]"]) == 4
    out, note = (
        capsys.readouterr().out,
        "a@0, which comes before, was ended by a guard (KL above 0.1)",
    )
    assert "a@0: ended by a guard (KL above 0.1)" in out and "3 of 3 cells done" in out
    assert f"b-1@0: {note}" in out and "a guard ended 1 of them: a@0. Their exports" in out
    for name in ("b-1", "b-2"):
        log = (toy / "runs/seed-0" / name / "console.log").read_text()
        assert "-m toy_cell b" in log.split("\n")[0] and note in log
    order = (toy / "runs/seed-0/order.txt").read_text()
    assert main([str(path), "--set", "seeds=[0]"]) == 4, "done cells end as they ended"
    assert (toy / "runs/seed-0/order.txt").read_text() == order


def test_a_done_cell_whose_gate_did_not_hold_fails_again_without_a_start(toy, capsys):
    for name, code in (("a", 3), ("b-1", 0), ("b-2", 4)):
        (toy / "runs/seed-0" / name).mkdir(parents=True)
        summary = {"exit_code": code, "stopped": "KL" if code == 4 else None}
        (toy / "runs/seed-0" / name / "summary.json").write_text(json.dumps(summary))
    assert main([str(toy / "m.toml"), "--set", "seeds=[0]"]) == 1
    out = capsys.readouterr().out
    assert "a@0: ended with exit code 3, see" in out and "2 of 3 cells done" in out


def test_a_report_is_written_for_each_label_that_a_finished_cell_carries(toy, monkeypatch, capsys):
    (toy / "toy_report.py").write_text("def write(folder):\n    return f'of {folder.name}'\n")
    reports = {"attack": "toy_report:write", "eta": "no_such_module:write"}
    monkeypatch.setattr("reflux.trainer.matrix.REPORTS", reports)
    matrix = read_matrix(toy / "m.toml", {"seeds": [0]})
    for cell, done in zip(matrix.cells, (True, False, False)):
        cell.folder.mkdir(parents=True)
        if done:
            (cell.folder / "summary.json").write_text("{}")
    (matrix.cells[1].folder / "summary.json").touch()  # its writer was killed
    write_reports(matrix)
    assert capsys.readouterr().out == ""  # no finished cell has the label
    (matrix.cells[1].folder / "summary.json").write_text("{}")
    write_reports(matrix)
    assert capsys.readouterr().out == "of runs\n"


@pytest.mark.parametrize(
    "fails, told",
    [
        ('raise ValueError("nothing to show")', "no toy_report (label attack): nothing to show\n"),
        ("return folder.no_such", "Traceback"),
    ],
)
def test_a_report_that_cannot_be_written_keeps_no_other_back(toy, monkeypatch, capsys, fails, told):
    """The cells are done; the exit code and a line say that a report is missing."""
    text = f"def write(folder):\n    return 'whole'\n\ndef fail(folder):\n    {fails}\n"
    (toy / "toy_report.py").write_text(text)
    reports = {"attack": "toy_report:fail", "role": "toy_report:write"}
    monkeypatch.setattr("reflux.trainer.matrix.REPORTS", reports)
    monkeypatch.delitem(sys.modules, "toy_report", raising=False)
    monkeypatch.delenv("REFLUX_TRACEBACK", raising=False)
    assert main([str(toy / "m.toml"), "--set", "seeds=[0]"]) == 1
    out, err = capsys.readouterr()
    assert "\nwhole\n" in out and "3 of 3 cells done" in out
    assert told in err and ("Traceback" in err) is (told == "Traceback")
    assert "no toy_report (label attack): " in err
    assert reflux(["report", str(toy / "runs")]) == 1
    assert "whole\n" in capsys.readouterr().out


def test_a_set_that_is_no_toml_is_told_how_to_be_written(toy, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(toy / "m.toml"), "--set", "folder=runs/x"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--set folder=runs/x is no TOML" in said
    assert "want KEY=VALUE, a text in quotes" in said


@pytest.mark.parametrize("target", REPORTS.values())
def test_every_report_can_be_loaded(target):
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_ctrl_c_is_passed_on_and_the_next_call_goes_on(toy):
    (toy / "toy_cell.py").write_text(
        TOY.replace("    return 3", "    import time; time.sleep(0.3)\n    return 3")
    )
    env = os.environ | {"PYTHONPATH": str(toy)}
    words = [str(toy / "m.toml"), "--set", "seeds=[0]", "--set", "parallel=1"]
    command = [sys.executable, "-m", "reflux.trainer.matrix", *words]
    fast = "import sys; from reflux.trainer import cells, matrix; cells.PRELOAD = []; "
    process = subprocess.Popen(
        [sys.executable, "-c", fast + "sys.exit(matrix.main())", *words],
        env=env,
        cwd=toy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    order = toy / "runs/seed-0/order.txt"
    for _ in range(600):
        if order.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(2)
    assert process.wait(300) == 130, process.stdout.read()
    assert subprocess.run(command, env=env, cwd=toy, capture_output=True).returncode == 0
    assert set(order.read_text().split()) == {"a", "b1", "b2"}
    assert {c["name"] for c in json.loads((toy / "runs/matrix.json").read_text())["cells"]} == {
        "a@0",
        "b-1@0",
        "b-2@0",
    }


def test_done_cells_with_other_arguments_are_refused_and_named(toy, capsys):
    path, one_seed = toy / "m.toml", ["--set", "seeds=[0]"]
    assert main([str(path), *one_seed]) == 0 and main([str(path), *one_seed]) == 0
    written = (toy / "runs/matrix.json").read_text()
    path.write_text(path.read_text().replace('arguments = ["b{x}"]', 'arguments = ["c{x}"]'))
    with pytest.raises(SystemExit) as ended:
        main([str(path), *one_seed])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "runs/seed-0/b-1: arguments" in said, said
    assert "seed-0/a:" not in said and "--set folder=" in said
    assert (toy / "runs/matrix.json").read_text() == written
    assert main([str(path), *one_seed, "--set", f'folder="{toy / "other"}"']) == 0


def test_done_cells_are_compared_again_before_the_reports(toy, monkeypatch, capsys):
    """What this start did anew, a cell that was done before may have been made from."""
    summary = toy / "runs/seed-0/b-1/summary.json"

    def run(*given):
        failed = run_matrix(*given)
        summary.write_text(summary.read_text().replace("b1", "b9"))
        return failed

    reported = []
    monkeypatch.setattr("reflux.trainer.matrix.run_matrix", run)
    monkeypatch.setattr("reflux.trainer.matrix.write_reports", reported.append)
    with pytest.raises(SystemExit) as ended:
        main([str(toy / "m.toml"), "--set", "seeds=[0]"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "runs/seed-0/b-1: arguments (toy_cell b9" in said, said
    assert not reported
