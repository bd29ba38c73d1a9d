"""A column names one of several models."""

import pytest

from reflux.trainer.data.prompt import Prompt
from reflux.trainer.data.row_choice import chosen_model

PATHS = ("models/math-7b", "models/code-7b", "other/code-7b")


def prompt(value) -> Prompt:
    return Prompt(4, ({"role": "user", "content": "a"},), extra={"domain": value})


def test_by_number_or_by_the_last_part_of_the_path():
    assert chosen_model(prompt(1), "domain", PATHS, "distill.route") == 1
    assert chosen_model(prompt("math-7b"), "domain", PATHS, "distill.route") == 0


@pytest.mark.parametrize("value", [3, -1, True, "code-7b", "poetry", None, 1.0])
def test_anything_else_is_said(value):
    says = r"distill.route = 'domain': prompt 4 has .* there; want 0 to 2, or one of math-7b, code"
    with pytest.raises(ValueError, match=says):
        chosen_model(prompt(value), "domain", PATHS, "distill.route")
