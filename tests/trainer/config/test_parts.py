"""Parts of [data] and [eval], and whose task grades them."""

import pytest

from reflux.trainer.config.loader import fill, to_toml
from reflux.trainer.config.parts import input_name, part_configs, tasks, used_tasks
from reflux.trainer.config.schema import Config

SUMS = {"source": "sums.jsonl", "weight": 3, "task": {"name": "exact"}}
FACTS = {"source": "facts.jsonl", "limit": 5}


def config(**over) -> Config:
    base = {
        "phase": "calibrate",
        "folder": "run",
        "model": {"path": "m"},
        "task": {"name": "math"},
        "data": {"parts": {"sums": SUMS, "facts": FACTS}},
    }
    return fill(Config, base | over, "test")


def test_every_part_is_a_configuration_of_its_own():
    cfg = config()
    parts = part_configs(cfg, "data")
    assert [(n, p.data.source, p.data.limit, p.task.name) for n, p in parts.items()] == [
        ("sums", "sums.jsonl", None, "exact"),
        ("facts", "facts.jsonl", 5, "math"),
    ]
    assert all(not p.data.parts for p in parts.values())
    assert part_configs(cfg, "eval") == {"": cfg}


def test_an_evaluation_takes_the_task_of_the_part_that_is_called_alike():
    questions = {"sums": {"source": "a"}, "more": {"source": "b"}, "own": SUMS | {"source": "c"}}
    del questions["own"]["weight"]
    cfg = config(eval={"parts": questions})
    names = {part: task.name for part, task in tasks(cfg).items()}
    assert names == {"": "math", "sums": "exact", "facts": "math", "more": "math", "own": "exact"}
    assert [t.name for t in used_tasks(cfg, "eval")] == ["exact", "math", "exact"]
    assert {p.eval.split for p in part_configs(cfg, "eval").values()} == {"test"}


@pytest.mark.parametrize(
    "over, says",
    [
        ({"data": {"source": "a", "parts": {"sums": SUMS}}}, "beside parts sums; want one of them"),
        ({"data": {"parts": {"sums": {}}}}, "data.parts.sums.source is missing"),
        ({"data": {"parts": {"sums": SUMS | {"weight": 0}}}}, "data.parts.sums.weight = 0.0; want"),
        ({"data": {"parts": {"a/b": SUMS}}}, "the name 'a/b'; want letters"),
        (
            {"data": {"parts": {"sums": SUMS | {"wieght": 1}}}},
            "did you mean data.parts.sums.weight",
        ),
        ({"task": {}}, "task.name is missing"),
        (
            {"eval": {"parts": {"sums": {"source": "a", "task": {"name": "math"}}}}},
            "eval.parts.sums.task = 'math' and data.parts.sums.task = 'exact' differ",
        ),
    ],
)
def test_what_is_refused(over, says):
    with pytest.raises(ValueError) as error:
        config(**over)
    assert says in str(error.value)


def test_parts_survive_the_round_trip():
    import tomllib

    cfg = config(eval={"parts": {"sums": {"source": ["a", "b"]}}})
    assert fill(Config, tomllib.loads(to_toml(cfg)), "file") == cfg


def test_names_among_the_inputs():
    assert (input_name("data", ""), input_name("eval", "sums")) == ("data", "eval.sums")
