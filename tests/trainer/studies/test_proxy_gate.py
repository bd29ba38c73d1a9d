"""The gate before the arms: what it measures, and when it is shut."""

import json

import pytest

from reflux.trainer.studies import proxy_gate
from reflux.trainer.studies.chained_sums import write_data
from reflux.trainer.studies.proxy_gate import main, measure, pairs_of

SIZES = {"train": 12, "start": 2, "prompts": 2, "heldout": 2}


@pytest.fixture
def rows(tmp_path):
    write_data(tmp_path, 0, SIZES)
    return [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]


def reader(per_comma, otherwise):
    """As if a step cost `per_comma` nats to a reader."""
    return lambda pairs: [
        (per_comma if "," in t else otherwise + 0.1 * len(q), 9) for q, t in pairs
    ]


def test_pairs_are_both_answers_to_one_question(rows):
    pairs = pairs_of(rows, 99)
    assert len(pairs) == 12 and len(pairs_of(rows, 5)) == 5
    for question, worked, direct in pairs:
        assert worked.startswith(question.split()[0]) and "," in worked
        assert direct == f"in one go {question[:-1]} is {worked.split()[-1]}"


def test_hard_answers_are_told_by_how_they_begin():
    rows = [
        {"prompt": "q", "response": "yesterday they did sing"},
        {"prompt": "q", "response": "and yesterday they sang"},
    ]
    assert pairs_of(rows, 9, "and ") == [("q", *(row["response"] for row in rows))]
    assert not pairs_of(rows, 9)


def test_the_gap_is_paired_and_the_whole_interval_has_to_be_above(rows):
    pairs = pairs_of(rows, 99)
    skilled = measure("p", pairs, reader(1.0, 3.0), 0.0)
    mean = sum(3.0 + 0.1 * len(q) - 1.0 for q, *_ in pairs) / len(pairs)
    assert skilled.gap.mean == pytest.approx(mean) and skilled.passed
    assert skilled.hard - skilled.easy == pytest.approx(mean)
    assert not measure("p", pairs, reader(1.0, 3.0), mean).passed, "the interval holds the mean"
    unskilled = measure("p", pairs, reader(9.0, 3.0), 0.0)
    assert unskilled.gap.high < 0 and not unskilled.passed
    with pytest.raises(ValueError, match="1 questions with an easy and a hard answer"):
        measure("p", pairs[:1], reader(1.0, 3.0), 0.0)


@pytest.mark.parametrize("per_comma, code", [(1.0, 0), (9.0, 1)])
def test_the_command_shuts_the_gate(rows, tmp_path, monkeypatch, capsys, per_comma, code):
    monkeypatch.setattr(proxy_gate, "make_reader", lambda folder: reader(per_comma, 3.0))
    words = ["--proxy", "p", "--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "o")]
    assert main(words) == code
    assert json.loads((tmp_path / "o" / "gate.json").read_text())["passed"] is (code == 0)
    assert ("Heal the proxy" in capsys.readouterr().out) is (code == 1)
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    for file, says in (("none", "No such file"), ("other.jsonl", "want prompt and response")):
        with pytest.raises(SystemExit):
            main([*words[:3], str(tmp_path / file), *words[4:]])
        assert says in capsys.readouterr().err


def test_a_text_with_other_line_breaks_is_one_row(rows, tmp_path, monkeypatch):
    seen = []

    def read(pairs):
        seen.extend(pairs)
        return reader(1.0, 3.0)(pairs)

    monkeypatch.setattr(proxy_gate, "make_reader", lambda folder: read)
    broken = [row | {"response": row["response"] + "\u2028\x85"} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in broken]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    words = ["--proxy", "p", "--data", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "o")]
    assert main(words) == 0
    assert seen and all(text.endswith("\u2028\x85") for _, text in seen)


def test_a_real_folder_is_read(assets, tmp_path, rows):
    words = ["--proxy", str(assets / "llama3"), "--data", str(tmp_path / "train.jsonl")]
    assert main([*words, "--out", str(tmp_path / "o"), "--least", "-99"]) == 0
