"""Texts that decide for an option, texts that turn one down, and prose that does neither."""

import pytest

from reflux.trainer.data.option_letters import decided_letter

DECIDED = [
    r"The answer is \boxed{B. 42}",
    r"Therefore \boxed{\text{B. Paris}}",
    r"\boxed{B) 42}",
    r"\boxed{(B) \frac{1}{2}}",
    r"The answer is \(B\).",
    r"The answer is \[B\]",
    "Answer: [B]",
    "[B]",
    "<answer>B</answer>",
    "<think>A or C?</think><Answer>\n(B) Paris\n</Answer> as said",
    "B is correct.",
    "**B** is correct, because A fails.",
    "Only B is correct.",
    "I think B is correct.",
    "A is too small, so B is the right answer.",
    "Therefore B must be right.",
    "The answer is most likely B.",
    "The answer is clearly B.",
    "The correct option is therefore (B).",
    "The most likely answer is B.",
    "The most plausible answer is B.",
    "The only other option is B.",
    "答案：B",
    "答案是B。",
    "Answer：（B）",
    "Answer: B\n\nA tempting but incorrect answer is C.",
    "B\n\nThe incorrect option is D.",
    "(B)\n\nThe second-best option is C.",
    "**B**\n\nA common wrong answer is C, because students forget the sign.",
    "Answer: B. Another possible answer is C.",
    "Answer: B. I don't think the answer is C.",
    "Answer: B. You may ask whether the answer is C.",
    "Even if A fails the answer is B.",
    "Since A is wrong the answer is B.",
    "A is incorrect, correct answer is B.",
    "If energy is conserved, the answer is B.",
    "If energy is conserved then the answer is B.",
    "The answer is B, also A is too small.",
    "The answer is B and A is wrong.",
    "(B), having ruled out (C)",
]
UNDECIDED = [
    "The incorrect answer is D.",
    "The wrong choice is C.",
    "The incorrect answer choice is C.",
    "Wrong answer: C",
    "I can't tell whether the answer is A.",
    "I don't know if the correct answer is A.",
    "I do not think that the answer is A.",
    "It is false that A is correct.",
    "I don't believe A is correct.",
    "Suppose the answer is A.",
    "I ruled out option C.",
    "I reject (C).",
    "The answer is A or maybe B.",
    "The answer is A, or possibly B.",
    "The answer is A, perhaps B.",
    "The answer is A (or B).",
    "The answer is A or B because both fit.",
    "<answer>A or B</answer>",
    "A is a common article.",
    "Plan B is correct behaviour, says the manual.",
    "Plan B is correct.",
    "Vitamin C is the answer.",
    "A is correct behaviour of the valve.",
    "Is it true that B is correct?",
    "A and B is correct notation.",
    "The rate is k[A][B].",
    "A right answer is hard to find.",
    "I answered a similar question: a plan is needed.",
]


@pytest.mark.parametrize("text", DECIDED)
def test_the_text_decides_for_b(text):
    assert decided_letter(text, "ABCD") == "B"


@pytest.mark.parametrize("text", UNDECIDED)
def test_the_text_decides_for_none(text):
    """A letter that is turned down is not named, an ambiguous answer is none, prose is prose."""
    assert decided_letter(text, "ABCD") is None


@pytest.mark.parametrize(
    "part",
    [
        "incorrect answer is B ",
        "whether the answer is A ",
        "<answer>",
        "if the the the ",
        "not B is correct ",
        "answer: most ",
        r"\boxed{B. ",
        "[(",
    ],
)
def test_hostile_texts_are_read_in_linear_time(part):
    decided_letter(part * (300_000 // len(part)), "ABCD")


@pytest.mark.parametrize(
    "text",
    [
        "There is no doubt the answer is B.",
        "I have no doubt that the answer is B.",
        "Without any doubt the answer is B.",
        "Beyond doubt the answer is B.",
        "I don't doubt that the answer is B.",
        "With A and C ruled out the answer is B",
        "With the rest eliminated the answer is B",
    ],
)
def test_who_does_not_doubt_decides(text):
    assert decided_letter(text, "ABCD") == "B"
    assert decided_letter("I doubt the answer is B.", "ABCD") is None
