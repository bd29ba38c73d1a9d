"""Which answer each grader extracts, and what it calls correct."""

import numpy as np
import pytest

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import Exact, Function, Grade, Math, MultipleChoice, ReasoningGym
from reflux.trainer.data.options import read_options
from reflux.trainer.data.prompts import load_prompts


def prompt(answer="42", **extra):
    return Prompt(0, ({"role": "user", "content": "?"},), answer, None, extra)


@pytest.mark.parametrize(
    "options, text, extracted, correct",
    [
        ({"marker": "####"}, "6 * 7\n#### 42\n", "42", True),
        ({"marker": "####"}, "#### 41, no: #### 42", "42", True),
        ({"marker": "####"}, "#### 42, no: #### 41", "41", False),
        ({"marker": "####"}, "it is 42", None, False),
        ({"marker": "####"}, "42 ####  ", None, False),
        ({"pattern": r"<a>(.*?)</a>"}, "<a>7</a> <a> 42 </a>", "42", True),
        ({"pattern": r"<a>(.*?)</a>"}, "<a>42", None, False),
        ({}, " 42 ", "42", True),
        ({}, "  ", None, False),
    ],
)
def test_exact(options, text, extracted, correct):
    assert Exact(**options)(prompt(), text) == Grade(float(correct), correct, extracted)


SOLUTION = "First <<20+22=42>>42.\nSo 42 in all.\n#### 42"


@pytest.mark.parametrize("grader", [Exact, Math])
@pytest.mark.parametrize("gold", [SOLUTION, "#### 1\n#### 42 ", "42", " 42\n"])
def test_a_marker_is_applied_to_the_gold_too(grader, gold):
    """GSM8K's answers are worked solutions."""
    assert grader(marker="####")(prompt(gold), "So it is\n#### 42").correct
    assert not grader(marker="####")(prompt(gold), "So it is\n#### 43").correct
    assert not grader(marker="####")(prompt(gold), "42").correct


@pytest.mark.parametrize("grader", [Exact, Math])
def test_a_gold_with_nothing_behind_its_marker_is_an_error(grader):
    with pytest.raises(ValueError, match="ends with the marker '####'.*want the answer behind it"):
        grader(marker="####")(prompt("so 42 ####  "), "#### 42")


def test_a_pattern_reads_the_text_only():
    """It could cut a gold short: 1,234 would become 234, which a wrong text can end with."""
    assert not Exact(pattern=r"(\d+)$")(prompt("1,234"), "5,234").correct


def test_exact_folds_case_only_when_asked():
    assert not Exact()(prompt("Straße"), "STRASSE").correct
    assert Exact(ignore_case=True)(prompt("Straße"), "STRASSE").correct


@pytest.mark.parametrize("aliases", [["New York City", " NYC "], np.array(["NYC"], dtype=object)])
def test_exact_accepts_the_other_answers_of_the_row(aliases):
    """TriviaQA and Natural Questions have lists of them."""
    exact, row = Exact(aliases="also"), prompt("New York", also=aliases)
    assert exact(row, "NYC").correct and exact(row, " New York").correct
    assert not exact(row, "nyc").correct and not exact(row, "NY").correct
    assert Exact(aliases="also", ignore_case=True)(row, "nyc").correct
    assert Exact(aliases="also", marker="is ")(row, "it is NYC") == Grade(1.0, True, "NYC")
    assert not Exact()(row, "NYC").correct
    assert Exact(aliases="also")(prompt("a", also=[]), "a").correct


@pytest.mark.parametrize("given", [{}, {"also": "NYC"}, {"also": None}, {"other": ["NYC"]}])
def test_aliases_that_are_no_list_are_a_failed_grade(given):
    with pytest.raises(ValueError, match="column 'also' has .*want a list of accepted answers"):
        Exact(aliases="also")(prompt("New York", **given), "NYC")


@pytest.mark.parametrize(
    "answer, text, correct",
    [
        ("1/2", r"so it is \boxed{\frac{2}{4}}", True),
        (r"\frac{1}{2}", "it is $0.5$", True),
        (r"\frac{1}{2}", "the answer is 2", False),  # the 2 of the denominator is not the answer
        ("x^2+1", "$1 + x^2$", True),
        ("(1,2)", "the point is $(1, 2)$", True),
        ("(1,2)", "the point is $(2, 1)$", False),
        ("1,234", "it is 1234", True),
        ("42", "first 41, and then the answer is 42.", True),
        ("42", "the answer is 43", False),
        ("blue", "blue", True),
    ],
)
def test_math_compares_values(answer, text, correct):
    assert Math()(prompt(answer), text).correct is correct


