"""A diagnosis as JSON: what was not measured is left out, what has no value is null."""

import math

from token_stats_cases import token_stats

from reflux.trainer.diagnosis.results import measured
from reflux.trainer.diagnosis.summary import diagnose_token_stats
from reflux.trainer.diagnosis.verdict import with_verdict
from reflux.trainer.runs.files import to_json


def test_what_was_not_measured_is_left_out():
    diagnosis = with_verdict(diagnose_token_stats([token_stats(0, "student")]))
    table = to_json(measured(diagnosis))
    assert "runs" not in table and table["cross_tokenizer"] is None
    assert set(table["off_policy"]) == {"decile"}
    assert "exact_tokens" in table["sequence"]["reverse"] and "wrong_trace" not in table["gap"]
    assert table["verdict"][0]["present"] is None  # inconclusive, not unmeasured


def test_numbers_that_are_not_finite_are_null():
    diagnosis = diagnose_token_stats([token_stats(0, "student")])
    assert math.isnan(diagnosis.gap.overlap.low)
    overlap = to_json(measured(diagnosis))["gap"]["overlap"]
    assert overlap == {"mean": 0.5, "std": None, "low": None, "high": None, "n": 1}
