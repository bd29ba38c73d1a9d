"""One row of every shape that public data sets have: the prompt, the answer as it is graded, the
given response. The rows are made here, in the form of the data set that is named.
"""

import json

import pytest

from reflux.trainer.config.data import DataSection, SourceSection
from reflux.trainer.data.grader_options import make_grader
from reflux.trainer.data.options import Listing
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.shapes import SHAPES, detect_shape, gold_and_solution

HUMAN, GPT = {"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "4"}
ASK, TELL = (
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "4"},
)
SYSTEM = {"role": "system", "content": "Be short."}
SOLVED = "2 + 2 = <<2+2=4>>4\n#### 4"
FOUR = ["3", "4", "5", "6"]

ROWS = {
    "plain": ({"prompt": "Two plus two?", "answer": 4}, [ASK], "4", None),
    "plain, worked answer": ({"prompt": "Two plus two?", "answer": SOLVED}, [ASK], "4", SOLVED),
    "OpenAI": ({"messages": [SYSTEM, ASK, TELL]}, [SYSTEM, ASK], None, "4"),
    "OpenAI, parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Two plus "},
                        {"type": "text", "text": "two?"},
                    ],
                },
                TELL,
            ]
        },
        [ASK],
        None,
        "4",
    ),
    "ShareGPT": ({"conversations": [HUMAN, GPT], "id": 7}, [ASK], None, "4"),
    "ShareGPT, system": (
        {"conversations": [HUMAN, GPT], "system": "Be short."},
        [SYSTEM, ASK],
        None,
        "4",
    ),
    "ShareGPT, roles": ({"conversations": [ASK, TELL]}, [ASK], None, "4"),
    "prompt and completion": ({"prompt": "Two plus two?", "completion": "4"}, [ASK], None, "4"),
    "conversational completion": ({"prompt": [SYSTEM, ASK], "completion": [TELL]}, None, None, "4"),
    "preference": (
        {"prompt": "Two plus two?", "chosen": "4", "rejected": "5"},
        [ASK],
        None,
        "4",
    ),
    "preference, whole conversations": (
        {"chosen": [ASK, TELL], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
        [ASK],
        None,
        "4",
    ),
    "preference, prompt of messages": (
        {"prompt": [ASK], "chosen": [TELL], "rejected": [TELL]},
        [ASK],
        None,
        "4",
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [{"role": "user", "content": "Add.\n\n### Input:\n2 and 2"}],
        None,
        "4",
    ),
    "Alpaca, no input": (
        {"instruction": "Two plus two?", "input": "", "output": "4"},
        [ASK],
        None,
        "4",
    ),
    "Dolly": (
        {"instruction": "How many?", "context": "Two, and two.", "response": "4", "category": "qa"},
        [{"role": "user", "content": "How many?\n\nTwo, and two."}],
        None,
        "4",
    ),
    "GSM8K": ({"question": "Two plus two?", "answer": SOLVED}, [ASK], "4", SOLVED),
    "MATH": (
        {"problem": "Two plus two?", "solution": "It is \\boxed{4}.", "level": "Level 1"},
        [ASK],
        "It is \\boxed{4}.",
        "It is \\boxed{4}.",
    ),
    "BigMath": ({"problem": "Two plus two?", "answer": "4"}, [ASK], "4", None),
    "MMLU": (
        {"question": "Two plus two?", "subject": "sums", "choices": FOUR, "answer": 1},
        [ASK],
        "B",
        None,
    ),
    "MMLU-Pro": (
        {"question": "Two plus two?", "options": FOUR, "answer": "B", "answer_index": 1},
        [ASK],
        "B",
        None,
    ),
    "SuperGPQA": (
        {"question": "Two plus two?", "options": FOUR, "answer": "4", "answer_letter": "B"},
        [ASK],
        "B",
        None,
    ),
    "ARC": (
        {
            "question": "Two plus two?",
            "choices": {"text": FOUR, "label": list("ABCD")},
            "answerKey": "B",
        },
        [ASK],
        "B",
        None,
    ),
    "ARC, numbered": (
        {
            "question": "Two plus two?",
            "choices": {"text": FOUR, "label": list("1234")},
            "answerKey": "2",
        },
        [ASK],
        "B",
        None,
    ),
    "CSQA, hidden answer": (
        {
            "question": "Two plus two?",
            "question_concept": "sum",
            "choices": {"label": list("ABCD"), "text": FOUR},
            "answerKey": "",
        },
        [ASK],
        None,
        None,
    ),
    "text": ({"text": "Two plus two is 4."}, [], None, "Two plus two is 4."),
}


