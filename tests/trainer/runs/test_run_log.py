"""A reader that takes a log as it is: growing, torn, damaged, replaced."""

import json
import math

from page_runs import calibration, metrics, record, write_calibration

from reflux.trainer.runs.logger import load_run
from reflux.trainer.runs.run_log import LogTail, RunLog, parsed, series, sources_of


def test_it_reads_what_the_strict_reader_reads(tmp_path):
    write_calibration(tmp_path)
    log, strict = RunLog(tmp_path), load_run(tmp_path)
    assert log.refresh() and log.damaged == 0
    assert [s["step"] for s in log.steps] == [s["step"] for s in strict.steps]
    assert [e["event"] for e in log.events] == [e["event"] for e in strict.events]
    assert log.head == strict.head and log.summary == strict.summary
    assert not log.refresh(), "nothing was added"


def test_a_growing_file_is_read_on_and_a_torn_end_waits(tmp_path):
    path = tmp_path / "x.jsonl"
    tail = LogTail(path)
    assert not tail.read()
    path.write_text('{"step": 1}\n{"ste')
    assert tail.read() and tail.lines == [{"step": 1}] and tail.damaged == 0
    with open(path, "a") as file:
        file.write('p": 2}\n')
    assert tail.read() and [x["step"] for x in tail.lines] == [1, 2]
    assert not tail.read()


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\nxx\n[1]\n\n\xff\xfe{\n{"step": 2, "a": "NaN"}\n')
    tail = LogTail(path)
    assert tail.read() and tail.damaged == 3
    assert [x["step"] for x in tail.lines] == [1, 2] and math.isnan(tail.lines[1]["a"])


def test_a_file_that_a_resume_has_cut_is_read_anew(tmp_path):
    cfg = calibration(tmp_path)
    with record(cfg) as log:
        for step in range(1, 6):
            log(step, metrics(step), None)
    reader = RunLog(tmp_path)
    reader.refresh()
    with record(cfg, resumed_step=3) as log:
        log(4, metrics(4), None)
        assert reader.refresh()
    assert [s["step"] for s in reader.steps] == [1, 2, 3, 4]
    assert reader.refresh() and reader.summary["step"] == 4


def test_a_folder_without_a_log_is_empty_not_an_error(tmp_path):
    log = RunLog(tmp_path)
    assert not log.refresh() and log.head == {} and log.steps == [] and log.written is None


def test_samples_are_those_of_the_last_steps_newest_first(tmp_path):
    rows = [{"step": step, "text": f"{step}.{i}"} for step in range(1, 20) for i in range(4)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    log = RunLog(tmp_path)
    log.refresh()
    assert [s["text"] for s in log.samples[:5]] == ["19.0", "19.1", "19.2", "19.3", "18.0"]
    assert len(log.samples) == 24


def test_a_series_is_what_is_a_number():
    lines = [{"step": 1, "a": 2}, {"step": 2, "a": "x"}, {"step": 3, "a": True}, {"step": 4}]
    assert list(series(lines, "a")) == [(1, 2.0)]


def test_a_text_that_is_the_name_of_no_number_stays_a_text():
    line = {"text": "NaN", "prompt": "Infinity", "answer": "-Infinity", "extracted": "NaN"}
    read = parsed(json.dumps({**line, "reward": "NaN", "r_cal": "-Infinity"}).encode())
    assert {k: read[k] for k in line} == line
    assert math.isnan(read["reward"]) and read["r_cal"] == -math.inf


def test_the_sources_of_parts_are_those_of_their_section():
    parts = {"a": {"source": "a.jsonl"}, "b": {"source": ["b.jsonl", "c.jsonl"]}}
    cfg = {"data": {"source": "", "parts": parts}, "eval": {"source": "d.jsonl"}}
    assert sources_of(cfg, "data") == "a.jsonl, b.jsonl, c.jsonl"
    assert sources_of(cfg, "eval") == "d.jsonl"
    assert sources_of({}, "eval") == sources_of({"eval": {"source": ""}}, "eval") == ""
