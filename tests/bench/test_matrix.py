"""A matrix folder as a record: what the runs say of themselves, and no number from a dirty tree."""

import json

import pytest
from report_runs import write_matrix

from bench.matrix import collect, main
from reflux.trainer.studies.attack_report import write_report


@pytest.fixture
def folder(tmp_path):
    write_matrix(tmp_path / "m", {"original": 0.5, "distillable": 0.6})
    write_report(tmp_path / "m")
    for log in (tmp_path / "m").glob("*/run.jsonl"):
        log.write_text(
            log.read_text().replace('{"commit": "c0ffee"}', '{"commit": "c0ffee", "dirty": false}')
        )
    return tmp_path / "m"


def test_the_record_says_where_its_numbers_come_from(folder, tmp_path):
    (folder / "s-original-0" / "summary.json").unlink()
    assert main([str(folder), "toy_cpu"], tmp_path / "records") == 0
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "records").iterdir()]
    assert (
        record["commits_of_runs"] == {"c0ffee": 9}
        and record["not_ended"] == ["s-original-0"]
        and record["cells"] == 10
    )
    assert record["versions_of_runs"] == {"torch": "2"} and record["command"].startswith(
        "python -m bench.matrix"
    )
    assert (
        record["report"] == json.loads((folder / "report.json").read_text())
        and "knob" not in record
    )


def test_a_run_from_a_dirty_tree_is_refused(folder, tmp_path):
    log = folder / "t-original-1" / "run.jsonl"
    log.write_text(log.read_text().replace('"dirty": false', '"dirty": true'))
    with pytest.raises(
        SystemExit, match="1 runs, such as t-original-1, are of a tree with changes"
    ):
        main([str(folder), "toy_cpu"], tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_nothing_to_record_says_so(folder):
    for path in folder.glob("*/summary.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no run has ended"):
        collect(folder)
