"""Errors of other people's code in one line."""

import pytest

from reflux.trainer.config.explain import explain


def caught(run):
    with pytest.raises(Exception) as error:
        run()
    return explain(error.value)


def test_the_line_of_the_code_that_raised_is_named(tmp_path):
    file = tmp_path / "rows.py"
    file.write_text("def rows():\n    deeper()\n\ndef deeper():\n    return {}['x']\n")
    code = {}
    exec(compile(file.read_text(), str(file), "exec"), code)
    assert caught(code["rows"]) == f"KeyError: 'x' ({file}, line 5)"


@pytest.mark.parametrize(
    "source, says",
    [
        ("def f(:", "SyntaxError: invalid syntax (x.py, line 1)"),
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("raise RuntimeError", "RuntimeError (x.py, line 1)"),
        ("raise ValueError('one\\ntwo')", "ValueError: one (x.py, line 1)"),
    ],
)
def test_one_line_whatever_the_error(source, says):
    assert caught(lambda: exec(compile(source, "x.py", "exec"))) == says


def test_an_error_of_our_own_line_needs_no_place():
    def here():
        try:
            raise KeyError("x")
        except KeyError as error:
            return explain(error)

    assert here() == "KeyError: 'x'"
