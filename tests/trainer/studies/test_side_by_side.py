"""Texts side by side: what the reader is asked, and what is made of its answers."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflux.trainer.studies.side_by_side import (
    Answer,
    _names,
    against_first,
    load_answers,
    main,
    make_reader,
    measure,
    page,
)

QUESTIONS = [{"prompt": "one plus one?"}, {"prompt": "two plus two?"}]
TEXTS = {0: ["it is two", "two | more"], 1: ["four", ""]}


def write_run(folder, step=3):
    rows = [
        {"mode": mode, "prompt": p, "sample": k, "text": text, "correct": text == "four"}
        for mode in ("greedy", "sampled")
        for p, texts in TEXTS.items()
        for k, text in enumerate(texts)
    ]
    (folder / "predictions").mkdir(parents=True)
    for at in (1, step):
        lines = "".join(json.dumps(row | {"step": at}) + "\n" for row in rows)
        (folder / "predictions" / f"step-{at}.jsonl").write_text(lines)
    return folder


def test_texts_come_one_prompt_after_the_other_from_the_last_evaluation(tmp_path):
    run = write_run(tmp_path / "run", step=12)
    answers = load_answers(run, QUESTIONS, 3)
    assert [(a.prompt, a.text) for a in answers] == [
        (0, "it is two"),
        (1, "four"),
        (0, "two | more"),
    ]
    with pytest.raises(ValueError, match="no sampled answers"):
        load_answers(tmp_path / "none", QUESTIONS, 3)


def test_texts_that_a_guard_rejected_are_not_shown(tmp_path):
    run = write_run(tmp_path / "run", step=12)
    log = [{"schema": 1}, *({"event": "eval", "step": step} for step in (1, 12))]
    log += [{"event": "stopped", "step": 12, "restored_step": 1}]
    (run / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    file = run / "predictions/step-12.jsonl"
    file.write_text(file.read_text().replace("it is two", "rejected"))
    assert load_answers(run, QUESTIONS, 1)[0].text == "it is two"


def test_a_text_with_other_line_breaks_is_one_line(tmp_path):
    text, folder = "a\u2028b\x85c", tmp_path / "predictions"
    folder.mkdir()
    row = {"mode": "sampled", "prompt": 0, "sample": 0, "text": text, "correct": True}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    (folder / "step-1.jsonl").write_text(line + line)
    answers = load_answers(tmp_path, [{"prompt": "one?"}], 3)
    assert answers == [Answer(0, "one?", text, True)] * 2


def test_numbers_are_those_of_the_definition():
    answers = [Answer(0, "q", "aaaa", True), Answer(0, "q", "bb", False), Answer(1, "r", "", False)]
    m = measure("run", answers, lambda pairs: [(4.0, 2), (1.0, 1)][: len(pairs)]).texts
    assert m.nats_per_byte.mean == pytest.approx((4 / 4 + 1 / 2) / 2)
    assert m.perplexity == pytest.approx(math.exp(5 / 3))
    assert (m.texts, m.correct, m.distinct) == (3, pytest.approx(1 / 3), 1.0)
    assert m.bytes.mean == 3.0 and m.bytes.n == 1


def test_runs_are_compared_with_the_first_question_by_question():
    """Question 2 is only of the second run, and no part of its change."""
    first = [Answer(0, "q", "aaaa", True), Answer(1, "r", "bb", True)]
    second = [*(Answer(a.prompt, a.question, "cccc", True) for a in first), Answer(2, "s", "d", 1)]
    runs = [
        measure("first", first, lambda pairs: [(4.0, 1), (1.0, 1)]),
        measure("second", second, lambda pairs: [(4.0, 1), (8.0, 1), (99.0, 1)]),
    ]
    one, two = against_first(runs)
    assert one.change is None
    assert two.change.mean == pytest.approx(((1.0 - 1.0) + (2.0 - 0.5)) / 2) and two.change.n == 2


def test_the_reader_scores_the_answer_alone_whatever_stands_beside_it(assets):
    folder = str(assets / "llama3")
    read = make_reader(folder)
    pairs = [("one plus one?", "it is two"), ("a much longer question than the other?", "no")]
    (both, alone) = read(pairs), read(pairs[:1])
    assert both[0][0] == pytest.approx(alone[0][0], abs=1e-3) and both[0][1] == alone[0][1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer(pairs[0][0] + "\n")["input_ids"]
    ids = prompt + tokenizer(pairs[0][1], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        nll = model(
            torch.tensor([ids]), labels=torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        )
    assert alone[0][0] == pytest.approx(float(nll.loss) * alone[0][1], rel=1e-4)


def test_a_run_that_was_asked_something_else_is_refused(tmp_path):
    """Another seed has another file: its texts would stand beside questions they do not answer."""
    row = {"mode": "sampled", "prompt": 1, "sample": 0, "text": "t", "correct": True, "answer": "4"}
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/step-1.jsonl").write_text(json.dumps(row) + "\n")
    (a, b), other = QUESTIONS, {"prompt": "five plus five?", "answer": "10"}
    assert len(load_answers(tmp_path, [a, b | {"answer": "4"}], 3)) == 1
    for questions in ([a], [a, other]):
        with pytest.raises(ValueError, match="was asked other questions"):
            load_answers(tmp_path, questions, 3)


def test_runs_of_one_name_keep_their_texts_apart():
    runs = [Path("past") / f"seed-{n}" / "teacher-original" for n in (1, 2)]
    assert _names(runs) == ["seed-1/teacher-original", "seed-2/teacher-original"]
    assert _names([runs[0], Path("student")]) == ["teacher-original", "student"]
    with pytest.raises(ValueError, match="twice"):
        _names([runs[0], runs[0]])


def test_the_page_shows_every_run(assets, tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in ("original", "distillable")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    words = ["--reader", str(assets / "llama3"), "--questions", str(tmp_path / "q.jsonl")]
    words += ["--runs", *map(str, runs), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    page = (tmp_path / "out" / "texts.md").read_text()
    assert (
        "| one plus one? | it is two (x) | it is two (x) |" in page and "two \\| more (x)" in page
    )
    found = json.loads((tmp_path / "out" / "texts.json").read_text())
    assert [r["run"] for r in found["runs"]] == ["original", "distillable"]
    assert found["runs"][1]["change"]["mean"] == 0.0
    assert found["shown"][0]["distillable"]["text"] == "it is two"
    assert found["runs"][0]["texts"] == 4 and found["runs"][0]["correct"] == 0.25
    with pytest.raises(SystemExit):
        main([*words[:4], "--runs", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert "no sampled answers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--reader", str(tmp_path / "none"), *words[2:]])
    assert str(tmp_path / "none") in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "one plus one?"}) + "\n")
    with pytest.raises(SystemExit):
        main(words)
    assert "q.jsonl, line 1: texts in ['question']; want prompt" in capsys.readouterr().err


def test_texts_with_rewards_alone_are_neither_correct_nor_wrong():
    answers = [Answer(0, "q", "a text", None), Answer(1, "r", "another", None)]
    measured = measure("x", answers, lambda pairs: [(1.0, 2)] * len(pairs)).texts
    assert math.isnan(measured.correct)
    shown = page([measured], [answers], "reader")
    assert "| x | 2 | not measured |" in shown and "a text (x)" not in shown
