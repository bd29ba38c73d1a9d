"""Sources, wrong rows, batches and shards."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.config.data import SourceSection
from reflux.trainer.data.prompts import load_prompts, shard

ROWS = [{"prompt": f"question {i}", "answer": i, "level": i % 3} for i in range(7)]
PINNED = (4, 12, 2, 6, 10, 3, 8, 0, 9, 1, 5, 11, 7)  # epoch 0 of 13 rows, seed 0


def load(source, **options):
    return load_prompts(SourceSection(source, **options))


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return str(path)


def wrong(path, *lines, **kwargs):
    with pytest.raises(ValueError) as error:
        load(write(path, *lines), **kwargs)
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.jsonl"


def test_a_row_becomes_a_prompt(file):
    prompt = load(write(file, *ROWS))[5]
    assert prompt.index == 5
    assert prompt.messages == ({"role": "user", "content": "question 5"},)
    assert (prompt.answer, prompt.response, prompt.extra) == ("5", None, {"level": 2})


def test_blank_lines_and_a_byte_order_mark_are_no_rows(file):
    file.write_bytes(
        b"\xef\xbb\xbf\r\n" + b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9"}\r\n\n  \n{"prompt": "b"}'
    )
    assert [p.messages[0]["content"] for p in load(str(file))] == ["café", "b"]


def test_a_conversation_ends_with_the_user_and_the_assistants_last_message_is_the_response(file):
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {
        "messages": [{"role": r, "content": c, "tool_calls": None} for r, c in talk],
        "prompt": "a",
    }
    prompt = load(write(file, row))[0]
    assert [(m["role"], m["content"]) for m in prompt.messages] == talk[:-1]
    assert (
        prompt.response == "d"
        and "tool_calls" not in prompt.messages[0]
        and prompt.extra == {"prompt": "a"}
    )


def test_columns_rename(file):
    rows = load(
        write(file, {"question": "q", "solution": 2.5, "output": "r", "prompt": "other"}),
        columns={"prompt": "question", "answer": "solution", "response": "output"},
    )
    assert (rows[0].messages[0]["content"], rows[0].answer, rows[0].response) == ("q", "2.5", "r")
    assert rows[0].extra == {"prompt": "other"}


@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"prompt": "a"', ["line 3", "want one JSON object a line"]),
        ("[1, 2]", ["line 3", "list [1, 2]"]),
        ({"prompt": 5}, ["line 3, column prompt", "int 5", "want a text"]),
        ({"prompt": ""}, ["line 3, column prompt", "want a text"]),
        ({"prompt": [{"role": "user", "content": "x"}]}, ["column prompt", "messages"]),
        ({"prompt": "x", "answer": [1]}, ["line 3, column answer", "list [1]"]),
        ({"promt": "x", "b": 1}, ["line 3", "no column 'prompt', did you mean promt?", "promt, b"]),
        ('{"prompt": "half \\ud83d"}', ["line 3", "surrogate at character 5"]),
    ],
)
def test_a_wrong_row_is_located_and_explained(file, line, parts):
    message = wrong(file, {"prompt": "fine"}, "", line)
    assert str(file) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "messages, part",
    [
        ([], "want a list of messages"),
        ("hi", "str 'hi'"),
        ([{"content": "a"}], "message 0"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "message 1 has no content"),
        ([{"role": "system", "content": "a"}], "the system's; want the user's"),
        ([{"role": "assistant", "content": "a"}], "missing; want the user's"),
    ],
)
def test_wrong_messages_are_located(file, messages, part):
    message = wrong(file, {"messages": messages})
    assert "line 1, column messages" in message and part in message


def test_two_responses_are_an_error(file):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "want one of them" in wrong(file, {"messages": talk, "response": "c"})


def test_a_missing_column_names_the_nearest_and_the_existing(file):
    message = wrong(file, {"question": "a", "answer": "b"}, columns={"prompt": "questoin"})
    assert "no column 'questoin', did you mean question? There are: question, answer" in message
    assert "unknown role 'promt', did you mean prompt?" in wrong(
        file, ROWS[0], columns={"promt": "x"}
    )
    assert "no column 'gold'" in wrong(file, ROWS[0], columns={"answer": "gold"})


def test_bytes_that_are_not_utf8_are_an_error(file):
    file.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 1.*UTF-8"):
        load(str(file))


def test_nothing_to_read_is_an_error(file, tmp_path):
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="no rows"):
        load(str(file))
    with pytest.raises(ValueError, match="no such file.*jsonl"):
        load(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="limit = 0"):
        load(write(file, *ROWS), limit=0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("tables")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(folder / "data.parquet"))
    table.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict(train=table, test=table.select([6])).save_to_disk(str(folder / "parts"))
    (folder / "plain").mkdir()
    write(folder / "plain" / "train.jsonl", *ROWS)
    return folder


@pytest.mark.parametrize("name", ["data.parquet", "saved", "parts", "plain"])
def test_every_table_reads_like_the_file_it_came_from(tables, file, name):
    expected = list(load(write(file, *ROWS)))
    assert list(load(str(tables / name))) == expected
    assert list(load(str(tables / name), limit=3)) == expected[:3]
    assert list(load(str(file), limit=3)) == expected[:3]


def test_splits_and_columns_of_tables(tables):
    assert [p.answer for p in load(str(tables / "parts"), split="test")] == ["6"]
    with pytest.raises(
        ValueError, match="no split 'tset', did you mean test. There are: train, test"
    ):
        load(str(tables / "parts"), split="tset")
    with pytest.raises(ValueError, match="no column 'lvl'"):
        load(str(tables / "saved"), columns={"prompt": "lvl"})
    with pytest.raises(ValueError, match="row 0.*column level.*int 0"):
        load(str(tables / "saved"), columns={"prompt": "level"})[0]


def test_a_reasoning_gym_prompt_has_what_its_scorer_needs():
    source = "reasoning_gym:chain_sum?size=5&seed=7&max_terms=3&allow_negation=true"
    prompts = load(source)
    generated = prompts[3].extra["reasoning_gym"]
    assert len(prompts) == 5 and list(prompts) == list(load(source))
    assert generated.dataset == "chain_sum" and generated.options["allow_negation"] is True
    entry = generated.entry
    assert entry["answer"] == prompts[3].answer and entry["metadata"]["num_terms"] <= 3
    assert load("reasoning_gym:chain_sum?size=3")[0] == load("reasoning_gym:chain_sum?size=3")[0]


@pytest.mark.parametrize(
    "query, part",
    [
        ("chain_sun", "did you mean chain_sum?"),
        ("chain_sum?sise=3", "unknown option sise, did you mean size?"),
        ("chain_sum?min_terms=9&max_terms=2", "not accepted"),
        ("chain_sum?seed=None", "want an integer"),
        ("chain_sum?size", "key=value"),
    ],
)
def test_a_wrong_generator_option_is_explained(query, part):
    with pytest.raises(ValueError) as error:
        load(f"reasoning_gym:{query}")
    assert part in str(error.value)


def test_a_users_generator_is_found_where_the_run_was_started(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "def squares(start=0):\n"
        "    while True:\n        yield {'prompt': f'{start}^2', "
        "'answer': start ** 2}\n        start += 1\n"
        "def broken():\n    return ['a']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert [p.answer for p in load("my_rows:squares?start=3", limit=3)] == ["9", "16", "25"]
    with pytest.raises(ValueError, match="no function 'sqares', did you mean squares"):
        load("my_rows:sqares")
    with pytest.raises(ValueError, match="cannot import no_such_module"):
        load("no_such_module:rows")
    with pytest.raises(ValueError, match="want a row"):
        load("my_rows:broken")


ALPACA = {"instruction": "Translate", "input": "Guten Tag", "output": "Good day"}
ALPACA_COLUMNS = {"prompt": "instruction", "response": "output"}


def test_alpacas_input_joins_the_prompt_where_there_is_one(file, caplog):
    rows = [ALPACA, ALPACA | {"input": ""}, ALPACA | {"input": " \n"}, ALPACA | {"input": None}]
    prompts = load(write(file, *rows), columns=ALPACA_COLUMNS)
    texts = [p.messages[0]["content"] for p in prompts]
    assert texts == ["Translate\n\n### Input:\nGuten Tag"] + ["Translate"] * 3
    assert prompts[0].response == "Good day" and not caplog.records


def test_a_wrong_input_of_alpaca_names_its_column(file):
    assert "line 1, column input: int 3; want a text" in wrong(
        file, ALPACA | {"input": 3}, columns=ALPACA_COLUMNS
    )


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "r"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        {"instruction": "q", "input": "", "output": "r"},
        {"question": "q", "response": "r"},
        {"prompt": "q", "chosen": "r", "rejected": "s"},
        {"prompt": "q", "completion": "r"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    ],
)
def test_a_system_message_in_its_own_column_is_read_in_every_shape(file, row, column):
    """OpenOrca has system_prompt, LLaMA-Factory system; a row without one has none."""
    prompts = load(write(file, row | {column: "Be short."}, row | {column: ""}, row))
    told, *others = [[m["content"] for m in p.messages] for p in prompts]
    assert told == ["Be short.", "q"] and others == [["q"], ["q"]]
    assert prompts[0].messages[0]["role"] == "system" and prompts[0].response == "r"
    assert column not in prompts[0].extra


def test_columns_that_may_be_no_system_message_stay_what_they_are(file):
    talk = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    rows = load(write(file, {"messages": talk, "system": "other"}))
    assert len(rows[0].messages) == 2 and rows[0].extra == {"system": "other"}
    both = {"prompt": "q", "system": "a", "system_prompt": "b"}
    assert [m["content"] for m in load(write(file, both))[0].messages] == ["q"]
    rows = load(write(file, {"prompt": "q", "system": "4"}), columns={"answer": "system"})
    assert (len(rows[0].messages), rows[0].answer) == (1, "4")
    assert load(write(file, {"text": "A document.", "system": "s"}))[0].messages == ()


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": ""},
        {"prompt": "q", "response": " \n"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
        {"prompt": "q", "completion": "r", "label": False},
        {"prompt": "q", "completion": "r", "label": "False"},
    ],
)
def test_empty_and_rejected_texts_are_no_responses(file, row):
    """They would be trained on: as the stop token alone, and as if they were wanted."""
    prompt = load(write(file, row))[0]
    assert prompt.response is None and prompt.question == "q"


@pytest.mark.parametrize("label", [True, 0, 1, "good", None])
def test_other_labels_say_nothing_of_a_response(file, label):
    prompt = load(write(file, {"prompt": "q", "completion": "r", "label": label}))[0]
    assert prompt.response == "r" and prompt.extra == {"label": label}


def test_a_table_with_another_separator_is_told(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("question;answer\nWhat?;3\n")
    with pytest.raises(ValueError, match="one column with ';' in it: separate the columns by com"):
        load(str(file))
    assert "one column with" not in wrong(tmp_path / "rows.jsonl", {"promt": "x"})


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return [
        load(write(folder / f"{n}.jsonl", *({"prompt": str(i)} for i in range(n))))
        for n in range(1, 14)
    ]


SEEDS = st.integers(0, 2**40)


@given(n=st.integers(1, 13), count=st.integers(1, 20), seed=SEEDS, epochs=st.integers(1, 3))
def test_the_batches_of_every_epoch_are_a_permutation(sizes, n, count, seed, epochs):
    prompts = sizes[n - 1]
    steps = -(-epochs * n // count)
    order = [p.index for step in range(steps) for p in prompts.batch(step, count, seed=seed)]
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=st.integers(1, 13), count=st.integers(1, 20), step=st.integers(0, 50), seed=SEEDS)
def test_a_batch_is_a_function_of_seed_step_and_count(sizes, n, count, step, seed):
    prompts = sizes[n - 1]
    batch = prompts.batch(step, count, seed=seed)
    prompts.batch(step + 7, 3, seed=seed + 1)
    assert prompts.batch(step, count, seed=seed) == batch and len(batch) == count
    assert [p.index for p in prompts.batch(step, count, seed=seed, shuffle=False)] == [
        k % n for k in range(step * count, (step + 1) * count)
    ]


@given(n=st.integers(1, 13), count=st.integers(1, 40), step=st.integers(0, 9), seed=SEEDS)
def test_a_prompt_that_a_batch_has_again_is_numbered(sizes, n, count, step, seed):
    batch = sizes[n - 1].batch(step, count, seed=seed)
    keys = [(p.index, p.repeat) for p in batch]
    assert len(set(keys)) == count, "no two share their random numbers"
    for index in {p.index for p in batch}:
        assert [r for i, r in keys if i == index] == list(range([i for i, _ in keys].count(index)))


def test_epochs_and_seeds_shuffle_differently_and_the_order_is_pinned(sizes):
    orders = [
        tuple(p.index for p in sizes[12].batch(step, 13, seed=seed))
        for seed in (0, 1, 1 << 32)
        for step in (0, 1)
    ]
    assert len(set(orders)) == 6
    assert orders[0] == PINNED  # a run must resume with the same order after any upgrade


@given(each=st.integers(1, 5), world=st.integers(1, 6), seed=SEEDS)
def test_shards_of_all_ranks_make_the_batch(sizes, each, world, seed):
    batch = sizes[12].batch(3, each * world, seed=seed)
    parts = [shard(batch, rank, world) for rank in range(world)]
    assert [p for part in parts for p in part] == batch and {len(part) for part in parts} == {each}


def test_a_batch_that_cannot_be_shared_says_what_to_set(sizes):
    with pytest.raises(ValueError, match="10 prompts.*by 4 ranks; set.*12"):
        shard(sizes[12].batch(0, 10, seed=0), 0, 4)
    with pytest.raises(ValueError, match="step = -1"):
        sizes[0].batch(-1, 2, seed=0)
