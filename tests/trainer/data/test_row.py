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