def test_math_extracts_by_marker_and_an_answer_without_it_is_none():
    assert Math(marker="Answer:")(prompt("3"), "5 apples. Answer: 6/2").correct
    assert not Math(marker="Answer:")(prompt("5"), "5 apples. Answer: 6/2").correct
    assert Math(marker="Answer:")(prompt("5"), "5").extracted is None
    assert Math()(prompt("5"), "I do not know").extracted is None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B)", "B"),
        ("B) the second", "B"),
        ("Answer: B", "B"),
        ("**Answer:** (b)", "B"),
        (r"thus \boxed{B}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        ("The correct answer is B because A is wrong.", "B"),
        ("The answer is option B", "B"),
        ("Options (A) and (C) fail.\nAnswer: $\\mathbf{B}$", "B"),
        ("(A) is too small, so it must be (B).", "B"),
        ("Answer: A. Wait, no. Answer: B", "B"),
        ("I reason.\n\nB", "B"),
        ("The answer is a matter of taste", None),
        ("A good question about Bees", None),
        ("", None),
        ("(F)", None),
        ("The answer is Everest", None),
    ],
)
def test_multiple_choice_extracts_the_letter_that_the_text_decides_for(text, letter):
    grade = MultipleChoice()(prompt("B", choices=["w", "x", "y", "z"]), text)
    assert grade == Grade(float(letter == "B"), letter == "B", letter)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is I think (C).", "C"),
        ("Answer: I would say (B)", "B"),
        ("The answer is I.", "I"),
        ("The answer is I because of gravity", "I"),
        ("Answer: I", "I"),
    ],
)
def test_of_ten_options_the_ninth_is_no_pronoun(text, letter):
    assert MultipleChoice()(prompt("J"), text).extracted == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is B. Option A is wrong because it confuses mass and weight.", "B"),
        ("Answer: B. Choice C would need a vacuum.", "B"),
        ("Answer: (B)\n\nOption D is tempting, but it is off by one.", "B"),
        ("The correct answer is B because (A) is false.", "B"),
        ("B. The answer A would be wrong.", "B"),
        ("The answer is A. Option B is wrong.", "A"),
        ("**B**. Option A ignores friction.", "B"),
        ("B\n\nOption A ignores friction, (C) the mass.", "B"),
        ("(A) is less than what is asked for.\nB", "B"),
        ("A. first B. second C. third\nI take option C", "C"),
        ("A) first\nB) second\nI take option A", "A"),
        ("Answer B\nOption A ignores friction.", "B"),
        ("The answer B is right; the answer A ignores friction. Answer: B", "B"),
        ("Option C is right. Option B is wrong.", "C"),
        ("Option C is right, not option B.", "C"),
        ("The best option is C. Option D costs more.", "C"),
        ("(C), since (A) and (D) are wrong", "C"),
        ("It is neither (A) nor (B)", None),
        ("The answer is not B.", None),
        ("It is not (B).", None),
        ("Option B is not right.", None),
        ("Answer: B or C", None),
        ("Answer: (B) and (C)", None),
        ("Answer: B, C", None),
        ("Answer: B/C", None),
        ("Answer: B or C? Final answer: C.", "C"),
        ("The answer is B, not A.", "B"),
        ("The answer is B, A is too small.", "B"),
        ("The answer is B and A is wrong.", "B"),
        ("Answer: D) Cannot be determined", "D"),
        ("(D) Cannot be determined", "D"),
        ("The answer is B. If the answer is A, energy is lost.", "B"),
        ("Answer: A. No: the answer must be C. Choice A loses energy.", "C"),
        ("Answer:\n\n**(B)**\n\nWhy not option C? It is slower.", "B"),
    ],
)
def test_an_explanation_does_not_overrule_the_answer(text, letter):
    """Neither what is said of the other options, nor an option that is turned down; two letters
    decide for none.
    """
    grade = MultipleChoice()(prompt("B", choices=["w", "x", "y", "z"]), text)
    assert grade == Grade(float(letter == "B"), letter == "B", letter)


@pytest.mark.parametrize(
    "labels", [[1, 2, 3], ["1", "2", "3"], ["A.", "B.", "C."], ["(a)", "(b)", "(c)"]], ids=str
)
def test_labels_are_read_without_what_stands_around_them(labels):
    """As options by likelihood are."""
    asked = prompt(str(labels[1]), choices={"label": labels, "text": ["u", "v", "w"]})
    assert MultipleChoice()(asked, f"The answer is {labels[1]}".upper()).correct
    assert not MultipleChoice()(asked, f"The answer is {labels[2]}".upper()).correct
    assert read_options(asked).correct == 1


def test_labels_of_several_letters_are_a_failed_grade():
    labels = {"label": list(range(1, 11)), "text": list("abcdefghij")}
    with pytest.raises(ValueError, match="labels 1, .*, 10; want one letter or digit each"):
        MultipleChoice()(prompt("1", choices=labels), "The answer is 1")
    assert read_options(prompt("10", choices=labels)).correct == 9


def test_a_number_is_no_label():
    labelled = {"label": ["1", "2"], "text": ["u", "v"]}
    assert MultipleChoice()(prompt("2", choices=labelled), "The answer is 2.5 kg").extracted is None


