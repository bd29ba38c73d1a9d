"""Predictions on disk, what became of an answer, and what a killed evaluation leaves."""

import json
from dataclasses import replace

import pytest
from prediction_rows import chosen, generated, prediction

from reflux.trainer.config.evaluation import REFUSAL
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.failed_grades import FailedGrades
from reflux.trainer.evaluation.predictions import (
    QUESTIONS_KEPT,
    Unfinished,
    failed_grades,
    load_predictions,
    prompt_id,
    save_predictions,
    save_questions,
    with_outcomes,
)


def graded(text="x", correct=False, **more):
    return generated(0, correct=correct, text=text, **more)


def outcomes(predictions, refusal=REFUSAL, names_answers=True):
    named = with_outcomes(predictions, refusal, lambda p: names_answers)
    return [p.generation.outcome for p in named]


@pytest.mark.parametrize(
    "answer, outcome",
    [
        (graded(correct=True), "correct"),
        (graded(correct=True, ended=False), "correct"),
        (graded(extracted="4"), "wrong"),
        (graded(), "no_answer"),
        (graded(error="grader broke"), None),
        (graded(error="grader broke", ended=False), None),
        (graded(ended=False), "truncated"),
        (graded("I can't help", ended=False), "truncated"),
        (graded("I can't help with that."), "refused"),
        (graded("I can't help. => 4", extracted="4"), "refused"),
        (graded("I can't believe it is 4", correct=True), "correct"),
        (graded(correct=None), None),
    ],
)
def test_every_text_has_one_outcome(answer, outcome):
    assert outcomes([answer]) == [outcome]


@pytest.mark.parametrize(
    "text, refused",
    [
        ("I'm sorry, but I cannot help.", True),
        ("Sorry, no.", True),
        ("I am so sorry", True),
        ("i can’t do this", True),
        ("I cannot answer", True),
        ("I will not do that", True),
        ("As an AI language model, ...", True),
        ("I'm unable to", True),
        ("**I am not able to say**", True),
        ("The answer is 4. I cannot be sure.", False),
        ("I can tell", False),
        ("I am sure: 4", False),
        ("He is sorry", False),
        ("", False),
    ],
)
def test_what_counts_as_a_refusal(text, refused):
    assert outcomes([graded(text, extracted="4")]) == ["refused" if refused else "wrong"]


def test_no_refusals_without_an_expression_and_no_missing_answers_if_the_grader_names_none():
    answers = [graded("I can't help", extracted="x"), graded()]
    assert outcomes(answers, refusal="", names_answers=False) == ["wrong", "wrong"]


def test_answers_by_likelihood_have_no_outcome():
    answer = chosen(0, "likelihood_sum", True, logp=[-1.0], n_bytes=[1])
    assert with_outcomes([answer], REFUSAL, lambda p: True) == [answer]


KEYS = {
    "generated": "mode prompt sample text answer ended tokens nll reward correct extracted error "
    "id position choice_at outcome graded",
    "by likelihood": "mode prompt sample answer extracted correct reward error position choice_at "
    "logp bytes id",
}


def test_lines_read_back_and_their_keys_are_in_order(tmp_path):
    rows = [
        generated(3, 1, text="ü\u2028\x85\n", outcome="correct", id="q", position=2, choice_at=0),
        chosen(4, "likelihood_sum", False, logp=[-1.0, -2.5], n_bytes=[2, 3], id="r", position=1),
    ]
    save_predictions(tmp_path, 7, rows)
    assert load_predictions(tmp_path, "x") == rows
    lines = (tmp_path / "predictions" / "step-7.jsonl").read_text().split("\n")[:-1]
    assert [" ".join(json.loads(line)) for line in lines] == list(KEYS.values())
    assert json.loads(lines[1])["bytes"] == [2, 3] and "ü" in lines[0]


def test_the_last_predictions_are_read(tmp_path):
    for step in (0, 10, 9):
        save_predictions(tmp_path, step, [generated(step)])
    assert load_predictions(tmp_path, "eval.against") == [generated(10)]
    with pytest.raises(ValueError, match="accept.x.run = '/nowhere': no predictions"):
        load_predictions("/nowhere", "accept.x.run")


