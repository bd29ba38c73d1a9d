"""Public sets as rows of ours, from small files of the same shape that are made here."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reflux.trainer.data.prepare import SETS, Choice, PublicSet, _side, main, prepare
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.shapes import SHAPES

LONG = "a train leaves at noon with {} people and a second one follows it an hour later at speed"
GSM = [{"question": LONG.format(i), "answer": f"so it is\n#### {i}"} for i in range(200)]
CSQA = {
    "question": "Where is it?",
    "question_concept": "it",
    "choices": {"label": list("ABC"), "text": ["here", "there", "gone"]},
    "answerKey": "C",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(file):
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def test_a_part_is_held_out_by_the_question_alone(tmp_path):
    """Rows that share 13 words are near each other: here every second word is another number."""
    rows = [{"question": f"what is {i} and {i * 7} ?", "answer": str(8 * i)} for i in range(400)]
    source = write(tmp_path / "rows.jsonl", rows)
    m = prepare("sums", PublicSet(source), Choice(tmp_path / "a", test_fraction=0.25))
    assert m.train + m.test == 400 and 60 <= m.test <= 140 and m.contaminated == 0
    more = write(tmp_path / "more.jsonl", rows[::-1] + [{"question": "new?", "answer": "0"}])
    again = prepare("sums", PublicSet(more), Choice(tmp_path / "b", test_fraction=0.25))
    held = [{row["prompt"] for row in lines(tmp_path / f / "test.jsonl")} for f in "ab"]
    assert held[0] == held[1] - {"new?"} and again.read == 401
    other = prepare("sums", PublicSet(source), Choice(tmp_path / "c", test_fraction=0.25, seed=1))
    assert {row["prompt"] for row in lines(tmp_path / "c/test.jsonl")} != held[0]
    assert other.files != m.files


def test_rows_that_share_13_words_with_a_held_out_question_are_left_out(tmp_path):
    source = write(tmp_path / "rows.jsonl", [*GSM, *GSM[:5], {"question": "short one?"}])
    held = write(tmp_path / "held.jsonl", [{"prompt": "Look: " + LONG.format(3).upper()}])
    choice = Choice(tmp_path / "out", test_fraction=0.0, held_out=(held,))
    m = prepare("trains", PublicSet(source, task="math"), choice)
    # 12 words follow the number, so only row 3 shares 13
    assert (m.read, m.repeated, m.contaminated, m.test) == (206, 5, 1, 0)
    assert LONG.format(3) not in {row["prompt"] for row in lines(tmp_path / "out/train.jsonl")}


SUMS = [{"prompt": f"What is 7 {sign} 2?", "answer": "1"} for sign in "+-*/"]
STATEMENTS = [
    {"question": "Which of the following is true?", "choices": texts, "answer": 0}
    for texts in (["Ice floats", "Ice sinks"], ["Iron is a metal", "Iron is a gas"])
]


@pytest.mark.parametrize(
    "rows", [SUMS, STATEMENTS, [{"prompt": s} for s in ("x < 2", "x > 2", "!")]]
)
def test_signs_and_options_make_another_question(tmp_path, rows):
    """As repeated rows, and as held-out ones."""
    held = write(tmp_path / "held.jsonl", rows[:1])
    source = write(tmp_path / "rows.jsonl", rows)
    m = prepare("all", PublicSet(source), Choice(tmp_path / "a", test_fraction=0.0))
    assert (m.repeated, m.train) == (0, len(rows))
    choice = Choice(tmp_path / "b", test_fraction=0.0, held_out=(held,))
    m = prepare("rest", PublicSet(source), choice)
    assert (m.contaminated, m.train) == (1, len(rows) - 1)
    draws = [Choice(tmp_path / "c", 0.5, seed=seed) for seed in range(8)]
    sides = [{_side(p, draw) for p in load_prompts(source)} for draw in draws]
    assert {True, False} in sides, "each row is drawn by itself"


def test_case_spaces_and_the_order_of_options_make_none(tmp_path):
    swapped = STATEMENTS[0] | {"choices": ["Ice  sinks", "ice floats"], "answer": 1}
    source = write(tmp_path / "rows.jsonl", [*STATEMENTS, swapped])
    m = prepare("all", PublicSet(source), Choice(tmp_path / "a", test_fraction=0.0))
    assert (m.repeated, m.train) == (1, 2)
    source = write(tmp_path / "sums.jsonl", [*SUMS, {"prompt": " what is\n7 + 2?", "answer": "9"}])
    m = prepare("sums", PublicSet(source), Choice(tmp_path / "b", test_fraction=0.0))
    assert (m.repeated, m.train) == (1, 4)


@pytest.mark.parametrize(
    "row",
    [
        GSM[3],
        CSQA,
        {"instruction": "Add.", "context": "2, 2", "response": "4", "category": "qa"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "Be short.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"text": "A document."},
    ],
)
def test_what_is_written_is_read_back_as_the_same(tmp_path, row):
    source = write(tmp_path / "rows.jsonl", [row])
    prepare("one", PublicSet(source), Choice(tmp_path / "out", test_fraction=0.0))
    before, after = load_prompts(source)[0], load_prompts(str(tmp_path / "out/train.jsonl"))[0]
    for name in ("messages", "answer", "response"):
        assert getattr(before, name) == getattr(after, name)
    for name in ("choices", "category", "instruction_id_list"):
        assert before.extra.get(name) == after.extra.get(name)


TEXTS = st.text("ab 1#\n", max_size=6)
TALK = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=2)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.just(0.5) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
NAMES = sorted(
    {c for shape in SHAPES.values() for group in shape.needs for c in group}
    | {"answer", "response", "solution", "system", "system_prompt", "input", "context", "label"}
    | {"answerKey", "aliases", "level", "kwargs"}
)


def messages_of(i, talk, ends):
    """Turns of user and assistant; without the last answer unless it `ends`."""
    roles = [
        message
        for a, b in talk
        for message in (
            {"role": "user", "content": f"q{i}" + a},
            {"role": "assistant", "content": b},
        )
    ]
    return roles if ends else roles[:-1]


@st.composite
def sources(draw):
    """Rows of one shape, with other columns beside."""
    shape, ends = draw(st.sampled_from(sorted(SHAPES))), draw(st.booleans())
    beside = draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    rows = []
    for i in range(draw(st.integers(1, 3))):
        text, talk = f"q{i}" + draw(TEXTS), messages_of(i, draw(TALK), ends)
        body = {
            "plain": {"prompt": text, "answer": draw(TEXTS), "response": draw(TEXTS)},
            "messages": {"messages": talk},
            "sharegpt": {"conversations": talk, "system": draw(TEXTS)},
            "preference": {"prompt": text, "chosen": draw(TEXTS), "rejected": ""},
            "completion": {"prompt": talk[:1], "completion": [{**talk[0], "role": "assistant"}]},
            "instruction": {"instruction": text, "input": draw(TEXTS), "output": draw(TEXTS)},
            "choices": {"question": text, "choices": ["x", "y"], "answer": draw(st.booleans()) + 0},
            "question": {"question": text, "answer": draw(TEXTS), "solution": draw(TEXTS)},
            "text": {"text": text},
        }[shape]
        rows.append({name: draw(VALUES) for name in beside} | body)
    return rows


def told(prompt):
    return [dict(m) for m in prompt.messages], prompt.answer, prompt.response


@given(sources(), st.sampled_from([0.0, 0.5]))
def test_whatever_is_written_is_read_back_as_it_was(rows, fraction):
    """The same prompts, answers, responses and other columns, in both files."""
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "rows.jsonl", rows)
        try:
            before = list(load_prompts(source))
        except ValueError:
            assume(False)  # the columns beside it make no row of any shape
        choice = Choice(Path(folder) / "out", test_fraction=fraction)
        assume(fraction == 0.0 or not all(_side(p, choice) for p in before))  # it is refused
        m = prepare("set", PublicSet(source), choice)
        files = [Path(folder) / "out" / name for name in ("train.jsonl", "test.jsonl")]
        after = [p for f in files if f.read_text() for p in load_prompts(str(f))]
    assert m.read == len(before) and len(after) == m.train + m.test == m.read - m.repeated
    known = {json.dumps(told(p)): p.extra for p in before}
    for prompt in after:
        extra = known[json.dumps(told(prompt))]
        assert prompt.extra == {k: v for k, v in extra.items() if k not in m.left_out}
    assert not {"aliases", "level", "kwargs", "input", "context"} & {*m.left_out}


def test_columns_named_as_a_part_is_are_left_out_and_told(tmp_path, capsys):
    """A row's other column is not written over its question."""
    talk = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": "WRONG", "completion": "z", "messages": talk, "aliases": ["b"]}
    source, out = write(tmp_path / "rows.jsonl", [row]), tmp_path / "out"
    assert main(["mine", "--source", source, "--out", str(out), "--test-fraction", "0"]) == 0
    assert "columns left out" in (said := capsys.readouterr().out) and "completion, prompt" in said
    (written,) = lines(out / "train.jsonl")
    assert written == {"prompt": "the question", "response": "a", "aliases": ["b"]}
    assert json.loads((out / "manifest.json").read_text())["left_out"] == ["completion", "prompt"]


