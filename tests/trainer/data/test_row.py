"""Cells of a row, and what is wrong with them in words. Conversations: test_shapes.py."""

import numpy as np
import pytest

from reflux.trainer.data.graders import Exact, MultipleChoice
from reflux.trainer.data.options import list_options
from reflux.trainer.data.prompt import spell
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.row import Row, read_conversation
from reflux.trainer.data.shapes import SHAPES


def test_a_renamed_column_is_read_and_named():
    row = Row({"q": "text", "n": 3}, "file, line 2", {"prompt": "q", "answer": "n"})
    assert (row.question("prompt"), row.answer("answer"), row.text("response")) == (
        "text",
        "3",
        None,
    )
    with pytest.raises(ValueError, match=r"^file, line 2, column n: int 3; want a text"):
        row.text("answer")


def test_a_missing_column_names_the_nearest():
    with pytest.raises(ValueError, match="no column 'prompt', did you mean promt?"):
        Row({"promt": "x"}, "file, line 1").question("prompt")


@pytest.mark.parametrize("values", [None, [1], "text"])
def test_what_is_no_row_is_refused(values):
    with pytest.raises(ValueError, match="want a row, a mapping of columns"):
        Row(values, "function, row 0")


@pytest.mark.parametrize(
    "value, text",
    [(42, "42"), (42.0, "42"), (-3.0, "-3"), (2.5, "2.5"), (float("nan"), None), (True, "True")],
)
def test_numbers_are_answers(value, text):
    """Whole numbers come as floats from a column in which one is missing."""
    assert Row({"answer": value}, "f, line 1").answer("answer") == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0.00001, "0.00001"),
        (-2e-05, "-0.00002"),
        (1e-7, "0.0000001"),
        (0.1, "0.1"),
        (2.5e20, "250000000000000000000"),
        (1e16, "10000000000000000"),
        (1e300, "1" + 300 * "0"),
        (np.float64(1e-5), "0.00001"),
        (123456789012345678, "123456789012345678"),
    ],
)
def test_a_number_has_all_its_digits(value, text):
    """It was text by str(), "1e-05", which no response is."""
    assert Row({"answer": value}, "f, line 1").answer("answer") == text == spell(value)


def test_a_number_of_json_is_answered_as_people_write_it(tmp_path):
    """As an answer, as one of several accepted ones, and as an option."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "?", "answer": 1e-5, "also": [2e-6], "choices": [1.0, 1e-5]}\n')
    (asked,) = load_prompts(str(file))
    assert Exact(aliases="also")(asked, "0.00001").correct
    assert Exact(aliases="also")(asked, "0.000002").correct
    assert MultipleChoice(answer_is="text")(asked, "(B)").correct
    assert "0.00001" in list_options(asked, 0, answer_is="text").messages[-1]["content"]
    file.write_text('{"question": "?", "choices": [1.0, 1e-5], "answer": 1}\n')
    (asked,) = load_prompts(str(file))
    assert asked.extra["choices"]["text"] == ["1.0", "0.00001"]


@pytest.mark.parametrize(
    "mark, left_out",
    [
        ({"train": False}, True),
        ({"training": False}, True),
        ({"weight": 0}, True),
        ({"weight": 1, "train": True}, False),
        ({"train": None}, False),
        ({}, False),
    ],
)
def test_a_message_that_is_not_to_be_trained_on_is_no_response(mark, left_out):
    """The conversation before it can still be asked."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"} | mark]
    messages, response = read_conversation(talk, "f, line 1")
    assert messages == (talk[0],) and response == (None if left_out else "r")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"} | mark]
    parts = SHAPES["sharegpt"].read(Row({"conversations": turns}, "f, line 1"))
    assert parts.response == response and list(parts.messages[0]) == ["role", "content"]


def test_infinity_stays_as_it_is():
    assert Row({"answer": float("inf")}, "f, line 1").answer("answer") == "inf"
