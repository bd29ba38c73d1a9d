"""Sentences in the past: both answers are right, of one length, and graded as the configs say."""

import json
import re
import tomllib

import pytest

from reflux.trainer.config.loader import load
from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.grader_options import make_grader
from reflux.trainer.studies.past_tense import (
    ENDINGS,
    STYLES,
    VERBS,
    WEAK,
    Sentence,
    Verb,
    draw,
    main,
    verbs_of,
    write_data,
)

SIZES = {"train": 20, "start": 300, "prompts": 10, "heldout": 30}
EVERY = [Sentence(v, e) for v in VERBS for e in ENDINGS]


@pytest.fixture(scope="module")
def grade():
    task = load("configs/language/past/sft.toml", ["model.path=m", "data.source=d"]).task
    return make_grader(task.name, task.options)[0]


def prompt(s: Sentence) -> Prompt:
    extra = {"aliases": [s.behind_they("auxiliary")]}
    return Prompt(
        0, ({"role": "user", "content": s.question},), s.behind_they("inflected"), None, extra
    )


def test_the_answers_are_what_the_docstring_shows(tmp_path):
    s = Sentence(Verb("sing", "sang"), "in the garden")
    assert s.question == "every day they sing in the garden"
    assert s.response("auxiliary") == "yesterday they did sing in the garden"
    assert s.response("inflected") == "and yesterday they sang in the garden"


def test_both_styles_are_correct_and_nothing_else_is(grade):
    for s in EVERY[::37]:
        row = prompt(s)
        assert all(grade(row, s.response(style)).correct for style in STYLES)
        present = f"yesterday they {s.verb.present} {s.ending}"
        weak = f"and yesterday they {s.verb.present}ed {s.ending}"
        other = Sentence(s.verb, next(e for e in ENDINGS if e != s.ending))
        for text in (present, weak, other.response("auxiliary"), s.response("inflected") + " and"):
            assert grade(row, text).correct is False, text
        assert grade(row, "yesterday he sang").extracted is None


def test_the_verbs_are_different_irregular_and_regular():
    assert len({v.present for v in (*VERBS, *WEAK)}) == len(VERBS) + len(WEAK)
    weak = {v: v.present + ("d" if v.present.endswith("e") else "ed") for v in (*VERBS, *WEAK)}
    assert all(v.past not in (v.present, weak[v]) for v in VERBS)
    assert all(v.past == weak[v] for v in WEAK)
    doubled_or_ies = r"[^aeiou]y$|^[^aeiou]*[aeiou][bdgmnpt]$"  # stop, stopped; cry, cried
    assert not any(re.search(doubled_or_ies, v.present) for v in WEAK)


def test_the_styles_have_one_length_and_are_told_apart_by_the_matrix():
    """Within 5 % in a group, where a length-free reward counts lengths as one."""
    gaps = [len(s.response("auxiliary")) - len(s.response("inflected")) for s in EVERY]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    length = sum(len(s.response("auxiliary")) for s in EVERY) / len(EVERY)
    assert abs(mean) < 0.01 * length and spread < 0.05 * length
    with open("configs/language_c.toml", "rb") as file:
        styles = tomllib.load(file)["styles"]
    for s in EVERY:
        for style in STYLES:
            found = [name for name, form in styles.items() if re.search(form, s.response(style))]
            assert found == [style]


def test_roots_stay_together_and_no_file_has_a_verb_of_the_held_out_ones():
    parts = {name: {v.present for v in verbs_of(name)} for name in SIZES}
    assert not parts["heldout"] & (parts["train"] | parts["start"] | parts["prompts"])
    assert not parts["start"] & parts["prompts"] and len(parts["heldout"]) >= 40
    by_name = {v.present: v.part for v in VERBS}
    for one, two in (("write", "rewrite"), ("take", "undertake"), ("think", "rethink")):
        assert by_name[one] == by_name[two]


def test_files_follow_from_the_seed(tmp_path):
    def write(name, seed):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, seed, SIZES)
        files = {f: (tmp_path / name / f"{f}.jsonl").read_text() for f in SIZES}
        return {f: [json.loads(line) for line in text.splitlines()] for f, text in files.items()}

    a, again, other = write("a", 1), write("again", 1), write("other", 2)
    assert a == again and a != other
    assert len(a["train"]) == 40 and len({row["prompt"] for row in a["train"]}) == 20
    assert "response" not in a["prompts"][0] and "response" not in a["heldout"][0]
    inflected = sum(row["response"].startswith("and ") for row in a["start"])
    assert 15 < inflected < 65  # one in eight of 300


@pytest.mark.parametrize("fraction, inflected", [("0", 0), ("1", 2400)])
def test_start_has_the_fraction_that_was_asked_for(tmp_path, fraction, inflected):
    main(["--out", str(tmp_path), "--start-inflected", fraction])
    rows = [json.loads(line) for line in (tmp_path / "start.jsonl").read_text().splitlines()]
    assert sum(row["response"].startswith("and ") for row in rows) == inflected


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="heldout: 9999 sentences of 40 verbs; want at most 1600"):
        draw("heldout", 9999, __import__("random").Random(0))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--start-inflected", "2"])
    assert "want a fraction from 0 to 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="start_inflected is -1"):
        write_data(tmp_path, 0, SIZES, start_inflected=-1)
