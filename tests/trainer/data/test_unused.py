"""What is told of columns and texts that no prompt and no response holds."""

import json

import pytest

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.unused import named_columns

ALPACA = {"instruction": "Translate", "input": "Guten Tag", "output": "Good day"}
ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


@pytest.fixture
def told(tmp_path, caplog):
    """What is told of rows, read twice."""

    def read(*rows, named=(), **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(2):
            load_prompts(SourceSection(str(file), **options), named=named)
        return [record.getMessage() for record in caplog.records]

    return read


@pytest.mark.parametrize(
    "row, columns, words",
    [
        ({"question": "?", "context": "c"}, {"prompt": "question"}, "column context is not in the"),
        (
            {"prompt": "?", "system": 3, "passage": "p"},
            {},
            "columns passage, system are not in the prompt, which is column prompt alone",
        ),
        (
            {"instruction": "i", "input": "x", "target": "t"},
            {"prompt": "instruction"},
            "column input",
        ),
        (ALPACA, {"prompt": "input", "response": "output"}, "column instruction"),
        ({"prompt": "?", "level": 3, "answer": "a"}, {}, None),
        ({"prompt": "?", "context": "c"}, {"answer": "context"}, None),
    ],
)
def test_columns_that_change_what_is_asked_are_named_once(told, row, columns, words):
    messages = told(row, columns=columns)
    assert len(messages) == (words is not None) and (words or "") in "".join(messages)


@pytest.mark.parametrize(
    "row, column, body",
    [
        ({"messages": [ASK, TELL], "tools": [{"name": "weather"}]}, "tools", "messages"),
        (ALPACA | {"history": [["Hi", "Hello"]]}, "history", "instruction"),
        ({"context": "The Seine", "question": "Which?", "answer": "Seine"}, "context", "question"),
        (
            {"article": "Long", "question": "Which?", "options": ["a", "b"], "answer": "A"},
            "article",
            "question",
        ),
        ({"prompt": "q", "chosen": "r", "rejected": "s", "document": "d"}, "document", "prompt"),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL], "schema": "s"}, "schema", "chosen"),
        (
            {"conversations": [{"from": "human", "value": "q"}], "system_prompt": 3},
            "system_prompt",
            "conversations",
        ),
    ],
)
def test_they_are_named_in_every_shape(told, row, column, body):
    (message,) = told(row)
    assert f"column {column} is not in the prompt, which is column {body} alone" in message
    assert ("No template is given tools" in message) == (column == "tools")


def test_what_is_empty_or_used_by_an_option_is_not_named(told):
    row = ALPACA | {"history": [], "system": "", "context": None}
    assert not told(row, row)
    assert told(row, row | {"history": [["Hi", "Hello"]]}), "not the first row alone"


def test_what_an_option_names_is_not_named(told):
    table = {
        "phase": "distill",
        "folder": "f",
        "model": {"path": "m"},
        "teacher": {"path": "t"},
        "task": {"name": "exact", "options": {"aliases": "context"}},
        "distill": {"privileged": "document", "on_policy": 1.0},
        "data": {"parts": {"a": {"source": "s", "task": {"name": "column", "options": {}}}}},
    }
    table["data"]["parts"]["a"]["task"]["options"] = {"column": "schema", "tasks": {}}
    cfg = fill(Config, table, "x.toml")
    row = {"question": "q", "context": ["a"], "document": "d", "schema": "s"}
    assert {"context", "document", "schema"} <= named_columns(cfg)
    assert not told(row, named=named_columns(cfg))
    assert told(row)


def test_thoughts_beside_the_last_message_are_told_once(told):
    thinks = TELL | {"reasoning_content": "2 + 2"}
    (message,) = told({"messages": [ASK, thinks]}, {"messages": [ASK, thinks]})
    assert "reasoning_content of the assistant's last message is no part of the resp" in message


def test_thoughts_that_a_template_reads_are_not_told(told):
    earlier = [ASK, TELL | {"reasoning_content": "2 + 2"}, ASK, TELL | {"reasoning_content": ""}]
    assert not told({"messages": earlier})
