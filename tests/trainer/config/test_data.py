"""The table [data]."""

import pytest

from reflux.trainer.config.data import DataSection, SourceSection
from reflux.trainer.config.loader import fill


def test_a_source_is_a_text_or_a_list():
    assert fill(DataSection, {"source": "a.jsonl"}, "file").name == "a.jsonl"
    several = fill(DataSection, {"source": ["a.jsonl", "b.jsonl"]}, "file")
    assert several.source == ("a.jsonl", "b.jsonl") and several.name == "a.jsonl, b.jsonl"


@pytest.mark.parametrize(
    "table, says",
    [
        ({"source": 3}, "file: source = 3; want str | a list of str"),
        ({"shape": "alpaca"}, "file: shape = 'alpaca'; want auto | plain | messages"),
        ({"limit": 0}, "file: limit = 0; want >= 1"),
        ({"list_options": "no"}, "list_options = 'no'; want bool | given | none (leave it out)"),
    ],
)
def test_what_is_refused(table, says):
    with pytest.raises(ValueError) as error:
        fill(DataSection, table, "file")
    assert says in str(error.value)


def test_options_are_listed_where_the_rows_have_them_unless_told():
    assert SourceSection().list_options is None
    assert fill(DataSection, {"list_options": False}, "file").list_options is False
    assert fill(DataSection, {"list_options": "given"}, "file").list_options == "given"
