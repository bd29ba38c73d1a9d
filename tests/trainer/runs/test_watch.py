"""The command that writes a page, once or as long as a run goes on."""

import threading

import pytest
from page_runs import calibration, metrics, record, write_calibration

from reflux.trainer.runs import watch
from reflux.trainer.runs.watch import PageWriter, follow, main, write_page


def test_the_command_writes_a_page_and_prints_its_path(tmp_path, capsys):
    write_calibration(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_a_folder_of_something_else_is_refused_in_words(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert "neither run.jsonl nor matrix.json is there" in capsys.readouterr().err


def test_following_ends_with_the_run(tmp_path):
    page = tmp_path / "report.html"
    with record(calibration(tmp_path)) as log:
        log(1, metrics(1), None)
        follower = threading.Thread(target=follow, args=(tmp_path, 0.01))
        follower.start()
        while not page.is_file():
            follower.join(0.01)
        assert 'http-equiv="refresh"' in page.read_text()
        log(2, metrics(2), None)
    follower.join(20)
    assert not follower.is_alive() and ">2 of 6<" in page.read_text()
    assert 'http-equiv="refresh"' not in page.read_text()


def test_a_run_writes_its_own_page_at_evaluations_and_at_the_end(tmp_path):
    page = tmp_path / "report.html"
    with record(calibration(tmp_path), write_page=PageWriter(tmp_path)) as log:
        log(1, metrics(1), None)
        assert not page.exists()
        log.event("eval", **{"eval/greedy": 0.5})
        assert ">running<" in page.read_text()
        log(2, metrics(2), None)
    assert ">done<" in page.read_text() and ">2 of 6<" in page.read_text()


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(watch, "write_run_page", fails)
    writer = PageWriter(tmp_path)
    writer()
    writer()
    assert [r.message for r in caplog.records] == ["no report.html: OSError: disk full"]


def test_write_page_takes_a_matrix_too(tmp_path):
    (tmp_path / "matrix.json").write_text('{"title": "t", "cells": []}')
    assert write_page(tmp_path).read_text().count("<h1>t</h1>") == 1
