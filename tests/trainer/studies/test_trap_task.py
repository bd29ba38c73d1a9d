import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.byte_table import TEXT
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.diagnosis.symptoms import insert_error
from reflux.trainer.studies import trap_task
from reflux.trainer.studies.trap_task import (
    DIGITS,
    FOLLOWERS,
    MIX,
    NAMES,
    NUMBERS,
    ORDERS,
    POSITIONS,
    REMARKS,
    WORDS,
    grade,
    main,
    questions,
    results,
    solve,
    write_answer,
    write_remarks,
)

DIGIT_LISTS = st.lists(st.integers(0, 9), min_size=DIGITS, max_size=DIGITS)
RIGHT = ("left", "right", "outer")
PLAIN = [2, 7, 4, 8, 0, 5, 0, 4]


def prompt(digits, name="otter"):
    answer = f"{','.join(map(str, digits))} {name}"
    return Prompt(0, ({"role": "user", "content": "?"},), answer=answer)


def answer(digits, style="left", seed=0):
    return write_answer(random.Random(seed), digits, "otter", style)


@given(DIGIT_LISTS, st.sampled_from(RIGHT), st.integers(0, 50))
def test_every_right_style_is_correct_and_they_agree_on_one_answer(digits, style, seed):
    g = grade(prompt(digits), answer(digits, style, seed))
    assert g.correct and g.reward == 1.0
    assert g.extracted == grade(prompt(digits), answer(digits, "left")).extracted


@given(DIGIT_LISTS)
def test_the_easy_style_is_right_only_where_no_digit_is_copied(digits):
    g = grade(prompt(digits), answer(digits, "short"))
    assert g.extracted is not None and g.correct == (max(digits) < trap_task.EASY_BELOW)


def test_the_easy_style_is_wrong_in_94_of_100_questions():
    rng = random.Random(0)
    lists = [rng.choices(range(10), k=DIGITS) for _ in range(20_000)]
    right = sum(bool(grade(prompt(d), answer(d, "short")).correct) for d in lists) / len(lists)
    assert right == pytest.approx(0.7**DIGITS, abs=0.006)


def test_a_number_word_takes_its_digit_back():
    plain = "left:5 the0 of7 to1 in3 a8 to3 of7 the;. otter"
    assert grade(prompt(PLAIN), plain).correct
    slip = plain.replace("5 the", "9 five")
    assert grade(prompt(PLAIN), slip).correct  # 9, no: 5
    assert not grade(prompt(PLAIN), plain.replace("5 the", "9 the")).correct  # not taken back
    assert not grade(prompt(PLAIN), plain.replace("5 the", "5 nine")).correct  # a wrong repair
    assert results("5 the9 five") == [5, 5]


def test_an_inserted_error_can_be_taken_back():
    """What `diagnose` does to a text that is cut behind a digit."""
    clean = "left:5 the0 of7"
    wrong = insert_error(clean, random_generator())
    assert wrong != clean and wrong[:-1] == clean[:-1]
    rest = " seven1 in3 a8 to3 of7 the;. otter"
    assert grade(prompt(PLAIN), wrong + rest).correct


def random_generator():
    import numpy as np

    return np.random.default_rng(0)


def test_the_name_counts():
    text = answer(PLAIN)
    assert grade(prompt(PLAIN), text).correct
    assert grade(prompt(PLAIN, "zebra"), text).correct is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left:",
        "up:5 the0 of7 to1 in3 a8 to3 of7 the;. otter",
        "left:5 the0 of7 to1 in3 a8 to3 of;. otter",
        "left:5 the0 of7 to1 in3 a8 to3 of7 the1 of;. otter",
        "left:5 the0 of7 to1 in3 a8 to3 of7 the; 5. otter",
        "left:5 the0 of7 to1 in3 a8 to3 of7 the;.",
    ],
)
def test_another_form_is_no_answer(text):
    g = grade(prompt(PLAIN), text)
    assert g.correct is False and g.extracted is None


def test_a_prompt_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="want its digits and name"):
        grade(Prompt(0, ({"role": "user", "content": "?"},)), answer(PLAIN))


def test_slips_mixes_and_orders_are_as_announced():
    rng = random.Random(1)
    assert all(sorted(order) == list(range(DIGITS)) for order in ORDERS.values())
    assert all(sum(row) == pytest.approx(1) for row in MIX)
    words = Counter(
        word
        for _ in range(4000)
        for _, word in trap_task.STEP.findall(write_answer(rng, PLAIN, "otter", "left"))
    )
    slips = sum(words[n] for n in NUMBERS) / words.total()
    assert slips == pytest.approx(trap_task.SLIP, abs=0.01)
    assert solve(PLAIN, "short") == [5, 7, 7, 8, 3, 8, 3, 7]


def test_remarks_are_a_chain_with_a_tail():
    assert all(sum(row) == pytest.approx(1) for row in FOLLOWERS)
    rng = random.Random(0)
    counts = [len(write_remarks(rng).split()) for _ in range(2000)]
    assert min(counts) == 0 and max(counts) <= REMARKS
    assert sum(c == 0 for c in counts) / 2000 == pytest.approx(trap_task.NO_REMARKS, abs=0.04)
    assert set(NAMES).isdisjoint(WORDS) and set(NUMBERS).isdisjoint(WORDS)
    assert len(set(NAMES)) == len(NAMES) and len(set(WORDS)) == len(WORDS)


def test_the_written_world(tmp_path, monkeypatch):
    """Data that its own grader accepts as often as announced, no question in two parts, and one
    token for every word, so that steps have equal lengths.
    """
    monkeypatch.setattr(
        trap_task, "SIZES", {"train": 600, "start": 600, "prompts": 50, "heldout": 50}
    )
    assert main(["--out", str(tmp_path), "--seed", "3"]) == 0
    rows = {
        name: [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in trap_task.SIZES
    }
    share = sum(
        bool(grade(Prompt(0, (), answer=r["answer"]), r["response"]).correct) for r in rows["train"]
    )
    assert 0.68 < share / 600 < 0.86
    asked = {r["answer"].split()[0] for r in rows["train"]}
    assert asked.isdisjoint(r["answer"].split()[0] for r in rows["heldout"])
    chat = Chat(str(tmp_path / "teacher"))
    lengths = [len(chat.encode(r["response"])) for r in rows["train"]]
    assert 20 <= min(lengths) and 60 < max(lengths) <= 121
    prompts = [chat.prompt_ids(({"role": "user", "content": r["prompt"]},)) for r in rows["train"]]
    assert max(map(len, prompts)) + max(lengths) < POSITIONS
    for word in (*WORDS[:20], *NUMBERS):
        assert len(chat.encode(f"0 {word}")) == 2, word
    kinds = chat.table.kind[list(chat.encode(rows["train"][0]["response"]))]
    assert (kinds == TEXT).all()


def test_one_seed_one_world():
    a, b = (
        list(questions(random.Random("7/train"), 5, held_out=False, worked=True)) for _ in range(2)
    )
    assert a == b
