"""How `math` reads amounts of money, and numbers among words."""

import pytest

from reflux.trainer.data.graders import Math
from reflux.trainer.data.prompt import Prompt


def grade(gold, text, **options):
    return Math(**options)(Prompt(0, (), gold), text)


MONEY = [r"\$18.90", r"\$32,348", r"\$36", r"\$.50", "$18.90", r"\$2000", r"$\$36$"]


@pytest.mark.parametrize("gold", MONEY)
def test_an_escaped_dollar_is_no_border_of_maths(gold):
    """As MATH and BigMath write amounts: the answer was read as nothing, equal to no response."""
    number = gold.strip("\\$")
    for said in (
        rf"\boxed{{\${number}}}",
        rf"\boxed{{{number}}}",
        rf"$\${number}$",
        rf"\${number}",
    ):
        assert grade(gold, f"Thus it costs {said}.").correct, said
        assert grade(gold, f"So\n#### {said}", marker="####").correct, said
    for said in (rf"\boxed{{1{number}}}", r"\boxed{18}", "it is 90"):
        assert not grade(gold, said).correct, said


@pytest.mark.parametrize("gold", [r"\$", r"\text{}", r"$\text{}$"])
@pytest.mark.parametrize("text", ["no", r"\boxed{5}", r"\$"])
def test_an_answer_that_cannot_be_read_is_a_failed_grade(gold, text):
    """Whatever the response: a right one alone would be left of its group."""
    with pytest.raises(ValueError, match="reads no expression in the prompt's answer.*Mend"):
        grade(gold, text)


AMONG_WORDS = [
    ("18", "18 eggs"),
    ("5", "5 dollars"),
    ("5", r"\$5 per hour"),
    ("60", "60 miles per hour"),
    ("5", "5 is the answer"),
    ("42", "42 (forty-two)"),
    ("18", "She has 18 eggs left."),
    ("5", "**5 cents a day**"),
    ("-5", "-5 degrees"),
    ("1200", "1,200 meters"),
    ("3/4", "3/4 cups"),
    ("0.5", "about .5 liters"),
]


@pytest.mark.parametrize("gold, answer", AMONG_WORDS)
def test_one_number_among_words_is_that_number(gold, answer):
    """In LaTeX it is a product of letters."""
    assert grade(gold, f"So\n#### {answer}", marker="####").correct
    assert grade(gold, f"<a>{answer}</a>", pattern="<a>(.*)</a>").correct
    assert grade(answer, f"Thus \\boxed{{{gold}}}").correct, "in the row's answer too"
    assert not grade("7", f"#### {answer}", marker="####").correct


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("2", "2x"),
        ("2", "2 x"),
        ("2", "2 xy"),
        ("2", "2x + three"),
        ("3", r"3\sqrt{2}"),
        ("3", "3 sqrt two"),
        ("2", "(1, 2)"),
        ("3", "3 pi"),
        ("3", "3 sin x"),
        ("18", "18, not 20"),
        ("18", "not 18"),
        ("18", "It isn't 18"),
        ("3", "2 or 3"),
        ("2", "2 or three"),
        ("5", "5 million"),
        ("5", "5 and a half"),
        ("5", "at least 5 apples"),
        ("30", "8 hours 30 minutes"),
        ("5", "5! apples"),
        ("5", "twice 5"),
        ("5", "all but 5"),
        ("5", "without 5"),
    ],
)
def test_words_and_letters_that_change_a_number_are_no_words_beside_it(gold, answer):
    assert not grade(gold, f"#### {answer}", marker="####").correct


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("20 dollars", "20 cents"),
        ("5 more", "5 fewer"),
        ("decreases by 5", "increases by 5"),
        ("loses 5 dollars", "gains 5 dollars"),
        ("10 percent", "10 dollars"),
    ],
)
def test_one_number_of_another_thing_is_another_answer(gold, answer):
    assert not grade(gold, f"#### {answer}", marker="####").correct
    assert grade(gold, f"#### {gold}", marker="####").correct


def test_words_that_one_side_has_alone_are_of_the_same_thing():
    for gold, answer in (("18 eggs", "18 eggs per day"), ("18 eggs", "18"), ("18", "18 eggs")):
        assert grade(gold, f"#### {answer}", marker="####").correct


MARKED_UP = [
    ("7", "**7**"),
    ("7", "*7*"),
    ("7", "***7***."),
    ("7", "__7__"),
    ("7", "_7_"),
    ("7", "`7`"),
    ("7", "**`7`**"),
    ("7", "**$7$**"),
    ("7", r"\[7\]"),
    ("7", r"\(7\)"),
    ("1/2", r"\[ \frac12 \]"),
    ("1/2", r"**\(\frac12\)**"),
    ("x^2+1", "**x^2+1**"),
    ("x^2+1", "** x^2+1"),
    ("x^2+1", "x^2+1**"),
    ("7", "**7** eggs"),
    ("7", "**Final:** **7** eggs"),
    ("1000000", "1e6"),
    ("1000000", "1E6 dollars"),
    ("0.00001", "1e-5"),
    ("-1500", "**-1.5e3**"),
    ("(1000000, 2)", "(1e6, 2)"),
]


@pytest.mark.parametrize("gold, answer", MARKED_UP)
def test_marks_around_an_answer_and_powers_of_ten_are_read(gold, answer):
    """On either side, and a wrong number in the same marks is wrong."""
    assert grade(gold, f"So\n#### {answer}", marker="####").correct
    assert grade(answer, f"So\n#### {gold}", marker="####").correct
    assert not grade("3", f"So\n#### {answer}", marker="####").correct


@pytest.mark.parametrize(
    "gold, answer, correct",
    [
        ("a_b", "a_b", True),
        ("x_1 + y_1", "y_1 + x_1", True),
        ("27", "2**7", False),  # a power, not two numbers and bold
        ("2*x*y", "y*x*2", True),
        ("24", "2 *3 *4", True),
        ("2e", "e*2", True),
        ("6e", "3e2", False),  # 300
        ("3e2x", "3e2x", True),
        ("R^*", "R^*", True),
        ("[1, 2]", "[1, 2]", True),
    ],
)
def test_stars_and_underscores_of_maths_are_no_mark_up(gold, answer, correct):
    assert grade(gold, f"So\n#### {answer}", marker="####").correct is correct


def test_a_power_of_ten_in_letters_is_one_in_a_whole_text_too():
    for text in (r"It is \boxed{1e6}.", "So $1e6$"):
        assert grade("1000000", text).correct
        assert not grade("6e", text).correct
