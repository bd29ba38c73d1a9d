"""The page of a run: what it says, safe against its own content, and as it should be in a real
browser where one is.
"""

import html
import json
import re
from html.parser import HTMLParser

from browser import Browser, needs_browser
from page_runs import GUARD, HOSTILE, calibration, evaluation, metrics, record, write_calibration

from reflux.trainer.runs.run_log import RunLog
from reflux.trainer.runs.run_page import render_run_page, status, write_run_page

OPEN = {"meta", "link", "img", "br", "input"}


def page_of(folder, **options) -> str:
    log = RunLog(folder)
    log.refresh()
    return render_run_page(log, **options)


def words_of(page) -> str:
    """The text of the page."""
    text = re.sub(r"<style>.*?</style>|<title>.*?</title>", "", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)))


class Balanced(HTMLParser):
    """Fails where tags do not match."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "b") or ("style" in dict(attributes) and tag == "b")
        self.open += [tag] if tag not in OPEN else []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_says_what_happened(tmp_path):
    write_calibration(tmp_path / "run")
    words = words_of(page_of(tmp_path / "run"))
    for part in (
        "Calibration: run",
        "The teacher models/teacher, trained by reinforcement on data/sums.jsonl: distillable",
        f"stopped ended by a guard: {GUARD}",
        "The weights went back to those of step 5, which are the export",
        "alarm , step 3",
        "30% of the texts are truncated",
        "steps 6 of 6",
        "not measured: entropy is measured where the phase calibrates",
        "step 6, correct, task reward 1, r_cal -1.25",
        "the grader took '7' for the answer",
        "trainer/main.py --config x.toml",
        "1 of 6 values of norm are not finite: gaps",
        "What it read, by SHA-256: 1 files",
    ):
        assert part in words, part


def test_the_last_evaluation_stands_with_its_interval(tmp_path):
    write_calibration(tmp_path)
    words = words_of(page_of(tmp_path))
    assert "greedy 0.500 [0.400, 0.600] start 0.400" in words
    assert "start, this run's first evaluation" in words
    assert "chance: not measured, because the questions have no options" in words
    assert "original: not measured, because eval.against names no run" in words


def test_a_span_has_its_colour_and_its_number(tmp_path):
    write_calibration(tmp_path, steps=2)
    page = page_of(tmp_path)
    spans = re.findall(r'class="(\w+)" style="--a:([\d.]+)" data-n="(.*?)"', page)
    assert [s[0] for s in spans] == ["plus", "minus", "none", "plus"]
    assert [s[1] for s in spans] == ["0.125", "0.500", "0", "0.062"], "the largest has full colour"
    assert html.unescape(spans[1][2]) == "'answer': -2.000 nats"
    assert "Colour is r_cal of each span" in page


def test_what_a_run_wrote_stays_text(tmp_path):
    write_calibration(tmp_path)
    page = page_of(tmp_path)
    assert HOSTILE not in page and html.escape("<b>bold</b>") in page
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"https?://|<script|src=\"(?!data:)|url\(", page)


def test_damaged_lines_are_counted_on_the_page(tmp_path):
    write_calibration(tmp_path)
    with open(tmp_path / "run.jsonl", "ab") as file:
        file.write(b"not json\n\xff\n" + b'{"step": 7, "los')
    words = words_of(page_of(tmp_path))
    assert "2 damaged line(s) of the log" in words and "steps 6 of 6" in words


def test_options_that_differ_come_first(tmp_path):
    write_calibration(tmp_path)
    page = page_of(tmp_path)
    changed = re.findall(r'<tr class="changed"><td>(.*?)</td><td>(.*?)</td>', page)
    assert ("calibration.mode", "distillable") in changed and ("steps", "6") in changed
    assert "calibration.score_norm" not in dict(changed)
    assert "<td>calibration.score_norm</td>" in page


def test_every_state_of_a_run_has_its_word(tmp_path):
    def state(folder):
        log = RunLog(folder)
        log.refresh()
        return status(log)

    cfg = calibration(tmp_path / "a")
    with record(cfg) as log:
        log(1, metrics(1), None)
        assert state(tmp_path / "a").word == "running"
        assert "http-equiv" in page_of(tmp_path / "a", refresh=True)
        assert 'http-equiv="refresh"' in page_of(tmp_path / "a", refresh=True)
        log.event("interrupted", resume="x", directory="y")
        log.to_be_continued = True
    assert state(tmp_path / "a").word == "interrupted"
    try:
        with record(cfg, resumed_step=1) as log:
            assert state(tmp_path / "a").word == "running"
            raise ValueError("no space left")
    except ValueError:
        pass
    assert state(tmp_path / "a").word == "failed"
    assert "no space left" in state(tmp_path / "a").reason
    with record(cfg, resumed_step=1) as log:
        pass
    assert state(tmp_path / "a").word == "done"
    assert 'http-equiv="refresh"' not in page_of(tmp_path / "a", refresh=True)


def test_an_empty_or_strange_folder_still_has_a_page(tmp_path):
    assert "no log yet" in words_of(page_of(tmp_path))
    (tmp_path / "run.jsonl").write_text('{"step": 1}\n{"event": "eval"}\n{"event": "stopped"}\n')
    (tmp_path / "samples.jsonl").write_text('{"spans": 3}\n{"spans": [["a"], ["b", "NaN"]]}\n')
    assert "Run: " in words_of(page_of(tmp_path))


def test_an_evaluation_shows_answers_and_rules(tmp_path):
    with record(calibration(tmp_path, steps=0)) as log:
        log.event("eval", **evaluation(0.25))
        log.event("accept", **{"accept/good": "failed: sampled 0.250; want at least 0.900"})
        log.exit_code = 3
    (tmp_path / "predictions").mkdir()
    rows = [
        {"mode": "greedy", "prompt": i, "text": f"text {i}", "correct": i > 1, "reward": 1.0}
        for i in range(3)
    ]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "predictions" / "step-0.jsonl").write_text(text)
    words = words_of(page_of(tmp_path))
    assert "prompt number 2 of eval.source" in words, "a folder without its questions"
    question = json.dumps({"prompt": 2, "text": "What is 2 + 2?"})
    (tmp_path / "questions.jsonl").write_text(f"{question}\nhalf a li")
    words = words_of(page_of(tmp_path))
    assert "prompt What is 2 + 2?" in words and "number 2 of" not in words
    assert "good failed: sampled 0.250" in words and "an acceptance rule does not hold" in words
    assert words.index("text 2") < words.index("text 0"), "correct ones first"


def test_the_file_is_written_whole_and_alone(tmp_path):
    write_calibration(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    log = RunLog(tmp_path)
    log.refresh()
    assert write_run_page(log) == tmp_path / "report.html"
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.pop("report.html").endswith(b"</html>\n") and after == before


@needs_browser
def test_a_real_browser_shows_it_without_network_errors_or_scrolling(tmp_path):
    write_calibration(tmp_path / "run")
    log = RunLog(tmp_path / "run")
    log.refresh()
    page = write_run_page(log)
    script = "[document.title, document.querySelectorAll('path.line').length].join('|')"
    backgrounds = set()
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
            shown = browser.show(page, width=width, dark=dark, script=script)
            assert shown.errors == [] and shown.requests == []
            assert shown.page_width <= width
            title, lines = shown.value.split("|")
            assert title == "Calibration: run" and int(lines) == 15, "the text took over no script"
            backgrounds.add((dark, shown.background))
    assert len(backgrounds) == 2 and len({colour for _, colour in backgrounds}) == 2


def test_the_sources_of_parts_are_named_and_a_text_nan_is_one(tmp_path):
    parts = {"x": {"source": "sums.jsonl"}, "y": {"source": "facts.jsonl"}}
    config = {"phase": "distill", "steps": 1, "data": {"source": "", "parts": parts}}
    config["eval"] = {"source": "", "parts": {"q": {"source": "asked.jsonl"}}}
    (tmp_path / "run.jsonl").write_text(json.dumps({"schema": 1, "config": config}) + "\n")
    sample = {"step": 1, "prompt": "Is it a number?", "text": "NaN", "ended": True}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    words = words_of(page_of(tmp_path))
    assert "learns from given texts, on sums.jsonl, facts.jsonl." in words
    assert "no evaluation has been due yet" in words and "nothing is held out" not in words
    assert " NaN " in words and " nan " not in words
