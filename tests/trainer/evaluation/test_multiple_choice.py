"""Options: read as the grader reads them, shuffled without losing the right one (scored:
test_evaluation.py).
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import MultipleChoice
from reflux.trainer.evaluation.multiple_choice import (
    Options,
    likelihood_rows,
    list_options,
    read_options,
)


def ask(answer="B", choices=("red", "green", "blue"), index=0):
    return Prompt(
        index,
        ({"role": "system", "content": "s"}, {"role": "user", "content": "Which?"}),
        answer,
        None,
        {"choices": choices, "more": 1},
    )


@pytest.mark.parametrize(
    "prompt, answer_is, right",
    [
        (ask("b"), "letter", 1),
        (ask("2"), "index", 2),
        (ask("red"), "text", 0),
        (ask(" C "), "letter", 2),
        (ask("2", {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}), "letter", 1),
    ],
)
def test_options_are_read(prompt, answer_is, right):
    options = read_options(prompt, answer_is=answer_is)
    assert (
        options.right == right
        and len(options.texts) == 3
        and options.place_of(options.labels[right]) == right
    )
    assert options.place_of(None) is None and options.place_of("Z") is None


@pytest.mark.parametrize(
    "prompt, answer_is, says",
    [
        (ask("D"), "letter", "prompt 0: answer 'D' is none of A, B, C. Set task.options.answer_is"),
        (ask("3"), "index", "none of 0, 1, 2"),
        (ask(None), "letter", "answer ''"),
        (ask("A", ["one"]), "letter", "want two or more"),
        (ask("A", ["a", ""]), "letter", "none empty"),
        (ask("A", {"label": ["A"], "text": ["a", "b"]}), "letter", "one label each"),
        (
            Prompt(4, (), "A", None, {"options": []}),
            "letter",
            "prompt 4: no column 'choices' with the options; there are: options",
        ),
    ],
)
def test_what_is_no_choice_is_refused(prompt, answer_is, says):
    with pytest.raises(ValueError) as error:
        read_options(prompt, answer_is=answer_is)
    assert says in str(error.value)


@given(
    seed=st.integers(0, 2**32 - 1),
    index=st.integers(0, 10**6),
    right=st.integers(0, 3),
    form=st.sampled_from(["letter", "index", "text"]),
    labelled=st.booleans(),
)
def test_a_shuffle_keeps_the_options_and_the_right_one(seed, index, right, form, labelled):
    texts = ["w", "x", "y", "z"]
    choices = {"label": list("abcd"), "text": texts} if labelled else texts
    before = ask(
        {"letter": "ABCD"[right], "index": str(right), "text": texts[right]}[form], choices, index
    )
    after = list_options(before, seed, answer_is=form)
    options = read_options(after, answer_is=form)
    assert (
        sorted(options.texts) == texts
        and options.texts[options.right] == texts[right]
        and options.labels == ("A", "B", "C", "D")
    )
    shown = "\n".join(f"{label}) {text}" for label, text in zip(options.labels, options.texts))
    assert (
        after.messages == (before.messages[0], {"role": "user", "content": f"Which?\n{shown}"})
        and after.extra["more"] == 1
    )
    assert after == list_options(before, seed, answer_is=form), (
        "a shuffle is a function of seed and prompt"
    )
    grade = MultipleChoice(answer_is=form)(after, f"Answer: {options.labels[options.right]}")
    assert grade.correct and options.place_of(grade.extracted) == options.right, (
        "the grader follows"
    )


def test_the_right_option_stands_everywhere_about_equally_often():
    places = Counter(read_options(list_options(ask("A", "wxyz", i), 7)).right for i in range(400))
    assert set(places) == {0, 1, 2, 3} and all(70 <= n <= 130 for n in places.values())
    assert places != Counter(
        read_options(list_options(ask("A", "wxyz", i), 8)).right for i in range(400)
    )


def test_the_best_in_sum_and_per_byte_differ():
    total, per_byte = likelihood_rows(
        ask(), Options(("A", "B", "C"), ("no", "é" * 4, "maybe"), 1), [-2.0, -4.0, -6.0]
    )
    assert (total["mode"], total["choice_at"], total["correct"], total["extracted"]) == (
        "likelihood_sum",
        0,
        False,
        "no",
    )
    assert (per_byte["mode"], per_byte["choice_at"], per_byte["correct"]) == (
        "likelihood_per_byte",
        1,
        True,
    )
    assert (
        per_byte["bytes"] == [2, 8, 5]
        and per_byte["logp"] == [-2.0, -4.0, -6.0]
        and per_byte["position"] == 1
    )