@pytest.mark.parametrize("ignore_case", [False, True])
def test_a_letter_with_a_combining_mark_is_the_letter(ignore_case):
    grader = Exact(ignore_case=ignore_case)
    assert grader(prompt("caf\u00e9"), "cafe\u0301").correct
    assert grader(prompt("cafe\u0301"), "caf\u00e9").correct
    assert not grader(prompt("caf\u00e9"), "cafe").correct
    assert grader(prompt("\u00c9"), "e\u0301").correct is ignore_case


def test_multiple_choice_answers_may_be_an_index_or_a_text():
    assert MultipleChoice(answer_is="index")(prompt("2", choices=["u", "v", "w"]), "(C)").correct
    assert MultipleChoice(answer_is="text", choices="options")(
        prompt("v", options=["u", "v"]), "(B)"
    ).correct
    labelled = {"label": ["1", "2"], "text": ["u", "v"]}
    assert MultipleChoice()(prompt("2", choices=labelled), "Answer: 2").correct
    assert MultipleChoice()(prompt("J"), "Answer: J").correct  # no choices given: ten letters
    with pytest.raises(ValueError, match="set answer_is"):
        MultipleChoice()(prompt("w", choices=["u", "v", "w"]), "(C)")
    with pytest.raises(ValueError, match="no column 'choices'.*options"):
        MultipleChoice(answer_is="index")(prompt("0", options=["u"]), "(A)")


@pytest.mark.parametrize(
    "answer_is, answer",
    [("index", "-1"), ("index", "3"), ("index", "1.0"), ("letter", "BC")],
)
def test_a_reference_that_names_no_option_is_no_grade(answer_is, answer):
    """-1 stands for a hidden label in public test splits; it is not the last option."""
    grader = MultipleChoice(answer_is=answer_is)
    with pytest.raises(ValueError, match="is none of .*set answer_is"):
        grader(prompt(answer, choices=["u", "v", "w"]), "(C)")


def test_multiple_choice_is_linear_in_hostile_text():
    grader = MultipleChoice()
    for text in (
        "answer" + " " * 300_000,
        "(" * 300_000,
        r"\boxed{" * 50_000,
        "answer is " * 50_000,
        "option\n" * 50_000,
        "if the answer " * 50_000,
    ):
        assert grader(prompt("B"), text).extracted is None


@pytest.fixture(scope="module")
def countdown():
    return load_prompts("reasoning_gym:countdown?size=2&seed=7")[0]


def test_reasoning_gym_scores_by_the_data_sets_own_rule(countdown):
    answer = countdown.answer
    assert ReasoningGym()(countdown, f"<answer>1</answer> no <answer> {answer} </answer>") == Grade(
        1.0, True, answer
    )
    assert ReasoningGym()(countdown, f"<answer>{answer} + 0 * 1</answer>").correct is False
    assert ReasoningGym()(countdown, answer) == Grade(0.0, False)
    assert ReasoningGym()(countdown, f"<answer>{answer}") == Grade(0.0, False)
    assert ReasoningGym(whole_text=True)(countdown, answer).correct
    assert ReasoningGym(marker="=>")(countdown, f"so => {answer}").correct


def test_reasoning_gym_has_partial_rewards_and_a_threshold(countdown):
    close = ReasoningGym(threshold=0.01)(countdown, "<answer>1 + 1</answer>")
    assert 0 < close.reward < 1 and close.correct
    assert not ReasoningGym()(countdown, "<answer>1 + 1</answer>").correct
    with pytest.raises(ValueError, match="threshold = 0"):
        ReasoningGym(threshold=0.0)
    with pytest.raises(ValueError, match="load it from reasoning_gym"):
        ReasoningGym()(prompt(), "<answer>1</answer>")


@pytest.mark.parametrize(
    "result, grade",
    [
        (True, Grade(1.0, True)),
        (np.isclose(1, 2), Grade(0.0, False)),
        (0.25, Grade(0.25, None)),
        (3, Grade(3.0, None)),
        (Grade(0.5, True, "x"), Grade(0.5, True, "x")),
    ],
)
def test_a_users_function_may_return_three_kinds(result, grade):
    assert Function(lambda p, t: result)(prompt(), "") == grade


def test_a_threshold_decides_what_is_correct():
    assert [
        Function(lambda p, t: float(t), threshold=0.5)(prompt(), t).correct for t in ("0.4", "0.5")
    ] == [False, True]


@pytest.mark.parametrize(
    "result", [float("nan"), float("inf"), None, "much", Grade(float("nan"), True)]
)
def test_a_result_that_is_no_finite_reward_is_an_error(result):
    with pytest.raises((ValueError, TypeError)):
        Function(lambda p, t: result)(prompt(), "")


def test_a_prompt_without_an_answer_is_an_error():
    for missing in (None, "", " "):
        for grader in (Exact(), MultipleChoice()):
            with pytest.raises(ValueError, match="no answer; name its column"):
                grader(prompt(missing), "42")
