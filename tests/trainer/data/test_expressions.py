"""What is data, and that nothing else is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.expressions import parse_expression, parse_literal

PAYLOADS = (
    "__import__('os').mkdir('made')",
    "[__import__('os').mkdir('made')]",
    "().__class__.__base__.__subclasses__()",
    "(lambda: 1)()",
    "[x for x in (1, 2)]",
    "open('made', 'w')",
    "f'{open}'",
    "1 if open else 2",
    "x.real",
    "x[0]",
    "sin(open)",
    "sin(*[1])",
    "sin(x=1)",
    "open(1)",
    "(y := 1)",
    "1; import os",
    "not 1",
    "1 < 2",
    "1 and 2",
    "~1",
    "1 // 2",
    "1 % 2",
    "1 | 2",
    "1 << 2",
    "await x",
    "...",
    "1j",
    "True + 1",
    "'a' * 2",
    "b'a'",
    "",
    "\0",
    "x = 1",
    "2x",
    "2(x)",
)
NUMBERS = st.integers(0, 999).map(str)
FLAT = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
DATA = st.recursive(
    st.one_of(FLAT, st.booleans(), st.none()), lambda part: st.lists(part) | st.tuples(part, part)
)


@pytest.mark.parametrize("text", PAYLOADS)
def test_nothing_but_arithmetic_is_an_expression(text):
    assert parse_expression(text, {"x"}, {"sin"}) is None


@pytest.mark.parametrize("text", [p for p in PAYLOADS if p not in ("...",)])
def test_nothing_but_data_is_a_literal(text):
    assert parse_literal(text) is None or text in ("1j", "b'a'") == False


@pytest.mark.parametrize(
    "text, written",
    [
        (" (1 + 2)*3 ", "(1 + 2) * 3"),
        ("-34*x**8/15 - 5*x/4 + C", "-34 * x ** 8 / 15 - 5 * x / 4 + C"),
        ("-4*(-2*x - 8)**(3/2)/3 + C", "-4 * (-2 * x - 8) ** (3 / 2) / 3 + C"),
        ("sin(x)*exp(-2*x)", "sin(x) * exp(-2 * x)"),
        ("2**(x + 1)", "2 ** (x + 1)"),
        ("x**-1", "x ** (-1)"),
        ("0.5*x", "0.5 * x"),
        ("1 + 2 # open('made')", "1 + 2"),
        ("1_0", "10"),
        ("ｘ + 1", "x + 1"),  # Python reads wide letters as plain ones
    ],
)
def test_an_expression_is_written_anew(text, written):
    assert parse_expression(text, {"x", "C"}, {"sin", "exp"}) == written


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9**(9**9)",
        "(9**99)**99",
        "((((9**9)**9)**9)**9)**9",
        "9**101",
        "2**0.5**-99999",
        "2**(1/1e-300)",
        "2**(x*9**9**9)",
        "9" * 2001,
        "*".join(["9**99"] * 40),
        "x" + "+x" * 1100,
        "(" * 900 + "1" + ")" * 900,
        "-" * 1900 + "1",
    ],
)
def test_what_would_take_long_is_refused_at_once(text):
    started = time.monotonic()
    assert parse_expression(text, {"x"}) is None or text.startswith("-")
    assert time.monotonic() - started < 1


def test_games_are_played_with_whole_numbers():
    assert parse_expression("4*6", whole=True) == "4 * 6"
    assert parse_expression("4.0*6", whole=True) is None
    assert parse_expression("x*6", whole=True) is None


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.data())
def test_sums_and_products_keep_their_value(numbers, data):
    text = numbers[0]
    for number in numbers[1:]:
        text = f"({text}) {data.draw(st.sampled_from('+-*'))} {number}"
    written = parse_expression(text, whole=True)
    assert eval(written) == eval(text) and parse_expression(written) == written


@given(DATA)
def test_data_is_read_as_python_reads_it(value):
    assert parse_literal(repr(value)) == value


@given(st.text(max_size=60))
def test_any_text_is_data_or_none(text):
    parse_literal(text)
    written = parse_expression(text, {"x"}, {"sin"})
    assert written is None or parse_expression(written, {"x"}, {"sin"}) == written


def test_a_text_too_long_or_too_deep_is_no_data():
    assert parse_literal("[" * 5000 + "]" * 5000) is None
    assert parse_literal("'" + "a" * 20_000 + "'") is None
    assert parse_literal("[" + "1," * 9000 + "]") == [1] * 9000
