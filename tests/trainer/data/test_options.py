"""Options: read as the grader reads them, shuffled without losing the correct one."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import MultipleChoice
from reflux.trainer.data.options import Listing, list_options, read_options


def ask(answer="B", choices=("red", "green", "blue"), index=0):
    return Prompt(
        index,
        ({"role": "system", "content": "s"}, {"role": "user", "content": "Which?"}),
        answer,
        None,
        {"choices": choices, "more": 1},
    )


@pytest.mark.parametrize(
    "prompt, answer_is, correct",
    [
        (ask("b"), "letter", 1),
        (ask("2"), "index", 2),
        (ask("red"), "text", 0),
        (ask(" C "), "letter", 2),
        (ask("2", {"label": [1, 2, 3], "text": ["x", "y", "z"]}), "letter", 1),
        (ask("B.", {"label": ["A.", "B.", "C."], "text": ["x", "y", "z"]}), "letter", 1),
        (ask("2", {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}), "letter", 1),
    ],
)
def test_options_are_read(prompt, answer_is, correct):
    options = read_options(prompt, answer_is=answer_is)
    assert options.correct == correct and len(options.texts) == 3
    assert options.position_of(options.labels[correct]) == correct
    assert options.position_of(None) is None and options.position_of("Z") is None


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
    correct=st.integers(0, 3),
    form=st.sampled_from(["letter", "index", "text"]),
    labelled=st.booleans(),
)
def test_a_shuffle_keeps_the_options_and_the_correct_one(seed, index, correct, form, labelled):
    texts = ["w", "x", "y", "z"]
    choices = {"label": list("abcd"), "text": texts} if labelled else texts
    answers = {"letter": "ABCD"[correct], "index": str(correct), "text": texts[correct]}
    before = ask(answers[form], choices, index)
    after = list_options(before, seed, answer_is=form)
    options = read_options(after, answer_is=form)
    assert sorted(options.texts) == texts and options.labels == ("A", "B", "C", "D")
    assert options.texts[options.correct] == texts[correct]
    shown = "\n".join(f"{label}) {text}" for label, text in zip(options.labels, options.texts))
    assert after.messages == (
        before.messages[0],
        {"role": "user", "content": f"Which?\n{shown}"},
    )
    assert after.extra["more"] == 1
    assert after == list_options(before, seed, answer_is=form), (
        "a shuffle is a function of seed and prompt"
    )
    grade = MultipleChoice(answer_is=form)(after, f"Answer: {options.labels[options.correct]}")
    position = options.position_of(grade.extracted)
    assert grade.correct and position == options.correct, "the grader follows"


def positions(seed):
    """Of the correct option, over 400 prompts."""
    shown = (list_options(ask("A", "wxyz", i), seed) for i in range(400))
    return Counter(read_options(prompt).correct for prompt in shown)


def test_the_correct_option_stands_everywhere_about_equally_often():
    counts = positions(7)
    assert set(counts) == {0, 1, 2, 3} and all(70 <= n <= 130 for n in counts.values())
    assert counts != positions(8)


def listed(texts, seed=0, **more):
    return [list_options(ask("D", texts, i), seed, **more).extra["choices"] for i in range(20)]


@pytest.mark.parametrize(
    "last",
    [
        "Both A and B",
        "both (a) and (b)",
        "A or B",
        "Neither A nor C.",
        "A, B",
        "A/C",
        "A & B",
        "A but not B",
        "A only",
        "Only (B)",
        "Options A",
        "Same as A",
        "All of the above",
        "None of the above.",
        "all the above",
        "None of these",
        "Neither of them",
        "Both of the above options",
        "None of the other answers",
        "Two of the above",
        "以上都是",
    ],
)
def test_options_that_name_each_other_stay_where_they_are(last):
    """In another order "Both A and B" says something else, and the key is false."""
    texts = ["Neon", "Argon", "Iron", last]
    assert all(found["text"] == texts for found in listed(texts))
    labelled = {"label": ["1", "2", "3", "4"], "text": [*texts[:3], "1 and 2"]}
    shown = [list_options(ask("4", labelled, i), 0).extra["choices"]["text"] for i in range(20)]
    assert all(found == labelled["text"] for found in shown)


@pytest.mark.parametrize(
    "last",
    ["only a fool", "A cat and a dog", "salt and bread", "vitamin D", "Not enough", "All of it"],
)
def test_other_options_are_shuffled(last):
    texts = ["Neon", "Argon", "Iron", last]
    assert len({tuple(found["text"]) for found in listed(texts)}) > 5
    labelled = {"label": ["1", "2", "3", "4"], "text": ["1/2", "1, 2", "3", "4"]}
    shown = [list_options(ask("4", labelled, i), 0).extra["choices"]["text"] for i in range(20)]
    assert len(set(map(tuple, shown))) > 5, "numbers are no labels"


def test_options_are_listed_in_the_order_given():
    texts = ["red", "green", "blue", "grey"]
    assert all(found["text"] == texts for found in listed(texts, shuffle=False))
    shown = list_options(ask("D", texts), 0, shuffle=False)
    assert shown.answer == "D" and "Which?\nA) red\nB) green\n" in shown.messages[-1]["content"]
    assert Listing(0, shuffle=False).shown(ask("D", texts)) == shown


def test_options_without_an_answer_are_listed():
    shown = list_options(ask(None), 3)
    assert shown.answer is None
    texts = [line[3:] for line in shown.messages[-1]["content"].splitlines()[1:]]
    assert sorted(texts) == ["blue", "green", "red"]
