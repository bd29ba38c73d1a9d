"""The table of sampling engines, from numbers by hand; what is missing is said."""

import json

import pytest

from bench import engines


def test_medians_and_ratios_by_hand():
    runs = {
        "embedded": [{"tokens": [100, 100], "wall_s": [2.0, 4.0], "cpu_s": [1.0, 2.0]}],
        "transformers": [{"tokens": [100, 100], "wall_s": [4.0, 4.0], "cpu_s": [2.0, 2.0]}],
        "vllm": [{"missing": "not built"}],
    }
    table = engines.summarize(runs)
    assert table["embedded"]["tokens_per_cpu_s"] == pytest.approx(75)
    assert table["embedded"]["cpu_ratio_to_transformers"] == pytest.approx(1.5)
    assert table["transformers"]["tokens_per_s"] == pytest.approx(25)
    assert table["vllm"] == {"missing": "not built"}


def test_an_environment_that_is_not_built_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "ENGINES", tmp_path / "nowhere")
    assert "make test-engines" in engines._child(tmp_path, "vllm", "full")["missing"]


def test_an_arm_that_fails_says_why(tmp_path):
    """No model folder there."""
    found = engines._child(tmp_path, "transformers", "full")
    assert found["missing"] and json.dumps(found)
