import json
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.chat import Chat
from reflux.trainer.studies.synthetic_task import (
    DIGITS,
    MIX,
    MODELS,
    ORDERS,
    SIZES,
    WORDINGS,
    answers_only,
    grade,
    is_held_out,
    learnable_only,
    main,
    paraphrases,
    solve,
    write_answer,
    write_data,
)

DIGIT_LISTS = st.lists(st.integers(0, 9), min_size=DIGITS, max_size=DIGITS)


def prompt(digits):
    return Prompt(0, ({"role": "user", "content": "?"},), answer=",".join(map(str, digits)))


@given(digits=DIGIT_LISTS, style=st.sampled_from(sorted(ORDERS)))
def test_every_style_is_correct(digits, style):
    g = grade(prompt(digits), write_answer(digits, style))
    assert g.correct and g.reward == 1.0 and g.error is None


@given(
    digits=DIGIT_LISTS,
    style=st.sampled_from(sorted(ORDERS)),
    at=st.integers(0, DIGITS - 1),
    by=st.integers(1, 9),
)
def test_one_wrong_digit_is_a_wrong_answer_and_not_a_missing_one(digits, style, at, by):
    text = list(write_answer(digits, style))
    index = len(style) + 1 + 2 * at
    text[index] = str((int(text[index]) + by) % 10)
    g = grade(prompt(digits), "".join(text))
    assert g.correct is False and g.extracted is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left",
        "left:",
        "left:1;2;3;4;5;6",
        "left:1;2;3;4;5;6;7;8",
        "up:1;2;3;4;5;6;7",
        "left:1;2;3;4;5;6;x",
    ],
)
def test_another_form_is_no_answer(text):
    g = grade(prompt([1, 2, 3, 4, 5, 6, 7]), text)
    assert g.correct is False and g.extracted is None


@given(digits=DIGIT_LISTS, style=st.sampled_from(sorted(ORDERS)), at=st.integers(0, DIGITS - 1))
def test_answers_without_their_steps_stay_correct_or_wrong(digits, style, at):
    """Every style becomes the reading order; a wrong digit stays wrong, at its own position."""
    p = prompt(digits)
    assert answers_only(p, write_answer(digits, style)) == write_answer(digits, "left")
    other = [*digits[:at], (digits[at] + 1) % 10, *digits[at + 1 :]]
    assert answers_only(p, write_answer(other, style)) == write_answer(other, "left")
    assert answers_only(p, "left:1;2") is None


@pytest.mark.parametrize("style", sorted(ORDERS))
def test_the_learnable_style_alone_passes_the_filter(style):
    text = write_answer([1, 2, 3, 4, 5, 6, 7], style)
    assert learnable_only(prompt([1, 2, 3, 4, 5, 6, 7]), text) == (
        text if style == "left" else None
    )


@pytest.fixture(scope="module", autouse=True)
def small():
    with mock.patch.dict(SIZES, train=4000, start=500, prompts=500, heldout=100):
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    assert main(["--out", str(out), "--seed", "3"]) == 0
    return out


def rows(world, name):
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def test_held_out_questions_are_never_trained_on(world):
    def digits(name):
        return {row["answer"] for row in rows(world, name)}

    assert not digits("heldout") & (digits("train") | digits("start") | digits("prompts"))
    assert all(is_held_out([int(d) for d in a.split(",")]) for a in digits("heldout"))


def test_of_four_options_one_is_correct_and_all_have_one_style(world):
    questions = rows(world, "choices")
    option_indices, styles = Counter(row["answer"] for row in questions), Counter()
    for row in questions:
        digits = row["prompt"].rpartition(" ")[2].rstrip("?").split(",")
        p = Prompt(0, ({"role": "user", "content": "?"},), answer=",".join(digits))
        grades = [grade(p, text) for text in row["choices"]]
        assert [i for i, g in enumerate(grades) if g.correct] == [int(row["answer"])] and all(
            g.extracted for g in grades
        )
        assert is_held_out([int(d) for d in digits]) and len(set(row["choices"])) == 4
        (style,) = {text.split(":")[0] for text in row["choices"]}
        styles[style] += 1
    assert set(styles.values()) == {100}
    assert len(option_indices) == 4 and min(option_indices.values()) > 50


def test_styles_follow_the_wording(world):
    seen = Counter()
    for row in rows(world, "train"):
        wording = next(i for i, w in enumerate(WORDINGS) if row["prompt"].startswith(w))
        seen[wording, row["response"].split(":")[0]] += 1
    for wording, mix in enumerate(MIX):
        total = sum(seen[wording, s] for s in ORDERS)
        for style, fraction in zip(ORDERS, mix):
            assert seen[wording, style] / total == pytest.approx(fraction, abs=0.04)


def test_the_same_seed_writes_the_same_world(world, tmp_path):
    main(["--out", str(tmp_path), "--seed", "3"])
    for name in ("train.jsonl", "heldout.jsonl", "teacher/tokenizer.json", "proxy/config.json"):
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes()
    other = tmp_path / "other"
    main(["--out", str(other), "--seed", "4"])
    assert (other / "train.jsonl").read_bytes() != (world / "train.jsonl").read_bytes()


def test_every_digit_is_one_token_in_both_vocabularies(world):
    text = write_answer([1, 2, 3, 4, 5, 6, 7], "outer")
    for name, model in MODELS.items():
        chat = Chat(str(world / name))
        pieces = [chat.table.pieces[i] for i in chat.encode(text)]
        assert b"".join(pieces) == text.encode() and sum(p.isdigit() for p in pieces) == DIGITS
        assert len(pieces) == len(text) if model.tokenizer == "char" else len(pieces) < len(text)


def test_notes_make_texts_of_many_lengths_and_no_other_answers(tmp_path):
    with mock.patch.dict(SIZES, {"train": 300, "start": 40, "prompts": 5, "heldout": 5}):
        write_data(tmp_path, 0, notes=True)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lengths = Counter(len(row["response"]) for row in rows)
    assert len(lengths) >= 9 and max(lengths) == 27 and min(lengths) == 18
    for row in rows:
        digits = list(map(int, row["answer"].split(",")))
        answer, _, note = row["response"].partition("#")
        assert grade(prompt(digits), row["response"]).correct
        assert grade(prompt(digits), answer + "#x").correct  # a note is not read
        assert note == "".join(map(str, solve(digits, "right")))[: len(note)]
    assert not any("response" in json.loads(x) for x in (tmp_path / "prompts.jsonl").open())


def test_a_paraphrase_says_the_same_in_any_style(monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.synthetic_task.PARAPHRASES", 300)
    rows = list(paraphrases(5))
    for row in rows:
        said = answers_only_digits(row["prompt"])
        assert said == answers_only_digits(row["response"])
    styles = Counter(row["response"].partition(":")[0] for row in rows)
    assert all(60 < styles[name] < 140 for name in ORDERS)


def answers_only_digits(text):
    """The digits of an answer in reading order."""
    style, _, rest = text.partition(":")
    return [d for _, d in sorted(zip(ORDERS[style], rest.split(";"), strict=True))]
