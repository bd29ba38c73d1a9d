"""What became of an answer, and what is left of an evaluation that was killed."""

import json

import pytest

from reflux.trainer.config.evaluation import REFUSAL
from reflux.trainer.data.batch import Prompt
from reflux.trainer.evaluation.predictions import (
    Unfinished,
    add_outcomes,
    load_rows,
    prompt_id,
    save_rows,
)


def graded(text="x", correct=False, extracted=None, ended=True, error=None):
    return {
        "text": text,
        "correct": correct,
        "extracted": extracted,
        "ended": ended,
        "error": error,
    }


@pytest.mark.parametrize(
    "row, outcome",
    [
        (graded(correct=True), "right"),
        (graded(correct=True, ended=False), "right"),
        (graded(extracted="4"), "wrong"),
        (graded(), "no_answer"),
        (graded(error="grader broke"), "wrong"),
        (graded(ended=False), "truncated"),
        (graded("I can't help", ended=False), "truncated"),
        (graded("I can't help with that."), "refused"),
        (graded("I can't help. => 4", extracted="4"), "refused"),
        (graded("I can't believe it is 4", correct=True), "right"),
        (graded(correct=None), None),
    ],
)
def test_every_text_has_one_outcome(row, outcome):
    add_outcomes([row], REFUSAL, names_answers=True)
    assert row["outcome"] == outcome


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
def test_what_is_taken_for_a_refusal(text, refused):
    row = graded(text, extracted="4")
    add_outcomes([row], REFUSAL, names_answers=True)
    assert row["outcome"] == ("refused" if refused else "wrong")


def test_no_refusals_without_an_expression_and_no_missing_answers_if_the_grader_names_none():
    rows = [graded("I can't help", extracted="x"), graded()]
    add_outcomes(rows, "", names_answers=False)
    assert [r["outcome"] for r in rows] == ["wrong", "wrong"]


def test_the_last_predictions_are_read(tmp_path):
    for step in (0, 10, 9):
        save_rows(tmp_path, step, [{"step": step, "text": "ü\n"}])
    assert load_rows(tmp_path, "eval.against") == [{"step": 10, "text": "ü\n"}]
    with pytest.raises(ValueError, match="accept.x.run = '/nowhere': no predictions"):
        load_rows("/nowhere", "accept.x.run")


def test_an_id_is_the_question_and_its_answer():
    ask = lambda text, answer, index=0: prompt_id(
        Prompt(index, ({"role": "user", "content": text},), answer)
    )
    assert (
        ask("a", "b") == ask("a", "b", 7)
        and len({ask("a", "b"), ask("a", "c"), ask("c", "b"), ask("a", None)}) == 4
    )


def rows_of(prompt, mode, count):
    return [{"mode": mode, "prompt": prompt, "sample": k} for k in range(count)]


def test_whole_prompts_survive_a_kill(tmp_path):
    asked, samples = (
        {"seed": 1, "limit": None, "pass_at": (1, 2)},
        {"greedy": 1, "sampled": 2, "likelihood": 1},
    )
    kept = Unfinished(tmp_path, asked)
    assert kept.load(samples) == []
    kept.open([])
    whole = (
        rows_of(0, "greedy", 1)
        + rows_of(3, "sampled", 2)
        + rows_of(1, "likelihood_sum", 1)
        + rows_of(1, "likelihood_per_byte", 1)
    )
    kept.add(whole)
    kept.add(rows_of(4, "sampled", 1) + rows_of(2, "likelihood_sum", 1))
    path = tmp_path / "predictions" / "unfinished.jsonl"
    path.write_text(path.read_text() + json.dumps(rows_of(5, "greedy", 1)[0])[:-4])  # torn
    assert Unfinished(tmp_path, asked).load(samples) == whole
    assert Unfinished(tmp_path, asked | {"seed": 2}).load(samples) == [], "other answers"
    kept.close()
    assert not path.exists() and kept.load(samples) == []
