"""Sums in words: both answers are right, of one length, and graded as configs/language says."""

import json
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.config.loader import load
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.grader_options import make_grader
from reflux.trainer.studies.chained_sums import (
    OPERATIONS,
    STYLES,
    WORDS,
    Sum,
    main,
    write_data,
)

DIGITS, SIGNS = st.integers(1, 9), st.sampled_from([1, -1])
SUMS = st.builds(
    Sum,
    DIGITS,
    st.tuples(*[SIGNS] * OPERATIONS),
    st.tuples(*[DIGITS] * OPERATIONS),
).filter(lambda s: all(0 <= r < len(WORDS) for r in s.results))
ALL = (
    Sum(first, signs, (a, b))
    for first, a, b in product(range(1, 10), repeat=3)
    for signs in product((1, -1), repeat=2)
)
EVERY = [s for s in ALL if all(0 <= r < len(WORDS) for r in s.results)]
SIZES = {"train": 20, "start": 20, "prompts": 10, "heldout": 30}


@pytest.fixture(scope="module")
def grade():
    task = load("configs/language/sft.toml", ["model.path=m", "data.source=d"]).task
    return make_grader(task.name, task.options)[0]


def prompt(s: Sum) -> Prompt:
    return Prompt(0, ({"role": "user", "content": s.question},), answer=s.answer)


@given(s=SUMS)
def test_python_agrees(s):
    words = {**{w: str(n) for n, w in enumerate(WORDS)}, "plus": "+", "minus": "-"}
    expression = " ".join(words[w] for w in s.question[:-1].split())
    assert WORDS[eval(expression)] == s.answer
    first, *steps = s.response("worked").split(", ")
    value = expression.split()[0]
    for step in [first.removeprefix(WORDS[int(value)] + " "), *steps]:
        sign, number, _, result = (words.get(w, w) for w in step.split())
        assert eval(f"{value} {sign} {number}") == int(result)
        value = result
    assert WORDS[int(value)] == s.answer


@given(s=SUMS, style=st.sampled_from(STYLES))
def test_both_styles_are_correct_and_another_last_number_is_not(grade, s, style):
    text = s.response(style)
    assert grade(prompt(s), text).correct
    other = WORDS[(s.results[-1] + 1) % len(WORDS)]
    wrong = grade(prompt(s), text.rpartition(" ")[0] + " " + other)
    assert wrong.correct is False and wrong.extracted == other
    assert grade(prompt(s), s.question).extracted is None


def test_the_styles_have_one_length_and_are_told_apart_by_the_matrix():
    """Within 5 % in a group, where a length-free reward counts lengths as one."""
    gaps = [len(s.response("worked")) - len(s.response("direct")) for s in EVERY]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    length = sum(len(s.response("worked")) for s in EVERY) / len(EVERY)
    assert abs(mean) < 0.01 * length and spread < 0.05 * length
    import tomllib

    with open("configs/language_a_models.toml", "rb") as file:
        styles = tomllib.load(file)["styles"]
    for s in EVERY:
        for style in STYLES:
            found = [name for name, form in styles.items() if re.search(form, s.response(style))]
            assert found == [style]


def test_files_follow_from_the_seed_and_held_out_questions_are_in_no_other(tmp_path):
    def write(name, seed):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, seed, SIZES)
        files = {f: (tmp_path / name / f"{f}.jsonl").read_text() for f in SIZES}
        return {f: [json.loads(line) for line in text.splitlines()] for f, text in files.items()}

    a, again, other = write("a", 301), write("again", 301), write("other", 302)
    assert a == again and a != other
    held_out = {row["prompt"] for row in [*a["heldout"], *other["heldout"]]}
    for rows in (*(x[f] for x in (a, other) for f in ("train", "start", "prompts")),):
        assert not held_out & {row["prompt"] for row in rows}
    assert len(a["train"]) == 60 and len({row["prompt"] for row in a["train"]}) == 20
    styles = [row["response"].startswith("in one go") for row in a["train"]]
    assert sum(styles) == 40 and "response" not in a["prompts"][0]
    assert 0 < sum(row["response"].startswith("in one go") for row in a["start"]) < 20


def test_there_are_enough_questions_for_the_shipped_sizes(tmp_path):
    main(["--out", str(tmp_path), "--seed", "301"])
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 220
