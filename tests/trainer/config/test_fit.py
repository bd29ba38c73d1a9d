"""Values against type hints, and the nearest name: the one rule of files, tasks and torchtitan."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from reflux.trainer.config.fit import fit, nearest, nearest_model, spell

MODES = Literal["off", "on", 2]


@pytest.mark.parametrize(
    "value, hint, fitted",
    [
        (1, float, 1.0),
        (0.5, float, 0.5),
        (None, float | None, None),
        (3, float | None, 3.0),
        (3, int | str, 3),
        (True, bool, True),
        ("on", MODES, "on"),
        (2, MODES, 2),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([], tuple[str, ...], ()),
        ([0, 0.5], tuple[float, float], (0.0, 0.5)),
        (["a"], list[str], ["a"]),
        ([1, 2], list[int] | int, [1, 2]),
        ({"a": [1]}, Mapping[str, Any], {"a": [1]}),
        ({"a": "b"}, dict[str, str], {"a": "b"}),
        (7, Annotated[int, "a note"], 7),
        (object, Any, object),
    ],
)
def test_a_value_of_the_kind_is_taken(value, hint, fitted):
    got = fit(value, hint, "x")
    assert got == fitted and type(got) is type(fitted)


@pytest.mark.parametrize(
    "value, hint, says",
    [
        (True, int, "x = True; want int"),
        (True, float, "x = True; want a finite float"),
        (1, bool, "x = 1; want bool"),
        (1.0, int, "x = 1.0; want int"),
        (float("inf"), float, "x = inf; want a finite float"),
        ("1", float, "x = '1'; want a finite float"),
        ("5", int | None, "x = '5'; want int | none (leave it out)"),
        (True, MODES, "x = True; want off | on | 2"),
        ("of", MODES, "x = 'of'; want off | on | 2"),
        ("a", tuple[str, ...], "x = 'a'; want a list of str"),
        (["a", 3], tuple[str, ...], "x[1] = 3; want str"),
        ([1.0], tuple[float, float], "x = [1.0]; want [float, float]"),
        ([1.0, "b"], tuple[float, float], "x[1] = 'b'; want a finite float"),
        (3, Mapping[str, Any], "x = 3; want a table"),
        ({"a": 3}, Mapping[str, str], "x = {'a': 3}; want a table of strings"),
    ],
)
def test_another_kind_is_an_error_with_what_is_wanted(value, hint, says):
    with pytest.raises(ValueError) as error:
        fit(value, hint, "x")
    assert str(error.value) == says


def test_a_hint_is_spelled_in_words():
    assert spell(tuple[Literal["a", "b"], ...]) == "a list of a | b"
    assert spell(str | None) == "str | none (leave it out)"


def test_the_nearest_name_ends_the_sentence():
    assert nearest("sede", ["seed", "steps"], "run.") == ", did you mean run.seed?"
    assert nearest("xyz", ["seed", "steps"]) == "."


def test_the_nearest_model_is_a_folder_with_a_config(tmp_path, monkeypatch):
    for name, file in (("qwen3", "config.json"), ("lora", "adapter_config.json"), ("qwem", "x")):
        (tmp_path / "debug" / name).mkdir(parents=True)
        (tmp_path / "debug" / name / file).touch()
    monkeypatch.chdir(tmp_path)
    assert nearest_model("debug/qwen") == ", did you mean debug/qwen3?"
    assert nearest_model(f"{tmp_path}/debug/qwen") == f", did you mean {tmp_path}/debug/qwen3?"
    assert nearest_model("debug/lorra") == ", did you mean debug/lora?"
    assert nearest_model("debug/mistral") == nearest_model("nowhere/qwen3") == ""
    monkeypatch.chdir(tmp_path / "debug")
    assert nearest_model("qwen2") == ", did you mean qwen3?"