def test_those_that_a_guard_rejected_are_not(tmp_path):
    for step in (0, 2, 4):
        save_predictions(tmp_path, step, [generated(step)])
    log = [{"schema": 1}, *({"event": "eval", "step": step} for step in (0, 2, 4))]
    log += [{"event": "stopped", "step": 4, "restored_step": 2}, {"event": "eval", "step": 2}]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    assert load_predictions(tmp_path, "eval.against") == [generated(2)]


def test_files_of_older_versions_have_neither_ids_nor_positions_nor_graded(tmp_path):
    save_predictions(tmp_path, 0, [generated(1, id="x", position=2, choice_at=1)])
    file = tmp_path / "predictions" / "step-0.jsonl"
    row = json.loads(file.read_text())
    for key in ("id", "position", "choice_at", "graded"):
        del row[key]
    file.write_text(json.dumps(row) + "\n")
    assert load_predictions(tmp_path, "x") == [generated(1)]


def test_failed_grades_are_counted_among_the_texts_that_a_grader_saw():
    rows = [
        generated(0, error="first"),
        generated(1, error="second"),
        generated(2),
        generated(3, ended=False, graded=False),
        chosen(4, "likelihood_sum", True, logp=[-1.0], n_bytes=[1]),
    ]
    assert failed_grades(rows) == {"": FailedGrades(graded=3, failed=2, first_error="first")}


def ask(text, answer, index=0):
    return prompt_id(Prompt(index, ({"role": "user", "content": text},), answer))


def test_the_first_questions_are_kept_for_readers(tmp_path):
    asked = [
        Prompt(i, ({"role": "system", "content": "s"}, {"role": "user", "content": f"é {i}"}))
        for i in range(QUESTIONS_KEPT + 1)
    ]
    save_questions(tmp_path, asked)
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert len(lines) == QUESTIONS_KEPT
    assert json.loads(lines[3]) == {"prompt": 3, "text": "é 3"}


def test_an_id_is_the_question_and_its_answer():
    assert ask("a", "b") == ask("a", "b", 7)
    assert len({ask("a", "b"), ask("a", "c"), ask("c", "b"), ask("a", None)}) == 4


def answers(prompt, mode, count):
    return [prediction(prompt, k, mode) for k in range(count)]


def test_whole_prompts_survive_a_kill(tmp_path):
    spec = {"seed": 1, "limit": None, "pass_at": (1, 2)}
    samples = {"greedy": 1, "sampled": 2, "likelihood": 1}
    unfinished = Unfinished(tmp_path, spec)
    assert unfinished.load(samples) == []
    unfinished.open([])
    whole = (
        answers(0, "greedy", 1)
        + answers(3, "sampled", 2)
        + answers(1, "likelihood_sum", 1)
        + answers(1, "likelihood_per_byte", 1)
    )
    unfinished.add(whole)
    unfinished.add(answers(4, "sampled", 1) + answers(2, "likelihood_sum", 1))
    path = tmp_path / "predictions" / "unfinished.jsonl"
    torn = json.dumps({"mode": "greedy", "prompt": 5})[:-4]
    path.write_text(path.read_text() + torn)
    assert Unfinished(tmp_path, spec).load(samples) == whole
    assert Unfinished(tmp_path, spec | {"seed": 2}).load(samples) == [], "other answers"
    failed = [replace(p, error="broken") for p in answers(6, "sampled", 1)]
    unfinished.open(whole)
    unfinished.add([*answers(6, "sampled", 2)[1:], *failed])
    assert Unfinished(tmp_path, spec).load(samples) == whole, "a failed grade is tried again"
    unfinished.close()
    assert not path.exists() and unfinished.load(samples) == []


def test_answers_of_parts_in_another_order_are_not_read_and_those_of_another_server_are(tmp_path):
    """A prompt's index counts the rows of the parts before it."""
    x, y = {"source": "x.jsonl"}, {"source": "y.jsonl"}
    spec = {"parts": {"x": x, "y": y}, "rollout": {"servers": ["http://a:1"], "top_k": 0}}
    samples, whole = {"greedy": 1}, answers(0, "greedy", 1)
    Unfinished(tmp_path, spec).open(whole)
    moved = spec | {"rollout": {"servers": ["http://b:1"], "top_k": 0}}
    assert Unfinished(tmp_path, moved).load(samples) == whole
    assert Unfinished(tmp_path, spec | {"parts": {"y": y, "x": x}}).load(samples) == []
    assert Unfinished(tmp_path, spec | {"rollout": {"servers": [], "top_k": 5}}).load(samples) == []
