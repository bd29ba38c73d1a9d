"""Instructions that a rule can check: what is asked can be done, is graded, and is held out."""

import json
import random
import re

import pytest
from fake_wordnet import EXAMPLES, NOUNS, OTHER_EXAMPLE, write_wordnet

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.loader import load
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.grader_options import make_grader
from reflux.trainer.data.sources import open_source
from reflux.trainer.studies.word_sentences import (
    LONGEST,
    Noun,
    as_sentence,
    choices,
    example_sentences,
    known_nouns,
    main,
    part,
    question,
    words_to_ask,
    write_data,
)

SIZES = {"prompts": 20, "heldout": 10, "choices": 4}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    return write_wordnet(tmp_path_factory.mktemp("dict"))


@pytest.fixture(scope="module")
def grade():
    task = load("configs/language/words/sft.toml", ["model.path=m", "data.source=d"]).task
    return make_grader(task.name, task.options)[0]


def prompt(row):
    extra = {k: row[k] for k in ("instruction_id_list", "kwargs")}
    return Prompt(0, ({"role": "user", "content": row["prompt"]},), extra=extra)


@pytest.mark.parametrize("seed", range(20))
def test_a_sentence_that_does_what_is_asked_is_correct_and_others_are_not(grade, seed):
    row = question(["lantern", "bridge", "kettle"], random.Random(seed))
    first, second = row["kwargs"][0]["keywords"]
    longest = row["kwargs"][1]["num_words"]
    assert first != second and longest in LONGEST
    assert (
        f"at most {longest} words" in row["prompt"] and f'"{first}" and "{second}"' in row["prompt"]
    )
    assert grade(prompt(row), f"The {first} is near the {second}.").correct
    partly = {  # of three instructions
        f"The {first} is near.": 2,
        f"The {first} is near the {second}. It is old.": 2,
        f"The {first} is near the {second}" + " and old" * longest + ".": 2,
    }
    for text, followed in partly.items():
        wrong = grade(prompt(row), text)
        assert not wrong.correct and wrong.reward == pytest.approx(followed / 3)


@pytest.mark.parametrize(
    "example, sentence",
    [
        ("he noted that she wore a wedding band", "He noted that she wore a wedding band."),
        ("The horses broke from the stable.", "The horses broke from the stable."),
        ("a dull day in the long winter", ""),  # a phrase
        ("she  ran ;", ""),  # too short
        ("They " + "ran and " * 5 + "fell", ""),  # too long
        ("it cost 5 dollars in all", ""),
        ("He left (in haste) at noon", ""),
    ],
)
def test_an_example_is_a_sentence_or_nothing(example, sentence):
    assert as_sentence(example) == sentence


def test_sentences_are_those_of_all_four_files_and_the_licence_is_none(wordnet):
    found = example_sentences(wordnet)
    assert len(found) == 1000 and found[0] == EXAMPLES[0] + "." and found[-1] == OTHER_EXAMPLE


def test_what_is_asked_for_are_frequent_content_words_of_the_sentence():
    sentences = [
        f"They painted the mirror with {w} and {w}s." for w in ("oil", "wax", "tar", "gum")
    ]
    assert words_to_ask(sentences) == {}, "four sentences are too few"
    sentences.append("We painted the mirror with their lacquer.")
    assert set(map(tuple, words_to_ask(sentences).values())) == {("mirror", "painted")}
    assert words_to_ask([s.replace("mirror", "Paris") for s in sentences]) == {}


def test_a_sentence_is_in_one_file_and_its_words_depend_on_the_seed(wordnet, tmp_path):
    read = {}
    for name, seed in (("a", 331), ("again", 331), ("other", 332)):
        (tmp_path / name).mkdir()
        written = write_data(wordnet, tmp_path / name, seed, SIZES)
        files = sorted((tmp_path / name).glob("*.jsonl"))
        read[name] = {f.stem: f.read_text() for f in files}
    assert read["a"] == read["again"] != read["other"]
    assert written.keys() == read["a"].keys() and written["heldout"] == 10
    rows = {f: [json.loads(line) for line in text.splitlines()] for f, text in read["a"].items()}
    taught = {f: {r["response"] for r in rows[f]} for f in ("start", "train")}
    assert taught["start"] < taught["train"] and {part(s) for s in taught["start"]} == {"start"}
    assert {part(s) for s in taught["train"]} == {"start", "prompts"}
    assert not any("response" in r for f in ("prompts", "heldout", "choices") for r in rows[f])
    asked = {r["prompt"] for r in rows["train"]}
    assert all(r["prompt"] in asked for r in rows["prompts"])
    source = open_source(SourceSection(source=str(tmp_path / "a" / "prompts.jsonl")), None)
    assert source.rows[0]["instruction_id_list"]


def test_every_response_follows_its_instructions(wordnet, tmp_path, grade):
    write_data(wordnet, tmp_path, 0, SIZES)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) > 300 and all(grade(prompt(r), r["response"]).correct for r in rows)


def test_nouns_are_common_in_their_first_sense_and_not_in_their_definition(wordnet):
    nouns = known_nouns(wordnet)
    assert nouns == [Noun(word, "13", f"food number {i}") for i, word in enumerate(NOUNS)]


def test_the_right_noun_is_among_nouns_of_its_kind():
    nouns = [Noun(w, "food", f"the {w} one") for w in NOUNS]
    nouns += [Noun(w, "place", w) for w in ("sea", "hill", "lake")]
    rows = list(choices(nouns, random.Random(0)))
    assert len(rows) == 5, "a kind of three has no three others"
    for row in rows:
        right = row["choices"][int(row["answer"])]
        assert re.search(f"the {right} one", row["prompt"])
        assert len(set(row["choices"])) == 4 and set(row["choices"]) <= set(NOUNS)
    assert len({row["answer"] for row in choices(nouns, random.Random(1))}) > 1


def test_a_folder_that_is_not_wordnet_and_one_with_too_little_are_told(tmp_path, wordnet, capsys):
    with pytest.raises(SystemExit):
        main(["--wordnet", str(tmp_path), "--out", str(tmp_path / "out")])
    assert (
        "no data.verb, data.noun, data.adj, data.adv, index.sense; want" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["--wordnet", str(wordnet), "--out", str(tmp_path / "out")])
    assert "prompts.jsonl: " in (told := capsys.readouterr().err) and "want 2000" in told


def test_the_command_says_what_it_wrote(wordnet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.word_sentences.SIZES", SIZES)
    monkeypatch.setattr("reflux.trainer.studies.word_sentences.write_data.__defaults__", (SIZES,))
    assert main(["--wordnet", str(wordnet), "--out", str(tmp_path / "out")]) == 0
    assert "10 heldout" in capsys.readouterr().out
