"""A matrix folder as a record: the runs' own commits and versions, and no number from a dirty
tree.
"""

import json

import pytest
from report_runs import edit_logs, write_matrix

from bench.matrix import collect, main
from reflux.trainer.studies.attack_report import write_report


@pytest.fixture
def folder(tmp_path):
    write_matrix(tmp_path / "m", {"original": 0.5, "distillable": 0.6})
    write_report(tmp_path / "m")
    set_dirty(tmp_path / "m", "", False)
    return tmp_path / "m"


def set_dirty(folder, name, dirty):
    code = {"commit": "c0ffee", "dirty": dirty}
    edit_logs(folder, [name], lambda row: row | {"code": code} if "schema" in row else row)


def test_a_record_holds_the_reports_and_where_their_numbers_come_from(folder, tmp_path):
    (folder / "s-original-0" / "summary.json").unlink()
    (folder / "knob.json").write_text('{"points": []}')  # of an older version
    assert main([str(folder), "toy_cpu"], tmp_path / "records") == 0
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "records").iterdir()]
    assert record["commits_of_runs"] == {"c0ffee": 9} and record["not_ended"] == ["s-original-0"]
    assert record["cells"] == 10 and record["versions_of_runs"] == {"torch": "2"}
    assert record["command"].startswith("python -m bench.matrix")
    assert record["report"] == json.loads((folder / "report.json").read_text())
    assert record["knob"] == {"points": []} and "eta_sweep" not in record


def test_texts_are_recorded_seed_by_seed_and_alone_where_they_are_named(folder):
    assert "texts" not in collect(folder)
    with pytest.raises(ValueError, match="no texts; there are report"):
        collect(folder, ["texts"])
    for seed in (1, 2):
        cell = folder / f"seed-{seed}" / "side-by-side"
        cell.mkdir(parents=True)
        (cell / "texts.json").write_text(json.dumps({"reader": f"r{seed}"}))
    both = {"1": {"reader": "r1"}, "2": {"reader": "r2"}}
    assert collect(folder)["texts"] == both and "report" in collect(folder)
    alone = collect(folder, ["texts"])
    assert alone["texts"] == both and "report" not in alone


def test_a_run_from_a_dirty_tree_is_not_recorded(folder, tmp_path):
    set_dirty(folder, "t-original-1", True)
    with pytest.raises(
        SystemExit, match="1 runs, such as t-original-1, are of a tree with changes"
    ):
        main([str(folder), "toy_cpu"], tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_folder_without_a_finished_run_is_an_error(folder):
    for path in folder.glob("*/summary.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no run has ended"):
        collect(folder)


def test_an_empty_log_of_a_run_that_has_ended_is_named(folder, tmp_path):
    (folder / "t-original-1" / "run.jsonl").write_text("")
    with pytest.raises(SystemExit, match="t-original-1: run.jsonl is empty"):
        main([str(folder), "toy_cpu"], tmp_path / "records")


def test_the_reports_of_families_are_recorded_by_their_folders(folder):
    for family in ("a", "b"):
        (folder / f"report-{family}").mkdir()
        (folder / f"report-{family}" / "report.json").write_text(json.dumps({"family": family}))
    record = collect(folder)
    assert record["report-a"] == {"family": "a"} and record["report-b"] == {"family": "b"}
    assert set(collect(folder, ["report-b"])) & {"report", "report-a", "report-b"} == {"report-b"}