def load(tmp_path, row, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    listing = options.pop("listing", None)
    return load_prompts(DataSection(str(file), **options), listing=listing)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_shape(tmp_path, name):
    row, messages, answer, response = ROWS[name]
    prompt = load(tmp_path, row)[0]
    assert list(prompt.messages) == (messages if messages is not None else [SYSTEM, ASK])
    assert (prompt.answer, prompt.response) == (answer, response)
    assert not {"rejected", "input", "context", "system"} & set(prompt.extra)


def test_every_shape_has_a_row():
    assert {detect_shape(list(row), row) for row, *_ in ROWS.values()} == set(SHAPES)


@pytest.mark.parametrize(
    "name, task, options, text, correct",
    [
        ("GSM8K", "exact", {}, "4", True),
        ("GSM8K", "exact", {"marker": "####"}, "so it is\n#### 4", True),
        ("GSM8K", "exact", {"marker": "####"}, "so it is\n#### 5", False),
        ("MMLU", "multiple_choice", {}, "The answer is B.", True),
        ("MMLU-Pro", "multiple_choice", {}, "The answer is A.", False),
        ("ARC, numbered", "multiple_choice", {}, "(B)", True),
        ("SuperGPQA", "multiple_choice", {}, "Answer: B", True),
        ("plain, worked answer", "exact", {}, "4", True),
    ],
)
def test_the_answer_of_a_row_is_what_graders_compare_with(
    tmp_path, name, task, options, text, correct
):
    grader, _ = make_grader(task, options)
    assert grader(load(tmp_path, ROWS[name][0])[0], text).correct is correct


@pytest.mark.parametrize("name", ["MMLU", "ARC", "MMLU-Pro", "CSQA, hidden answer"])
def test_options_are_shown_in_training_prompts(tmp_path, name):
    prompt = load(tmp_path, ROWS[name][0], listing=Listing(5))[0]
    first, *lines = prompt.messages[-1]["content"].splitlines()
    assert first == "Two plus two?" and [line[:3] for line in lines] == ["A) ", "B) ", "C) ", "D) "]
    assert sorted(line[3:] for line in lines) == FOUR
    if prompt.answer is not None:
        assert lines["ABCD".index(prompt.answer)][3:] == "4", "the answer follows its text"


def test_options_that_stand_in_a_prompt_are_not_written_again(tmp_path):
    row = {"prompt": "Which? A) 3 B) 4", "choices": ["3", "4"], "answer": "B"}
    assert load(tmp_path, row, listing=Listing(5))[0].messages[0]["content"] == row["prompt"]
    listed = load(tmp_path, row, listing=Listing(5, always=True))[0]
    assert "\nA) " in listed.messages[0]["content"]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"messages": [ASK, {**TELL, "tool_calls": [{"id": 1}]}]}, "message 1 calls a tool"),
        (
            {"messages": [{"role": "tool", "content": "x"}, ASK]},
            "message 0 calls a tool or answers",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part of its content is image_url; only text",
        ),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 0: from str 'narrator'"),
        ({"conversations": [GPT, HUMAN, {"from": "gpt"}]}, "turn 2: no content"),
        ({"chosen": [ASK], "rejected": [ASK]}, "does not end with the assistant's"),
        ({"question": "?", "choices": ["a", "b"], "answer": "z"}, "none of its options; want one"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "want 2 to 26 options"),
        ({"question": "?", "choices": ["a", "b"], "answer": 5}, "5 is none of its options"),
        ({"instruction": "", "output": "x"}, "column instruction: str ''; want a text"),
    ],
)
def test_a_row_that_cannot_be_read_is_located(tmp_path, row, says):
    with pytest.raises(ValueError) as error:
        load(tmp_path, row)
    assert "rows.jsonl, line 1" in str(error.value) and says in str(error.value)


def test_a_shape_can_be_set(tmp_path):
    row = {"prompt": "a", "text": "b", "question": "c", "answer": "d"}
    assert load(tmp_path, row)[0].messages[0]["content"] == "a"
    assert load(tmp_path, row, shape="question")[0].messages[0]["content"] == "c"
    assert load(tmp_path, row, shape="text")[0].response == "b"
    with pytest.raises(ValueError, match="no column 'messages'.*set shape to one of"):
        load(tmp_path, row, shape="messages")


def test_columns_rename_inside_a_shape(tmp_path):
    row = {"question": "Two plus two?", "answer": "unused", "gold": 4}
    prompt = load(tmp_path, row, columns={"answer": "gold"})[0]
    assert (prompt.answer, prompt.extra) == ("4", {"answer": "unused"})


def test_a_system_message_is_put_before_conversations_without_one(tmp_path):
    assert load(tmp_path, {"prompt": "Two plus two?"}, system="Be short.")[0].messages == (
        SYSTEM,
        ASK,
    )
    given = {"messages": [{"role": "system", "content": "Be long."}, ASK]}
    assert load(tmp_path, given, system="Be short.")[0].messages[0]["content"] == "Be long."
    assert load(tmp_path, {"text": "A document."}, system="Be short.")[0].messages == ()


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("work\n#### 1,234 \n", "1,234"),
        ("#### 5", "5"),
        ("a #### 5", None),
        ("#### 5\nmore", None),
        ("####", None),
        (None, None),
    ],
)
def test_the_gold_of_a_worked_solution(answer, gold):
    found, solution = gold_and_solution(answer)
    assert (found, solution) == ((gold, answer) if gold is not None else (answer, None))


def test_a_section_without_a_source_has_the_defaults_of_a_row():
    assert SourceSection().shape == "auto" and SourceSection().list_options is None


@pytest.mark.parametrize(
    "choices, answer, label",
    [
        (["b", "a"], "a", "B"),  # the option's text, before it is the label in capitals
        (["b", "a"], "A", "A"),
        (["B", "A"], "A", "A"),  # a label as it is written
        (["yes", "no"], "b", "B"),
        (["yes", "no"], "-1", None),  # hidden
    ],
)
def test_options_that_are_letters_themselves(tmp_path, choices, answer, label):
    row = {"question": "Which?", "choices": choices, "answer": answer}
    assert load(tmp_path, row)[0].answer == label


@pytest.mark.parametrize("labels", [[1, 2, 3], ["1", "2", "3"], ["A.", "B.", "C."]], ids=str)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_answer_that_is_a_label_is_no_position(tmp_path, labels, as_text):
    """2 is the second of 1, 2, 3, whichever of the two is a number."""
    answer = str(labels[1]) if as_text else labels[1]
    choices = {"label": labels, "text": ["red", "green", "blue"]}
    row = {"question": "Which?", "choices": choices, "answer": answer}
    assert load(tmp_path, row)[0].answer == "B"
