"""Cells of a row, and what is wrong with them in words. Conversations: test_shapes.py."""

import pytest

from reflux.trainer.data.row import Row


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


def test_a_float_that_is_no_exact_whole_number_stays_as_it_is():
    assert Row({"answer": 1e300}, "f, line 1").answer("answer") == "1e+300"
    assert Row({"answer": float("inf")}, "f, line 1").answer("answer") == "inf"