def test_conversations_of_one_and_of_several_turns_share_a_file(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    more = [{"from": "human", "value": "c"}, *turns[1:], {"from": "human", "value": "d"}]
    rows = [{"conversations": talk} for talk in (turns, more)]
    source = write(tmp_path / "rows.jsonl", rows)
    prepare("mixed", PublicSet(source), Choice(tmp_path / "out", test_fraction=0.0))
    after = load_prompts(str(tmp_path / "out" / "train.jsonl"))
    assert list(map(told, after)) == list(map(told, load_prompts(source)))


def test_the_command_filters_says_its_counts_and_keeps_what_is_there(tmp_path, capsys):
    rows = [{"problem": f"p {i}", "answer": str(i), "level": i % 3} for i in range(30)]
    source, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    words = ["bigmath", "--source", source, "--out", str(out), "--where", "level=1,2"]
    assert main([*words, "--test-fraction", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "30 rows of shape question read, 10 filtered" in said
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["task"] == "math" and manifest["train"] + manifest["test"] == 20
    assert {row["level"] for row in lines(out / "train.jsonl")} == {1, 2}
    assert main(words) == 2 and "holds a prepared set already" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (["bigmaths"], "unknown set 'bigmaths', did you mean bigmath?"),
        (
            ["mine", "--source", "{rows}", "--where", "levl=1"],
            "no such column, did you mean level?",
        ),
        (["mine", "--source", "{rows}", "--where", "level"], "want column=value,value"),
        (["mine", "--source", "{rows}", "--where", "level=9"], "no row is left of 1"),
        (["mine", "--source", "{rows}", "--test-fraction", "1"], "want 0 to less than 1"),
        (
            ["mine", "--source", "{rows}", "--held-out", "{rows}"],
            "of 1 to train on: 0 filtered by --where, 0 repeated, 0 held out, 1 share",
        ),
        (["mine", "--source", "{rows}", "--test-fraction", "0.999"], "1 held out, 0 share"),
        (
            ["gsm8k", "--source", "{rows}*", "--test-split", "test"],
            "none is called 'test'; without",
        ),
        (["mine", "--source", "{rows}x*"], "no file matches this pattern"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, words, says):
    rows = write(tmp_path / "rows.jsonl", [{"problem": "p", "answer": "1", "level": 3}])
    filled = [word.format(rows=rows) for word in words]
    assert main([*filled, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, public in SETS.items() if public.test])
@pytest.mark.parametrize("source", ["rows.jsonl", "row*.jsonl", "gsm_of_200:rows"])
def test_files_have_no_split_of_a_set(tmp_path, monkeypatch, name, source):
    """Not either when a pattern or a function names them: all rows were held out, exit code 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gsm_of_200.py").write_text(f"def rows():\n    return {GSM}\n")
    write(tmp_path / "rows.jsonl", GSM)
    assert main([name, "--source", source, "--out", "out"]) == 0
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert made["read"] == 200 and made["train"] > 150 and made["test"] > 0
    assert made["task"] == SETS[name].task


def test_a_saved_set_without_splits_is_not_held_out_whole(tmp_path, capsys):
    import datasets

    datasets.Dataset.from_list(GSM).save_to_disk(str(tmp_path / "gsm"))
    words = ["mine", "--source", str(tmp_path / "gsm"), "--out", str(tmp_path / "out")]
    assert main([*words, "--test-split", "test"]) == 2
    assert "no row is left of 400 to train on" in capsys.readouterr().err
    assert main(words) == 0


def test_own_splits_of_a_set_are_kept(tmp_path):
    import datasets

    parts = {
        "train": datasets.Dataset.from_list(GSM[:20]),
        "test": datasets.Dataset.from_list(GSM[18:25]),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "gsm"))
    public = PublicSet(str(tmp_path / "gsm"), test="test")
    m = prepare("gsm8k", public, Choice(tmp_path / "out"))
    assert (m.train, m.test, m.contaminated) == (18, 7, 2), "two questions are in both splits"


def test_the_paper_s_sets_have_a_grader():
    from reflux.trainer.data.grader_options import TASKS

    assert all(public.task in TASKS for public in SETS.values())
